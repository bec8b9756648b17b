"""The commands stop, save and sample-now; they import no torch, so that they start quickly."""

from __future__ import annotations

from pathlib import Path

from onewan.cli.output import say
from onewan.errors import OnewanError
from onewan.runs.control import Request, request
from onewan.runs.event_file import last_event
from onewan.runs.layout import RunLayout
from onewan.runs.processes import force_stop_run
from onewan.runs.status import find_run, read_state

_REQUESTS: dict[str, Request] = {"stop": "stop", "save": "save", "sample-now": "sample"}


def send_request(run: Path, command: str) -> int:
    """Request `command` from the trainer of the run `run`, its folder or its name.

    OnewanError if there is no such run, or its trainer has ended.
    """
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
    request(layout, _REQUESTS[command])
    say(f"{folder}: {command} requested; the trainer acts on it after the current step")
    # Not an error: the process may be suspended, or on a machine whose clock differs.
    if reason:
        say(f"note: {reason}")
    return 0


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
