"""`SampleMaker`: generates the sample videos of a run while it trains, divided among its processes.

A video that fails does not end the run: its error is reported, and training continues.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from onewan.errors import Interrupted, OnewanError, one_line
from onewan.runs import events
from onewan.runs.layout import RunLayout
from onewan.runs.log import RunLog
from onewan.sample.generate import SampleRequest, WanModelSampler
from onewan.train.run import Run
from onewan.train.state import Trainable

log = logging.getLogger(__name__)

_PIECE = 256 << 20
"""Bytes of weights that are sent at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Video:
    """A video that is to be made."""

    number: int
    name: str
    """Of its file, without the ending."""
    request: SampleRequest
    requested: bool = False
    """Whether it was ordered while the run trains."""


class SampleMaker:
    """Writes the videos of `samples/` in the run's folder, and reports it in `log`."""

    def __init__(
        self, layout: RunLayout, log: RunLog, stop_if_requested: Callable[[], None]
    ) -> None:
        """`stop_if_requested` is called after each denoising step, and may raise Interrupted: in
        this process only, and the others stop after the video that they are making."""
        self._layout = layout
        self._log = log
        self._stop_if_requested = stop_if_requested
        self.keep_existing = False
        """Whether videos that exist are kept: in a resumed run. A new run may find those of an
        earlier one that ended before its first saved state, and may have other settings."""

    def make(self, run: Run, requests: Iterable[SampleRequest]) -> None:
        """The videos of the run file's prompts at the present step, in their order.

        All processes of the run call this, and the first one has the whole state of the run. Each
        makes the next video of those that are left.
        """
        videos = [
            _Video(
                number=number,
                name=f"{number}-distilled" if request.distilled else f"{number}",
                request=request,
            )
            for number, request in enumerate(requests)
        ]
        self._make_all(
            run,
            [v for v in videos if not (self._path(run, v).exists() and self.keep_existing)],
        )

    def make_requested(self, run: Run, request: SampleRequest | None) -> None:
        """A video of another prompt, beside those of the run file. All processes call this; the
        first one's `request` counts."""
        if request is None:
            self._make_all(run, [])
            return
        number = len(run.samples)
        while True:
            video = _Video(
                number=number, name=f"requested-{number}", request=request, requested=True
            )
            if not self._path(run, video).exists():
                break
            number += 1
        self._make_all(run, [video])

    def _make_all(self, run: Run, videos: Sequence[_Video]) -> None:
        """Make the `videos` of the first process: one in each process at a time."""
        ranks = run.ranks
        videos = ranks.from_first(videos)
        if run.division.side_by_side and run.division.is_sharded:
            if videos:
                _exchange_shards(run)
        elif run.division.side_by_side and len(videos) > 1:
            _give_weights(run)
        for start in range(0, len(videos), ranks.count):
            own = videos[start : start + ranks.count][ranks.rank : ranks.rank + 1]
            # Waits for all: processes take about the same time for videos of one size, and what
            # is reported stays in the order of the videos.
            reports = ranks.gathered(self._reports_of(run, own))
            made = [report for part in reports for report in part]
            for report in made:
                if report is not None:
                    self._log.emit(report)
            if None in made:
                raise Interrupted

    def _path(self, run: Run, video: _Video) -> Path:
        folder = self._layout.samples(run.state.step)
        return folder / f"{video.name}.{run.config.sample.format}"

    def _reports_of(self, run: Run, videos: Sequence[_Video]) -> list[events.Event | None]:
        """Make this process's `videos`. Where weights are sharded it takes part in all others."""
        with ExitStack() as weights:
            if videos or run.division.is_sharded:
                for trainable in _with_state(run):
                    # For a schedule-free optimizer, "trained" selects its average.
                    weights.enter_context(trainable.using("trained"))
            reports = [self._report_of(run, video) for video in videos]
            run.memory.finish_passes()
        return reports

    def _report_of(self, run: Run, video: _Video) -> events.Event | None:
        """Make a video; what became of it, None if it was interrupted."""
        request, path = video.request, self._path(run, video)
        try:
            self._make(run, video, path)
        except Interrupted:
            return None
        except Exception as error:  # hours of training must not be lost to a failed preview
            if not isinstance(error, OnewanError):
                if run.division.is_sharded:
                    raise  # others may be in the middle of the pass that has failed
                log.exception("sampling failed")
            return events.Warned(text=one_line(f"sampling '{request.prompt}' failed: {error}"))
        return events.Sampled(
            step=run.state.step,
            file=path,
            prompt=request.prompt,
            distilled=request.distilled,
            requested=video.requested,
            seed=request.seed,
        )

    def _make(self, run: Run, video: _Video, path: Path) -> None:
        sampler = WanModelSampler(run.model, residency=run.residency, distilled=run.distilled)
        run.memory.use_for_sampling()
        sampler.sample_to(
            path,
            video.request,
            # While embeddings are trained, the cached text would be outdated.
            text=None if run.config.embeddings else run.prompt_text,
            on_step=partial(self._on_step, run.state.step, video.number),
        )

    def _on_step(self, step: int, number: int, done: int, total: int) -> None:
        self._log.emit(events.Sampling(step=step, number=number, done=done, total=total))
        self._stop_if_requested()


def _with_state(run: Run) -> list[Trainable]:
    """What has its optimizer's present state in this process. Experts that others train have only
    the weights to sample with (`_give_weights`)."""
    if run.ranks.is_first:
        return run.state.trainables
    names = {*run.group.experts, "embeddings"}
    return [trainable for trainable in run.state.trainables if trainable.name in names]


def _give_weights(run: Run) -> None:
    """Give each process the weights of the experts that others train, as they are sampled with.
    They come from the first process, which has the whole state of the run."""
    ranks = run.ranks
    for group in run.division.groups:
        if not set(range(1, ranks.count)) - set(group.ranks):
            continue  # every process that samples has them
        for trainable in run.trained_by(group):
            received = dict[str, Tensor]()
            with ExitStack() as weights:
                pieces: Iterator[Mapping[str, Tensor]] = iter(())
                if ranks.is_first:
                    weights.enter_context(trainable.using("trained"))
                    pieces = _pieces(trainable.weights.present())
                while piece := ranks.from_first(next(pieces, None)):
                    received |= piece
            if not ranks.is_first and ranks.rank not in group.ranks:
                trainable.settle()
                trainable.weights.write(received, "rank 0")


def _exchange_shards(run: Run) -> None:
    """Give each process the shards of the other expert that it is to sample with: those of the
    process in the other group that has the same part."""
    ranks, groups = run.ranks, run.division.groups
    pair = tuple(group.ranks[run.group.ranks.index(ranks.rank)] for group in groups)
    for group in groups:
        is_own = ranks.rank in group.ranks
        for trainable in run.trained_by(group):
            with ExitStack() as weights, torch.no_grad():
                if is_own:
                    weights.enter_context(trainable.using("trained"))
                parameters = trainable.weights.parameters.values()
                # A sum with zeros: the values of the one that trains it.
                shared = [p.clone() if is_own else torch.zeros_like(p) for p in parameters]
                ranks.add(shared, pair)
                if not is_own:
                    for parameter, values in zip(parameters, shared, strict=True):
                        parameter.copy_(values)


def _pieces(weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The weights on the host, in parts of about `_PIECE` bytes."""
    piece, size = dict[str, Tensor](), 0
    for name, weight in weights.items():
        piece[name] = weight.detach().cpu()
        size += weight.nbytes
        if size >= _PIECE:
            yield piece
            piece, size = {}, 0
    if piece:
        yield piece
