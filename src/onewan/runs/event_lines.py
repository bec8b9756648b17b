"""`EventLines`: the lines in which a person reads what happened in a run.

The terminal and ``log.txt`` show the same ones. Progress within an activity has none: a terminal
shows it as a bar.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.runs import events
from onewan.runs.layout import displayed


class EventLines:
    """Turns events, in their order, into lines."""

    def __init__(self) -> None:
        self._exported: list[events.Exported] = []
        self._writers: dict[type[events.Event], Callable[[Any], Iterable[str]]] = {
            events.Started: _started,
            events.DataReady: _data_ready,
            events.Resumed: _resumed,
            events.MemoryPlanned: _memory_planned,
            events.AttentionChosen: _attention_chosen,
            events.Validated: _validated,
            events.BestSoFar: _best_so_far,
            events.Note: _note,
            events.Warned: _warned,
            events.Saved: _saved,
            events.Exported: self._keep_exported,
            events.Sampled: _sampled,
            events.Stopped: _stopped,
            events.Failed: _failed,
            events.Finished: _finished,
        }

    def of(self, event: events.Event) -> list[str]:
        """The lines about `event`; none for progress and for kinds that are not shown."""
        # Exports are collected until another event shows that those of this step are complete.
        earlier = [] if isinstance(event, events.Exported) else self.rest()
        writer = self._writers.get(type(event))
        return earlier if writer is None else [*earlier, *writer(event)]

    def rest(self) -> list[str]:
        """The lines about events that wait for others to be shown with them."""
        if not self._exported:
            return []
        paths = [str(displayed(event.file)) for event in self._exported]
        step = self._exported[0].step
        self._exported.clear()
        # By characters, not by folders: the names begin with those of the run and of the step.
        start = os.path.commonprefix(paths)  # noqa: RUF071
        shown = paths[0] if len(paths) == 1 else f"{start}* ({len(paths)} files)"
        return [f"step {step}: weights exported: {shown}"]

    def _keep_exported(self, event: events.Exported) -> Iterable[str]:
        """There is one event for each expert and format, and one line for all of a step."""
        self._exported.append(event)
        return ()


def _started(event: events.Started) -> Iterable[str]:
    yield f"run {displayed(event.run)}"


def _data_ready(event: events.DataReady) -> Iterable[str]:
    return event.report


def _resumed(event: events.Resumed) -> Iterable[str]:
    yield f"resumed after step {event.step}"


def _memory_planned(event: events.MemoryPlanned) -> Iterable[str]:
    yield (
        f"memory: at most {format_bytes(event.device_peak)} on the device ({event.phase}) and "
        f"{format_bytes(event.host_peak)} in host memory, by the plan"
    )


def _attention_chosen(event: events.AttentionChosen) -> Iterable[str]:
    if event.milliseconds:
        times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in event.milliseconds.items())
        yield f"attention: {event.backend} ({times})"


def _validated(event: events.Validated) -> Iterable[str]:
    clips = "held-out clips" if event.held_out else "training clips"
    losses = [("loss", event.loss), ("of the moving average", event.ema)]
    # At step 0 the two differ only for an adapter that is initialized from a file, for example.
    if event.step == 0 and event.base != event.loss:
        losses.append(("of the base model", event.base))
    shown = ", ".join(
        f"{label} {loss:.4f}{_relative_change(loss, event.base, event.step)}"
        for label, loss in losses
        if loss is not None
    )
    yield f"step {event.step}: validation on {clips}, {event.expert} expert: {shown}"


def _best_so_far(event: events.BestSoFar) -> Iterable[str]:
    yield f"step {event.step}: best validation loss so far, {event.loss:.4f}"


def _note(event: events.Note) -> Iterable[str]:
    yield f"note: {event.text}"


def _warned(event: events.Warned) -> Iterable[str]:
    yield f"warning: {event.text}"


def _saved(event: events.Saved) -> Iterable[str]:
    yield f"step {event.step}: state saved: {displayed(event.state)}"


def _sampled(event: events.Sampled) -> Iterable[str]:
    yield f"step {event.step}: sample video: {displayed(event.file)}"


def _stopped(event: events.Stopped) -> Iterable[str]:
    if event.step:
        yield f"stopped; the state of step {event.step} is saved; continue with --resume"
    else:
        yield "stopped before the first step; encoded data is kept; start it again"


def _failed(event: events.Failed) -> Iterable[str]:
    first, *details = event.error.split("\n")
    return [f"failed: {first}", *details]


def _finished(event: events.Finished) -> Iterable[str]:
    yield f"done: {event.step} steps; all results are in {displayed(event.run)}"


def _relative_change(loss: float, base: float | None, step: int) -> str:
    """Relative difference from the loss of the base model, as a text in parentheses."""
    if base is None or step == 0:
        return ""
    return f" ({100 * (loss / base - 1):+.1f} % against the base model)"
