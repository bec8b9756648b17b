"""`Steps`: trains the steps of this process, and tells all processes of the run what became of
each.

A run of one process trains one step after the other. Where experts are trained side by side, each
process trains those of its own expert, and all meet at the end of a `span`: after a block of steps
of each expert, and at every step at which something is due, so that the state of a step contains
the steps before it and no others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from onewan.data.loader import StepBatches
from onewan.devices import device_memory, reset_peak
from onewan.memory.device import empty_cache_near
from onewan.runs.events import StepDone
from onewan.train.run import Run
from onewan.train.speed import step_speed
from onewan.train.step import train_step


class Steps:
    """The remaining steps of `run`."""

    def __init__(
        self,
        run: Run,
        is_due: Callable[[int], bool],
        is_signalled: Callable[[], bool],
        *,
        memory_limit: int | None,
        device_rate: float | None,
    ) -> None:
        """`is_due` says whether something is to be done, or may change, when so many steps are
        complete, and `is_signalled` whether this process was told to stop. `memory_limit` is the
        number of bytes of the device that may be used, and `device_rate` its FLOP/s in matrix
        products; None where they are not known."""
        self._run, self._is_due, self._is_signalled = run, is_due, is_signalled
        self._memory_limit, self._device_rate = memory_limit, device_rate
        self._copied = run.memory.copied
        self._bucket: Sequence[int] | None = None
        """Frames, height and width of the latents of the step before."""

    def __iter__(self) -> Iterator[tuple[list[StepDone], bool]]:
        """After each span, what became of its steps, in their order, and whether a process was told
        to stop; `run.state.step` is counted on before. DataError if clips can't be read."""
        run, total = self._run, self._run.config.train.steps
        own = run.group.experts if run.division.side_by_side else None
        batches = run.loader.steps(run.state.step, total, run.schedule.expert_at, own, run.part)
        with closing(batches):
            while run.state.step < total:
                span = self._span(run.state.step, total)
                done = [self._train(next(batches)) for step in span if self._is_own(step)]
                run.state.step = span.stop
                found = run.ranks.gathered((done, self._is_signalled()))
                done_by_rank, signalled = zip(*found, strict=True)
                yield _in_order(done_by_rank, run.division.sequence), any(signalled)

    def _span(self, first: int, total: int) -> range:
        run = self._run
        if not run.division.side_by_side:
            return range(first, first + 1)
        return run.schedule.span(first, total, self._is_due)

    def _is_own(self, step: int) -> bool:
        return self._run.schedule.expert_at(step)[0] in self._run.group.experts

    def _train(self, step: StepBatches) -> StepDone:
        """Train `step`; what became of this process's part of it."""
        run = self._run
        # Other sizes leave blocks in PyTorch's cache that the present ones can't use.
        bucket = step.batches[0].latents.shape[2:] if step.batches else None
        if bucket != self._bucket:
            self._bucket = bucket
            empty_cache_near(run.device, self._memory_limit)
        reset_peak(run.device)
        begin = time.perf_counter()
        metrics = train_step(run, step)
        seconds = time.perf_counter() - begin
        allocated, peak = device_memory(run.device)
        speed = step_speed(run, step, seconds, self._device_rate)
        before, self._copied = self._copied, run.memory.copied
        on_device = peak is not None
        return StepDone(
            step=step.number + 1,
            expert=step.expert,
            loss=metrics.loss,
            preservation_loss=metrics.preservation_loss,
            grad_norm=metrics.grad_norm,
            lr=metrics.lr,
            embeddings_lr=metrics.embeddings_lr,
            t=metrics.t,
            seconds=seconds,
            memory_allocated=allocated,
            step_memory_peak=peak,
            bytes_to_device=self._copied.to_device - before.to_device if on_device else None,
            bytes_to_host=self._copied.to_host - before.to_host if on_device else None,
            tokens_per_second=speed.tokens_per_second,
            tflops=speed.tflops,
            mfu=speed.mfu,
        )


def _in_order(by_rank: Sequence[Sequence[StepDone]], sequence: int) -> list[StepDone]:
    """The steps of a span from what each process tells of its parts of them. `sequence` processes,
    which follow each other, have parts with the same clips."""
    parts: dict[int, list[StepDone]] = {}
    for done in by_rank:
        for part in done:
            parts.setdefault(part.step, []).append(part)
    return [_whole(parts[step], sequence) for step in sorted(parts)]


def _whole(parts: Sequence[StepDone], sequence: int) -> StepDone:
    """A step from its parts: losses, one of those with the same clips, and speeds add up, times and
    peaks are the largest."""
    first, clips = parts[0], parts[::sequence]
    if len(parts) == 1:
        return first
    return replace(
        first,
        loss=sum(part.loss for part in clips),
        preservation_loss=_of_those(sum, [part.preservation_loss for part in clips]),
        t=tuple(level for part in clips for level in part.t),
        seconds=max(part.seconds for part in parts),
        memory_allocated=_of_those(max, [part.memory_allocated for part in parts]),
        step_memory_peak=_of_those(max, [part.step_memory_peak for part in parts]),
        tokens_per_second=_of_those(sum, [part.tokens_per_second for part in parts]),
        tflops=_of_those(sum, [part.tflops for part in parts]),
        mfu=_of_those(min, [part.mfu for part in parts]),
    )


def _of_those(combine: Callable[[list[float]], Any], values: Sequence[float | None]) -> Any:
    """The known values, combined; None if none is known."""
    known = [value for value in values if value is not None]
    return combine(known) if known else None
