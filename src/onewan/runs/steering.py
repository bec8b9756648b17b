"""Steers the trainer of a run from another process, with what is asked checked before it is sent.

What is asked of a trainer returns the line that tells the user what happens, and raises OnewanError
if the run is not trained, or if its settings do not allow it. `Standing` is about runs that ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from onewan.arithmetic.durations import format_duration
from onewan.config.changes import in_force
from onewan.config.continuing import continuation
from onewan.config.load import load_run, settings_given, with_one_sample
from onewan.config.schema import ResolvedRun
from onewan.documents import format_value
from onewan.errors import OnewanError
from onewan.runs.control import Request, order, request
from onewan.runs.event_file import last_event, read_backwards
from onewan.runs.events import StepDone
from onewan.runs.layout import RunLayout, displayed
from onewan.runs.status import read_state, read_status

_COMMANDS: Mapping[Request, str] = {"sample": "sample-now"}
"""Names of the commands, where they are not those of the requests."""
_ALLOW_CHANGE = "--allow-change"
_TYPICAL_OF = 40
"""Newest steps whose typical time is that of a step."""


def is_running(layout: RunLayout) -> bool:
    """Whether a trainer of the run runs, as far as can be told."""
    return read_state(layout)[0] in ("running", "silent")


def ask(layout: RunLayout, name: Request) -> str:
    """Send a request without a content."""
    reason = _check_running(layout)
    request(layout, name)
    return _told(layout, f"{_COMMANDS.get(name, name)} requested", reason)


def order_sample(layout: RunLayout, wanted: Mapping[str, Any]) -> str:
    """Order a video of a prompt; `wanted` as of `with_one_sample`, with paths relative to the
    current folder."""
    reason = _check_running(layout)
    content = {
        name: str(value.absolute()) if isinstance(value, Path) else value
        for name, value in wanted.items()
    }
    with_one_sample(present_settings(layout), content)
    order(layout, "sample", content)
    return _told(layout, "a sample video is requested", reason)


def order_settings(layout: RunLayout, changes: Sequence[str]) -> str:
    """Order changes of settings, such as "optimizer.lr=5e-5"."""
    reason = _check_running(layout)
    settings = settings_given(load_run(layout.root), read_status(layout.root).step, changes)
    if not settings:
        return f"{displayed(layout.root)}: has these settings already, so nothing is changed"
    order(layout, "settings", settings)
    values = ", ".join(f"{name} = {format_value(value)}" for name, value in settings.items())
    return _told(layout, f"requested: {values}", reason)


def present_settings(layout: RunLayout) -> ResolvedRun:
    """The settings that are in force at the run's present step. ConfigError if the run's settings
    can't be read."""
    return in_force(load_run(layout.root), read_status(layout.root).step)


def typical_step_seconds(layout: RunLayout) -> float | None:
    """What a step takes, by the newest ones; None if there was none."""
    seconds: list[float] = []
    for _, event in read_backwards(layout.events, f'"event": "{StepDone.kind}"'):
        if isinstance(value := event.get("seconds"), int | float):
            seconds.append(float(value))
        if len(seconds) == _TYPICAL_OF:
            break
    return median(seconds) if seconds else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """From where an ended run goes on, and what that means."""

    config: ResolvedRun
    done: int
    """Step of its newest saved state; 0 if it has none, and begins anew."""
    step_seconds: float | None
    """What a step takes, by the newest ones; None if there was none."""

    @classmethod
    def of(cls, layout: RunLayout) -> Standing:
        """ConfigError if the run's settings can't be read."""
        return cls(
            config=load_run(layout.root),
            done=max(layout.saved_steps(), default=0),
            step_seconds=typical_step_seconds(layout),
        )

    @property
    def proposed(self) -> int:
        """The step that it was made for, or twice as many if these are done."""
        steps = self.config.train.steps
        return steps if self.done < steps else 2 * steps

    def arguments(
        self, steps: int, *, changed: bool = False
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Options and settings for ``onewan train``, to continue to `steps` steps; if `changed`,
        also where clips or captions have changed meanwhile. OnewanError if so many are done."""
        if steps == self.config.train.steps and steps > self.done:
            options, overrides = ("--resume=auto",), ()
        else:
            found = continuation(self.config, self.done, steps)
            options = found.options if self.done else ("--resume=auto",)
            overrides = found.overrides
        allowed = (_ALLOW_CHANGE,) if changed and _ALLOW_CHANGE not in options else ()
        return (*options, *allowed), overrides

    def words(self, steps: int) -> list[str]:
        """What it means to continue to `steps` steps, in sentences. OnewanError as of
        `arguments`."""
        found = continuation(self.config, self.done, steps)
        left = steps - self.done
        lines = [
            f"It resumes from the state of step {self.done:,}."
            if self.done
            else "It begins at step 0, since no state was saved."
        ]
        remaining = f"Steps that are left: {left:,}"
        if self.step_seconds is not None:
            remaining += (
                f", about {format_duration(left * self.step_seconds)} at "
                f"{format_duration(self.step_seconds)} a step, besides samples and validations"
            )
        lines.append(f"{remaining}.")
        if steps == self.config.train.steps or not self.done:
            return [*lines, "The result is exactly that of a run without a break."]
        if not found.inexact:
            return [*lines, f"The result is exactly that of a run of {steps:,} steps."]
        return [*lines, f"It is not exactly a run of {steps:,} steps.", *found.inexact]


def _check_running(layout: RunLayout) -> str:
    """What speaks against that the trainer runs, where it does; empty if nothing does."""
    folder = displayed(layout.root)
    state, reason = read_state(layout)
    if state == "not started":
        raise OnewanError(f"{folder}: is not running; start it with: onewan train {folder}")
    if state not in ("running", "silent"):
        event = last_event(layout.events) or {}
        killed = "its process was killed; " if state == "killed" else ""
        go_on = "repeat it as a new one" if state == "finished" else "continue it"
        option = "--again" if state == "finished" else "--resume"
        raise OnewanError(
            f"{folder}: is not running ({killed}last event: {event.get('event')}, "
            f"{event.get('time')}); {go_on} with: onewan train {folder} {option}"
        )
    return reason


def _told(layout: RunLayout, what: str, reason: str) -> str:
    line = f"{displayed(layout.root)}: {what}; the trainer acts on it after the current step"
    # Not an error: the process may be suspended, or on a machine whose clock differs.
    return f"{line} (note: {reason})" if reason else line
