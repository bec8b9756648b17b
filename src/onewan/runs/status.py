"""`read_status`: what a run is and where it stands, from its folder alone.

Works with the folders of running, killed and older runs, and with damaged ones, whose problems it
lists. Of a long event file it reads the end only.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, cast

from onewan.arithmetic.durations import format_duration
from onewan.config.load import RESOLVED_LIMITS, load_run
from onewan.config.resolve import expert_schedule_of
from onewan.config.schema import ResolvedRun
from onewan.documents import decode_text, get_path, parse_yaml
from onewan.errors import ConfigError, OnewanError, one_line
from onewan.files import read_input, total_bytes
from onewan.locks import holder_is_alive
from onewan.runs.event_file import Process, last_event, processes, read_backwards, time_of
from onewan.runs.events import (
    ENDS,
    HEARTBEAT_SECONDS,
    DataReady,
    Failed,
    Finished,
    Overview,
    Resumed,
    Started,
    StepDone,
    Stopped,
    Validated,
)
from onewan.runs.layout import RunLayout
from onewan.variants import VARIANTS

RunState = Literal["not started", "running", "silent", "killed", "stopped", "failed", "finished"]
"""silent: nothing says that the run ended, but its process, on another machine, writes nothing any
more. killed: its process ended without a last event."""

MEAN_OF = 10
"""Steps of an expert whose losses are averaged: that of a single step says little."""

_SILENT_HEARTBEATS = 3

_RUNS_SHOWN = 8

_LARGEST = 2.0**63
"""A number in an event that is larger, or no number, is damage, and nothing can be computed from
it."""

_ENDED: Mapping[str, RunState] = {
    Stopped.kind: "stopped",
    Failed.kind: "failed",
    Finished.kind: "finished",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationStatus:
    """The newest validation of an expert."""

    step: int
    loss: float | None
    """None: not finite."""
    base: float | None
    """Loss of the base model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertStatus:
    """How far an expert is."""

    step: int | None
    """Its own steps so far; None if the settings of the run can't be read."""
    steps: int | None
    """Its own steps in all."""
    loss: float | None
    """Mean of its last `MEAN_OF` steps."""
    validation: ValidationStatus | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """What a run is and where it stands."""

    folder: Path
    variant: str | None
    """None, as for the following: not known."""
    method: str | None
    device: str | None
    """The setting `model.device`: "auto", or a device by PyTorch's name."""
    state: RunState
    reason: str
    """Why, in words, where the state alone does not say it: the error of a failed run."""
    step: int
    """Steps done."""
    steps: int | None
    """Step at which the run ends."""
    experts: Mapping[str, ExpertStatus]
    started: datetime | None
    """When its first process started."""
    updated: datetime | None
    """When the newest event was written."""
    seconds: float
    """Time that its processes took, without the pauses between them."""
    seconds_left: float | None
    """Of a run that goes on: the time until its end, as the trainer estimates it."""
    saved_step: int | None
    """Step of the newest saved state."""
    bytes: int
    """Size of the folder."""
    problems: tuple[str, ...] = ()
    """What is missing or damaged in the folder."""

    @property
    def is_active(self) -> bool:
        """Whether its process is alive, as far as can be told."""
        return self.state in ("running", "silent")

    def as_data(self) -> dict[str, Any]:
        """All fields as JSON data, which ``onewan runs --json`` prints."""
        return {
            "run": str(self.folder),
            "variant": self.variant,
            "method": self.method,
            "device": self.device,
            "state": self.state,
            "reason": self.reason,
            "step": self.step,
            "steps": self.steps,
            "experts": {
                name: {
                    "step": expert.step,
                    "steps": expert.steps,
                    "loss": expert.loss,
                    "validation": expert.validation
                    and {
                        "step": expert.validation.step,
                        "loss": expert.validation.loss,
                        "base": expert.validation.base,
                    },
                }
                for name, expert in self.experts.items()
            },
            "started": _text(self.started),
            "updated": _text(self.updated),
            "seconds": self.seconds,
            "seconds_left": self.seconds_left,
            "saved_step": self.saved_step,
            "bytes": self.bytes,
            "problems": list(self.problems),
        }


def is_run(folder: Path) -> bool:
    """Whether `folder` is that of a run, complete or not."""
    layout = RunLayout(folder)
    return layout.resolved.is_file() or layout.events.is_file() or layout.states_dir.is_dir()


def find_runs(folder: Path) -> list[Path]:
    """The folders of runs in `folder`, by name: `folder` itself if it is one, else those directly
    in it, else those in its folder ``runs``."""
    if is_run(folder):
        return [folder]
    for place in (folder, folder / "runs"):
        if place.is_dir():
            found = sorted(path for path in place.iterdir() if path.is_dir() and is_run(path))
            if found:
                return found
    return []


