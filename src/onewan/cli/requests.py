"""The commands stop, save, export, sample-now and set; they import no torch, so that they start
quickly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onewan.cli.output import say
from onewan.runs import steering
from onewan.runs.control import Request
from onewan.runs.layout import RunLayout
from onewan.runs.processes import force_stop_run
from onewan.runs.status import find_run


def send_request(run: Path, name: Request) -> int:
    """Send a request to the trainer of the run `run`, its folder or its name.

    OnewanError if there is no such run, or its trainer has ended.
    """
    say(steering.ask(RunLayout(find_run(run)), name))
    return 0


def order_sample(run: Path, wanted: Mapping[str, Any]) -> int:
    """Order a video of a prompt from the trainer of `run`. OnewanError as of `send_request`, and
    for what the run can't sample."""
    say(steering.order_sample(RunLayout(find_run(run)), wanted))
    return 0


def order_settings(run: Path, changes: Sequence[str]) -> int:
    """Order the `changes`, such as "optimizer.lr=5e-5", from the trainer of `run`. OnewanError as
    of `send_request`, and for settings that can't change, or not to that value."""
    say(steering.order_settings(RunLayout(find_run(run)), changes))
    return 0


def is_running(run: Path) -> bool:
    """Whether a trainer of the run, its folder or its name, runs. OnewanError if there is none."""
    return steering.is_running(RunLayout(find_run(run)))


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
