"""The commands stop, save and sample-now; they import no torch, so that they start quickly."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

from onewan.cli.output import say
from onewan.errors import OnewanError
from onewan.runs.control import Request, request
from onewan.runs.event_file import last_event
from onewan.runs.events import ENDS, HEARTBEAT_SECONDS
from onewan.runs.layout import RunLayout

_REQUESTS: dict[str, Request] = {"stop": "stop", "save": "save", "sample-now": "sample"}

_SILENT_SECONDS = 3 * HEARTBEAT_SECONDS
"""A trainer that has written no event for so many seconds has probably died."""


def send_request(run: Path, command: str) -> int:
    """Request `command` from the trainer of the run in folder `run`.

    OnewanError if `run` is not the folder of a run, or its trainer has ended.
    """
    layout = RunLayout(run)
    # By the last event, not by the process id: the trainer may run on another machine.
    event = last_event(layout.events)
    if event is not None and event["event"] in ENDS:
        raise OnewanError(
            f"{run}: is not running (last event: {event['event']}, {event['time']}); "
            f"continue it with: onewan train {run} --resume"
        )
    request(layout, _REQUESTS[command])
    say(f"{run}: {command} requested; the trainer acts on it after the current step")
    if event is not None:
        # Python 3.10 parses no "Z".
        written = datetime.fromisoformat(event["time"].replace("Z", "+00:00"))
        silent = (datetime.now(timezone.utc) - written).total_seconds()
        if silent > _SILENT_SECONDS:
            # Not an error: the process may be suspended, or on a machine whose clock differs.
            say(f"note: its last event is {silent / 60:.0f} minutes old; the trainer may have died")
    return 0
