"""The progress display of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.cli.output import stdout
from onewan.errors import one_line
from onewan.runs import events
from onewan.runs.layout import displayed

_PLAIN_SECONDS = 15.0
"""Without a terminal, progress is printed at most once in this many seconds."""

_LOSS_SMOOTHING = 0.9
"""Weight of the previous running mean in the new one: it averages about the last ten steps."""


class Progress:
    """Shows a run's events; a context manager. Give its `listen` to the trainer."""

    def __init__(self, *, terminal: bool | None = None) -> None:
        # The bar is written to stderr and lines to stdout, so that piped output has no bar in it.
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self._bar: Any = None  # tqdm's own types say that `total` may be None
        self._activity = ""
        self._steps = 0
        self._losses: dict[str, float] = {}
        self._exported: list[events.Exported] = []
        self._last_line = time.monotonic()
        self._handlers: dict[type[events.Event], Callable[[Any], None]] = {
            events.Started: self._on_started,
            events.Encoding: self._on_encoding,
            events.DataReady: self._on_data_ready,
            events.Resumed: self._on_resumed,
            events.MemoryPlanned: self._on_memory_planned,
            events.AttentionChosen: self._on_attention_chosen,
            events.StepDone: self._on_step_done,
            events.Validated: self._on_validated,
            events.BestSoFar: self._on_best_so_far,
            events.Note: self._on_note,
            events.Warned: self._on_warned,
            events.Saved: self._on_saved,
            events.Exported: self._exported.append,
            events.Sampling: self._on_sampling,
            events.Sampled: self._on_sampled,
            events.Stopped: self._on_stopped,
            events.Finished: self._on_finished,
        }

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def listen(self, event: events.Event) -> None:
        """Show one event; kinds without a handler are ignored."""
        # Exports are collected until another event shows that those of this step are complete.
        if not isinstance(event, events.Exported):
            self._show_exported()
        if handler := self._handlers.get(type(event)):
            handler(event)

    def close(self) -> None:
        # A terminal that was closed is not a reason for the command to fail at its end.
        with contextlib.suppress(OSError):
            self._close_bar()
            self._show_exported()

    def line(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        with stdout() as file:
            tqdm.write(one_line(text), file=file)
            # Without it, a pipe or a file would show lines only by the block.
            file.flush()
        self._last_line = time.monotonic()

    def advance(
        self, activity: str, done: int, total: int, note: str = "", *, unit: str = "step"
    ) -> None:
        """Show that `done` of `total` units of an activity are done."""
        if not self._terminal:
            # Activities of a few seconds get one line, at their end.
            if done == total or time.monotonic() - self._last_line >= _PLAIN_SECONDS:
                self.line(f"{activity} {done}/{total} {note}".rstrip())
            return
        if self._bar is None or self._activity != activity:
            self._close_bar()
            # `initial`, since a resumed run does not begin at 0: tqdm would overestimate its speed.
            self._bar = tqdm(
                total=total, desc=activity, unit=unit, initial=max(0, done - 1), leave=False
            )
            self._activity = activity
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)

    def advance_bytes(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are written."""
        # A full bar means that the file is complete, so the last megabyte waits for its last byte.
        megabytes = -(-total // 1_000_000)
        so_far = megabytes if done == total else min(done // 1_000_000, megabytes - 1)
        self.advance("writing", so_far, megabytes, "" if self._terminal else "MB", unit="MB")

    def _close_bar(self) -> None:
        if self._bar is not None:
            bar, self._bar = self._bar, None
            bar.close()

    # ---------------------------------------------------------------------------------- one event

    def _on_started(self, event: events.Started) -> None:
        self._steps = event.steps
        self.line(f"run {displayed(event.run)}")

    def _on_encoding(self, event: events.Encoding) -> None:
        self.advance(event.what, event.done, event.total, unit="item")

    def _on_data_ready(self, event: events.DataReady) -> None:
        self._close_bar()
        for line in event.report:
            self.line(line)

    def _on_resumed(self, event: events.Resumed) -> None:
        self.line(f"resumed after step {event.step}")

    def _on_memory_planned(self, event: events.MemoryPlanned) -> None:
        self.line(
            f"memory: at most {format_bytes(event.device_peak)} on the device ({event.phase}) and "
            f"{format_bytes(event.host_peak)} in host memory, by the plan"
        )

    def _on_attention_chosen(self, event: events.AttentionChosen) -> None:
        if event.milliseconds:
            times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in event.milliseconds.items())
            self.line(f"attention: {event.backend} ({times})")

    def _on_step_done(self, event: events.StepDone) -> None:
        # A single loss means little, since t and noise differ from step to step: show the mean.
        mean = self._losses.setdefault(event.expert, event.loss)
        self._losses[event.expert] = mean + (1 - _LOSS_SMOOTHING) * (event.loss - mean)
        losses = ", ".join(f"{name} {value:.4f}" for name, value in self._losses.items())
        remaining = (self._steps - event.step) * event.seconds
        note = f"{event.expert} expert, loss {losses}"
        if event.mfu is not None and event.tflops is not None:
            note += f", {event.tflops:.0f} TFLOP/s ({100 * event.mfu:.0f} % of the device's)"
        if not self._terminal:
            note += f", {event.seconds:.2f} s/step, {_duration(remaining)} left"
        self.advance("training", event.step, self._steps, note)

    def _on_validated(self, event: events.Validated) -> None:
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
        self.line(f"step {event.step}: validation on {clips}, {event.expert} expert: {shown}")

    def _on_best_so_far(self, event: events.BestSoFar) -> None:
        self.line(f"step {event.step}: best validation loss so far, {event.loss:.4f}")

    def _on_note(self, event: events.Note) -> None:
        self.line(f"note: {event.text}")

    def _on_warned(self, event: events.Warned) -> None:
        self.line(f"warning: {event.text}")

    def _on_saved(self, event: events.Saved) -> None:
        self.line(f"step {event.step}: state saved: {displayed(event.state)}")

    def _show_exported(self) -> None:
        """Show one line for all files of a step: there is one for each expert and format."""
        if not self._exported:
            return
        paths = [str(displayed(event.file)) for event in self._exported]
        step = self._exported[0].step
        self._exported.clear()
        # By characters, not by folders: the names begin with those of the run and of the step.
        start = os.path.commonprefix(paths)  # noqa: RUF071
        shown = paths[0] if len(paths) == 1 else f"{start}* ({len(paths)} files)"
        self.line(f"step {step}: weights exported: {shown}")

    def _on_sampling(self, event: events.Sampling) -> None:
        self.advance(f"sampling video {event.number}", event.done, event.total)

    def _on_sampled(self, event: events.Sampled) -> None:
        self.line(f"step {event.step}: sample video: {displayed(event.file)}")

    def _on_stopped(self, event: events.Stopped) -> None:
        self._close_bar()
        if event.step:
            self.line(f"stopped; the state of step {event.step} is saved; continue with --resume")
        else:
            self.line("stopped before the first step; encoded data is kept; start it again")

    def _on_finished(self, event: events.Finished) -> None:
        self._close_bar()
        self.line(f"done: {event.step} steps; all results are in {displayed(event.run)}")


def _relative_change(loss: float, base: float | None, step: int) -> str:
    """Relative difference from the loss of the base model, as a text in parentheses."""
    if base is None or step == 0:
        return ""
    return f" ({100 * (loss / base - 1):+.1f} % against the base model)"


def _duration(seconds: float) -> str:
    """`seconds` as h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
