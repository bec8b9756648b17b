"""What `onewan stop`, `save` and `sample-now` do; torch-free, so that they answer at once."""

from __future__ import annotations

from pathlib import Path

from onewan.runs.control import Request, request
from onewan.runs.layout import RunLayout

_REQUESTS: dict[str, Request] = {"stop": "stop", "save": "save", "sample-now": "sample"}


def send_request(run: Path, command: str) -> int:
    request(RunLayout(run), _REQUESTS[command])
    print(f"{run}: requested; the trainer acts on it after the current step")
    return 0
