"""`EventLines`: the lines in which a person reads what happened in a run.

The terminal and ``log.txt`` show the same ones. Progress within an activity has none: a terminal
shows it as a bar.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.arithmetic.durations import format_duration
from onewan.documents import format_value, shortened
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
            events.Overview: _overview,
            events.AttentionChosen: _attention_chosen,
            events.Validated: _validated,
            events.BestSoFar: _best_so_far,
            events.Note: _note,
            events.Warned: _warned,
            events.Saved: _saved,
            events.Exported: self._keep_exported,
            events.Sampled: _sampled,
            events.SettingChanged: _setting_changed,
            events.Rejected: _rejected,
            events.Stopped: _stopped,
            events.Failed: _failed,
            events.BestWeights: _best_weights,
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
        exported, lines = self._exported.copy(), list[str]()
        self._exported.clear()
        for what, is_best in (("best weights so far", True), ("weights exported", False)):
            files = [event for event in exported if (event.best_loss is not None) == is_best]
            if files:
                paths = [str(displayed(event.file)) for event in files]
                # By characters, not by folders: the names begin with the run's and the step's.
                start = os.path.commonprefix(paths)  # noqa: RUF071
                shown = paths[0] if len(paths) == 1 else f"{start}* ({len(paths)} files)"
                lines.append(f"step {files[0].step}: {what}: {shown}")
        return lines

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


def _overview(event: events.Overview) -> Iterable[str]:
    steps = f"{sum(event.steps.values()):,}"
    if len(event.steps) > 1:
        steps += f" ({', '.join(f'{name} {count:,}' for name, count in event.steps.items())})"
    yield f"steps: {steps}; {_clips(event)}"
    trained = {name: _parameters(count) for name, count in event.parameters.items()}
    yield f"trainable parameters: {_by_expert(trained, 'for')}"
    if event.step_seconds is not None and event.run_seconds is not None:
        yield (
            f"time: about {format_duration(event.step_seconds)} a step and "
            f"{format_duration(event.run_seconds)} in all, by arithmetic"
        )
    disk = ", ".join(f"{name} {format_bytes(amount)}" for name, amount in event.disk.items())
    yield f"disk, by the plan: {disk}"
    folders = [event.weights] if event.samples is None else [event.weights, event.samples]
    yield f"results: {' and '.join(str(displayed(folder)) for folder in folders)}"


def _clips(event: events.Overview) -> str:
    """How many clips there are, and how often each is seen."""
    clips = "1 clip" if event.clips == 1 else f"{event.clips:,} clips"
    seen = {
        name: f"{count:.0f} times" if count >= 9.95 else f"{count:.2g} times"
        for name, count in event.seen.items()
    }
    if set(event.expert_clips.values()) == {event.clips}:
        return f"{clips}, each seen {_by_expert(seen, 'by')}"
    parts = [
        f"{count:,} for the {name} expert, each seen {seen[name]}"
        for name, count in event.expert_clips.items()
    ]
    return f"{clips}: {' and '.join(parts)}"


def _by_expert(values: Mapping[str, str], word: str) -> str:
    """The values of the experts, or of the embeddings; one that all experts share is said once."""
    if len(values) == 1:
        return next(iter(values.values()))
    experts = {name: value for name, value in values.items() if name != "embeddings"}
    parts = [f"{value} {word} the {name} expert" for name, value in experts.items()]
    if len(experts) > 1 and len(set(experts.values())) == 1:
        parts = [f"{next(iter(experts.values()))} {word} each expert"]
    parts += [
        f"{value} {word} the embeddings" for name, value in values.items() if name not in experts
    ]
    return " and ".join(parts)


def _parameters(count: int) -> str:
    """A number of parameters as people say it: "76.7 million"."""
    for size, name in ((10**9, "billion"), (10**6, "million")):
        if count >= size:
            return f"{count / size:.1f} {name}"
    return f"{count:,}"


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
    what = "distilled sample video" if event.distilled else "sample video"
    of = f" of '{shortened(event.prompt)}'" if event.requested else ""
    yield f"step {event.step}: {what}{of}: {displayed(event.file)}"


def _setting_changed(event: events.SettingChanged) -> Iterable[str]:
    old, new = (format_value(value) for value in (event.old, event.new))
    yield f"step {event.step}: from the next step on, {event.name} is {new}; it was {old}"


def _rejected(event: events.Rejected) -> Iterable[str]:
    what = "changed settings" if event.request == "settings" else "a sample video"
    yield f"step {event.step}: a request for {what} is not followed: {event.reason}"


def _stopped(event: events.Stopped) -> Iterable[str]:
    if event.step:
        yield f"stopped; the state of step {event.step} is saved; continue with --resume"
    else:
        yield "stopped before the first step; encoded data is kept; start it again"


def _failed(event: events.Failed) -> Iterable[str]:
    first, *details = event.error.split("\n")
    return [f"failed: {first}", *details]


def _best_weights(event: events.BestWeights) -> Iterable[str]:
    clips = "held-out clips" if event.held_out else "training clips"
    change = _relative_change(event.loss, event.base, event.step)
    yield (
        f"best by validation on {clips}: {displayed(event.file)}, of step {event.step}, "
        f"loss {event.loss:.4f}{change}"
    )


def _finished(event: events.Finished) -> Iterable[str]:
    yield f"done: {event.step} steps; all results are in {displayed(event.run)}"


def _relative_change(loss: float, base: float | None, step: int) -> str:
    """Relative difference from the loss of the base model, as a text in parentheses."""
    if base is None or step == 0:
        return ""
    return f" ({100 * (loss / base - 1):+.1f} % against the base model)"
