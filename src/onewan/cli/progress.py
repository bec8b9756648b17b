"""The progress display of a command: a bar on a terminal, plain lines elsewhere, and JSON
lines for a program that asks for them."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.cli.output import stdout
from onewan.cli.progress_lines import ProgressLines
from onewan.errors import one_line
from onewan.runs import events
from onewan.runs.event_lines import EventLines

_PLAIN_SECONDS = 15.0
"""Without a terminal, progress is printed at most once in this many seconds."""

_ENDS_OF_ACTIVITIES = (events.DataReady, events.Stopped, events.Finished)
"""Events after which the bar of the activity before them is not continued."""

_TRAINING = "training"
_STEPS_BAR = "{desc} {n_fmt}/{total_fmt} |{bar:10}| {percentage:.0f}%{postfix}"
"""tqdm's own estimate of the time left knows neither the experts nor what is due between steps."""

_LOSS_SMOOTHING = 0.9
"""Weight of the previous running mean in the new one: it averages about the last ten steps."""


class Progress:
    """Shows a run's events; a context manager. Give its `listen` to the trainer."""

    def __init__(self, *, terminal: bool | None = None) -> None:
        # The bar is written to stderr and lines to stdout, so that piped output has no bar in it.
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self._for_program = ProgressLines()
        self._bar: Any = None  # tqdm's own types say that `total` may be None
        self._activity = ""
        self._steps = 0
        self._plan: events.MemoryPlanned | None = None
        self._losses: dict[str, float] = {}
        self._lines = EventLines()
        self._last_line = time.monotonic()
        self._handlers: dict[type[events.Event], Callable[[Any], None]] = {
            events.DataReady: self._on_data_ready,
            events.MemoryPlanned: self._on_memory_planned,
            events.Encoding: self._on_encoding,
            events.StepDone: self._on_step_done,
            events.Sampling: self._on_sampling,
        }

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def listen(self, event: events.Event) -> None:
        """Show one event. That a run failed is reported as the error that leaves the trainer."""
        if isinstance(event, _ENDS_OF_ACTIVITIES):
            self._close_bar()
        failed = isinstance(event, events.Failed)
        self._show(self._lines.rest() if failed else self._lines.of(event))
        if handler := self._handlers.get(type(event)):
            handler(event)

    def close(self) -> None:
        # A terminal that was closed is not a reason for the command to fail at its end.
        with contextlib.suppress(OSError):
            self._close_bar()
            self._show(self._lines.rest())

    def _show(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.line(line)

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
        if self._for_program.wanted:
            self._for_program.write(activity, done, total, unit=unit, note=note)
            return
        if not self._terminal:
            # Activities of a few seconds get one line, at their end.
            if done == total or time.monotonic() - self._last_line >= _PLAIN_SECONDS:
                self.line(f"{activity} {done}/{total} {note}".rstrip())
            return
        if self._bar is None or self._activity != activity:
            self._close_bar()
            # `initial`, since a resumed run does not begin at 0: tqdm would overestimate its speed.
            self._bar = tqdm(
                total=total,
                desc=activity,
                unit=unit,
                initial=max(0, done - 1),
                leave=False,
                bar_format=_STEPS_BAR if activity == _TRAINING else None,
            )
            self._activity = activity
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)

    def advance_bytes(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are written."""
        # A full bar means that the file is complete, so the last megabyte waits for its last byte.
        megabytes = -(-total // 1_000_000)
        so_far = megabytes if done == total else min(done // 1_000_000, megabytes - 1)
        note = "" if self._terminal or self._for_program.wanted else "MB"
        self.advance("writing", so_far, megabytes, note, unit="MB")

    def _close_bar(self) -> None:
        if self._bar is not None:
            bar, self._bar = self._bar, None
            bar.close()

    # ---------------------------------------------------------------------------------- one event

    def _on_data_ready(self, event: events.DataReady) -> None:
        self._steps = event.steps

    def _on_memory_planned(self, event: events.MemoryPlanned) -> None:
        self._plan = event

    def _on_encoding(self, event: events.Encoding) -> None:
        self.advance(event.what, event.done, event.total, unit="item")

    def _on_step_done(self, event: events.StepDone) -> None:
        # A single loss means little, since t and noise differ from step to step: show the mean.
        mean = self._losses.setdefault(event.expert, event.loss)
        self._losses[event.expert] = mean + (1 - _LOSS_SMOOTHING) * (event.loss - mean)
        left = event.seconds_left
        if left is None:
            left = (self._steps - event.step) * event.seconds
        self.advance(
            _TRAINING,
            event.step,
            self._steps,
            self._short_note(event, left) if self._terminal else self._note(event, left),
        )

    def _note(self, event: events.StepDone, left: float) -> str:
        """What a line says of a step."""
        losses = ", ".join(f"{name} {value:.4f}" for name, value in self._losses.items())
        note = f"{event.expert} expert, mean loss {losses}"
        if event.step_memory_peak is not None:
            # The peak of this step, which is what has to fit.
            note += f", {format_bytes(event.step_memory_peak)}"
            if self._plan is not None:
                note += (
                    f" of {format_bytes(self._plan.device_memory)} of device memory "
                    f"(by the plan at most {format_bytes(self._plan.device_peak)})"
                )
            else:
                note += " of device memory"
        if event.mfu is not None and event.tflops is not None:
            note += f", {event.tflops:.0f} TFLOP/s ({100 * event.mfu:.0f} % of the device's)"
        return f"{note}, {event.seconds:.2f} s/step, {_duration(left)} left"

    def _short_note(self, event: events.StepDone, left: float) -> str:
        """The same beside a bar, whose end is cut off on a narrow terminal."""
        losses = [
            f"{'*' if name == event.expert else ''}{name} {value:.4f}"
            for name, value in self._losses.items()
        ]
        parts = [
            f"{_duration(left)} left",
            f"loss {' '.join(losses)}",
            f"{event.seconds:.3g} s/step",
        ]
        if event.step_memory_peak is not None:
            memory = f"{event.step_memory_peak / 1e9:.1f}"
            if self._plan is not None:
                memory += f" of {self._plan.device_memory / 1e9:.1f}"
            parts.append(f"{memory} GB")
        if event.mfu is not None and event.tflops is not None:
            parts.append(f"{event.tflops:.0f} TFLOP/s, {100 * event.mfu:.0f} %")
        return " | ".join(parts)

    def _on_sampling(self, event: events.Sampling) -> None:
        self.advance(f"sampling video {event.number}", event.done, event.total)


def _duration(seconds: float) -> str:
    """`seconds` as h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
