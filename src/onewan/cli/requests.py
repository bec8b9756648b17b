"""The commands stop, save, export, sample-now and set; they import no torch, so that they start
quickly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onewan.cli.output import say
from onewan.config.changes import in_force
from onewan.config.load import load_run, settings_given, with_one_sample
from onewan.documents import format_value
from onewan.errors import OnewanError
from onewan.runs.control import Request, order, request
from onewan.runs.event_file import last_event
from onewan.runs.layout import RunLayout
from onewan.runs.processes import force_stop_run
from onewan.runs.status import find_run, read_state, read_status

_REQUESTS: dict[str, Request] = {
    "stop": "stop",
    "save": "save",
    "export": "export",
    "sample-now": "sample",
}


def send_request(run: Path, command: str) -> int:
    """Request `command` from the trainer of the run `run`, its folder or its name.

    OnewanError if there is no such run, or its trainer has ended.
    """
    layout, reason = running(run)
    request(layout, _REQUESTS[command])
    _confirm(layout, f"{command} requested", reason)
    return 0


def order_sample(run: Path, wanted: Mapping[str, Any]) -> int:
    """Order a video of a prompt from the trainer of `run`; `wanted` as in `with_one_sample`, with
    paths relative to the current folder. OnewanError as of `send_request`, and for what the run
    can't sample."""
    layout, reason = running(run)
    content = {
        name: str(value.absolute()) if isinstance(value, Path) else value
        for name, value in wanted.items()
    }
    config = load_run(layout.root)
    with_one_sample(in_force(config, read_status(layout.root).step), content)
    order(layout, "sample", content)
    _confirm(layout, "a sample video is requested", reason)
    return 0


def order_settings(run: Path, changes: Sequence[str]) -> int:
    """Order the `changes`, such as "optimizer.lr=5e-5", from the trainer of `run`. OnewanError as
    of `send_request`, and for settings that can't change, or not to that value."""
    layout, reason = running(run)
    settings = settings_given(load_run(layout.root), read_status(layout.root).step, changes)
    if not settings:
        say(f"{layout.root}: has these settings already, so nothing is changed")
        return 0
    order(layout, "settings", settings)
    values = ", ".join(f"{name} = {format_value(value)}" for name, value in settings.items())
    _confirm(layout, f"requested: {values}", reason)
    return 0


def is_running(run: Path) -> bool:
    """Whether a trainer of the run, its folder or its name, runs. OnewanError if there is none."""
    return read_state(RunLayout(find_run(run)))[0] in ("running", "silent")


def running(run: Path) -> tuple[RunLayout, str]:
    """(a run whose trainer runs, by its folder or its name; what speaks against that it does, empty
    if nothing does). OnewanError, with the remedy, for others."""
    folder = find_run(run)
    layout = RunLayout(folder)
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
    return layout, reason


def _confirm(layout: RunLayout, what: str, reason: str) -> None:
    say(f"{layout.root}: {what}; the trainer acts on it after the current step")
    # Not an error: the process may be suspended, or on a machine whose clock differs.
    if reason:
        say(f"note: {reason}")


def force_stop(run: Path) -> int:
    """End the trainer of the run `run`, its folder or its name, at once and without saving.

    OnewanError if there is no such run, or its trainer has ended or is on another host.
    """
    folder = find_run(run)
    layout = RunLayout(folder)
    force_stop_run(layout)
    say(f"{folder}: its process was ended; nothing was saved")
    if saved := layout.saved_steps():
        say(f"continue from step {saved[-1]:,} with: onewan train {folder} --resume")
    return 0