def find_run(given: Path) -> Path:
    """The folder of the run that a user names by its folder, or by its name if it is in ``runs``.

    OnewanError that names the runs there are, if there is no such run.
    """
    for folder in (given, Path("runs") / given):
        if is_run(folder):
            return folder
    what = "is not the folder of a run" if given.is_dir() else "there is no such run"
    near = given if given.is_dir() else given.parent
    names = [str(path) for path in (find_runs(near) or find_runs(Path("runs")))]
    if not names:
        raise OnewanError(f"{given}: {what}; give a run's folder, such as runs/NAME")
    close = names if given.is_dir() else difflib.get_close_matches(str(given), names) or names
    more = f" and {len(names) - _RUNS_SHOWN} more" if len(close) > _RUNS_SHOWN else ""
    raise OnewanError(f"{given}: {what}; there are {', '.join(close[:_RUNS_SHOWN])}{more}")


def read_state(layout: RunLayout, *, now: datetime | None = None) -> tuple[RunState, str]:
    """The state of a run, and its reason in words where there is one."""
    last, history = last_event(layout.events) or {}, processes(layout.events)
    return state_after(layout, history[-1].first if history else {}, last, now=now)


def read_status(folder: Path, *, now: datetime | None = None) -> RunStatus:
    """The status of the run in `folder`. OSError if a file in it can't be read."""
    layout = RunLayout(folder)
    settings = _settings(layout)
    problems = list(settings.problems)
    history = processes(layout.events)
    if layout.events.is_file() and not history:
        problems.append(f"{layout.events.name}: says of no process that it started")
    first, last = history[-1].first if history else {}, last_event(layout.events) or {}
    state, reason = state_after(layout, first, last, now=now)
    saved = max(layout.saved_steps(), default=None)
    step = _step(layout, saved)
    steps = settings.steps
    if steps is None and history:
        steps = _integer(_newest(layout, Started.kind, DataReady.kind), "steps")
    return RunStatus(
        folder=folder,
        variant=settings.variant,
        method=settings.method,
        device=settings.device,
        state=state,
        reason=reason,
        step=step,
        steps=steps,
        experts=_experts(layout, settings, step),
        started=time_of(history[0].first) if history else None,
        updated=time_of(last),
        seconds=sum(map(_seconds, history)),
        seconds_left=_seconds_left(layout, step, steps) if state == "running" else None,
        saved_step=saved,
        bytes=total_bytes(folder),
        problems=tuple(problems),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What is read from a run's resolved settings."""

    config: ResolvedRun | None
    """None: missing, damaged, or of another version."""
    problems: tuple[str, ...] = ()
    """Why `config` is None."""
    variant: str | None = None
    method: str | None = None
    device: str | None = None
    steps: int | None = None


def _settings(layout: RunLayout) -> _Settings:
    try:
        facts = layout.resolved.stat()
    except OSError:
        return _Settings(config=None, problems=(f"{layout.resolved.name}: is missing",))
    # As long as the file is the same: a run that goes on is read again every few seconds.
    return _settings_of_file(layout, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=64)
def _settings_of_file(layout: RunLayout, _changed: int, _size: int) -> _Settings:
    try:
        config = load_run(layout.root)
    except (ConfigError, OSError) as error:
        return _of_another_version(layout, error)
    return _Settings(
        config=config,
        variant=config.model.variant,
        method=config.method.kind,
        device=config.model.device,
        steps=config.train.steps,
    )


def _of_another_version(layout: RunLayout, error: ConfigError | OSError) -> _Settings:
    """What the settings say in any version."""
    first = error.problems[0] if isinstance(error, ConfigError) else str(error)
    name, reason = layout.resolved.name, first.partition(";")[0]
    problems = (one_line(f"{name}: can't be read by this version ({reason})"),)
    try:
        text = decode_text(read_input(layout.resolved, RESOLVED_LIMITS.bytes))
        data = parse_yaml(text, RESOLVED_LIMITS)
    except (OnewanError, OSError, ValueError):
        return _Settings(config=None, problems=problems)

    def text_at(*path: str) -> str | None:
        value = get_path(data, path)
        return value if isinstance(value, str) else None

    steps = get_path(data, ("train", "steps"))
    return _Settings(
        config=None,
        problems=problems,
        variant=text_at("model", "variant"),
        method=text_at("method", "kind"),
        device=text_at("model", "device"),
        steps=steps if isinstance(steps, int) else None,
    )


def state_after(
    layout: RunLayout,
    first: Mapping[str, Any],
    last: Mapping[str, Any],
    *,
    now: datetime | None = None,
) -> tuple[RunState, str]:
    """What `read_state` says, by events that are known: the `first` one of the newest process, and
    the `last` one of all; empty where there is none."""
    kind = last.get("event")
    if kind in ENDS:
        error = str(last.get("error", "")) if kind == Failed.kind else ""
        return _ENDED[kind], one_line(error.partition("\n")[0])
    alive = holder_is_alive(layout.lock)
    if alive is False:
        return "killed", "its process ended without a last event"
    if not last:
        return "running" if alive else "not started", ""
    every, written = _number(first, "heartbeat_seconds") or HEARTBEAT_SECONDS, time_of(last)
    now = now or datetime.now(timezone.utc)
    silent = 0.0 if written is None else (now - written).total_seconds()
    if silent <= _SILENT_HEARTBEATS * every:
        return "running", ""
    age = f"its last event is {format_duration(silent)} old"
    if alive:
        return "running", f"{age}, although its process exists"
    host = one_line(str(first.get("hostname", "its machine")))
    return "silent", f"{age}; its process on {host} may have died"


def _step(layout: RunLayout, saved: int | None) -> int:
    """Steps done by the newest event that says so, or else by the newest saved state."""
    parts = [f'"event": "{kind}"' for kind in (StepDone.kind, Resumed.kind, Started.kind, *ENDS)]
    for _, event in read_backwards(layout.events, *parts):
        if event.get("event") == Started.kind:
            break  # this process has not come so far as to resume the run or to do a step
        if (step := _integer(event, "step")) is not None:
            return step
    return saved or 0


def _experts(layout: RunLayout, settings: _Settings, step: int) -> dict[str, ExpertStatus]:
    totals: dict[str, int | None] = {}
    done: Mapping[str, int] = {}
    if settings.config is not None:
        schedule = expert_schedule_of(settings.config)
        steps = settings.config.train.steps
        totals = {name: schedule.steps_before(steps, name) for name in schedule.experts}
        done = {name: schedule.steps_before(step, name) for name in schedule.experts}
    elif isinstance(given := _newest(layout, Overview.kind).get("steps"), dict):
        counts = cast("dict[str, Any]", given)
        totals = {name: _integer(counts, name) for name in counts if name.isascii()}
    else:
        facts = next((v for v in VARIANTS.values() if v.name == settings.variant), None)
        totals = {} if facts is None else {expert.name: None for expert in facts.experts}
    return {
        name: ExpertStatus(
            step=done.get(name),
            steps=total,
            loss=_loss(layout, name, step),
            validation=_validation(layout, name),
        )
        for name, total in totals.items()
    }


def _loss(layout: RunLayout, expert: str, step: int) -> float | None:
    losses: list[float] = []
    for _, event in read_backwards(layout.events, f'"expert": "{expert}"'):
        # A process that was killed may have gone beyond the state that the run was resumed from.
        beyond = (_integer(event, "step") or 0) > step
        if event.get("event") == StepDone.kind and not beyond:
            if (loss := _number(event, "loss")) is not None:
                losses.append(loss)
            if len(losses) == MEAN_OF:
                break
    return fmean(losses) if losses else None


def _validation(layout: RunLayout, expert: str) -> ValidationStatus | None:
    for _, event in read_backwards(layout.events, f'"event": "{Validated.kind}"'):
        step = _integer(event, "step")
        if event.get("expert") == expert and step is not None:
            loss, base = _number(event, "loss"), _number(event, "base")
            return ValidationStatus(step=step, loss=loss, base=base)
    return None


def _seconds_left(layout: RunLayout, step: int, steps: int | None) -> float | None:
    event = _newest(layout, StepDone.kind)
    if (left := _number(event, "seconds_left")) is not None:
        return left
    seconds = _number(event, "seconds")  # of a version that does not estimate the time
    return None if seconds is None or steps is None else (steps - step) * seconds


def _newest(layout: RunLayout, *kinds: str) -> dict[str, Any]:
    """The newest event of these kinds; empty if there is none."""
    for _, event in read_backwards(layout.events, *(f'"event": "{kind}"' for kind in kinds)):
        if event.get("event") in kinds:
            return event
    return {}


def _seconds(process: Process) -> float:
    first, last = time_of(process.first), time_of(process.last)
    return 0.0 if first is None or last is None else max(0.0, (last - first).total_seconds())


def _text(time: datetime | None) -> str | None:
    """`time` as in the events."""
    if time is None:
        return None
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _integer(event: Mapping[str, Any], name: str) -> int | None:
    value = event.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if abs(value) < _LARGEST else None


def _number(event: Mapping[str, Any], name: str) -> float | None:
    value = event.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if abs(value) < _LARGEST else None  # NaN is not smaller either
