"""Trainers as processes: starts them so that they outlive whoever started them, and ends them.

Hides sessions, process groups and signals, and how a process is recognized after its number was
given to another one. Never asks a trainer to stop and save: that is `onewan.runs.control`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onewan.errors import OnewanError
from onewan.files import IS_WINDOWS
from onewan.locks import ProcessId, holder_of
from onewan.runs.layout import RunLayout

if TYPE_CHECKING:
    import psutil

MARK = "ONEWAN_STARTED_AS"
"""Environment variable of a trainer that `start` started, and of all that it starts: its mark."""

_END_SECONDS = 5.0
"""For which the end of killed processes is waited for: freeing pinned memory takes moments."""


def trainer_command(arguments: Sequence[str]) -> list[str]:
    """The command line of a trainer with the `arguments` of ``onewan train``."""
    return [sys.executable, "-m", "onewan", "train", *arguments]


def start(arguments: Sequence[str], output: Path, mark: str) -> ProcessId:
    """Start ``onewan train`` with `arguments`, and append what it prints to the file `output`.

    The trainer is in a session and process group of its own, and goes on when this process ends,
    its terminal is closed or its Ctrl-C is pressed. `mark` is a text by which `marked` finds it.
    OSError if it can't be started.
    """
    # Windows: a console of its own, since closing the one of this process would end the trainer.
    flags = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0) | getattr(
        subprocess, "CREATE_NO_WINDOW", 0
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("ab") as file:
        process = subprocess.Popen(
            trainer_command(arguments),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {MARK: mark, "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            creationflags=flags,
        )
    # Asks how it ended as soon as it has, or it would remain as a zombie.
    threading.Thread(target=process.wait, name=f"trainer-{process.pid}", daemon=True).start()
    return ProcessId.of(process.pid)


def marked(mark: str) -> list[psutil.Process]:
    """The living processes that were started with `mark`, or by one that was."""
    import psutil

    return [p for p in psutil.process_iter() if p.pid != os.getpid() and _mark_of(p) == mark]


def trainer_of(layout: RunLayout) -> ProcessId | None:
    """The process that trains the run, or has trained it and was killed; None if none is known."""
    holder = holder_of(layout.lock)
    return None if holder is None else holder.process


def force_stop_run(layout: RunLayout) -> None:
    """End the run's trainer at once, wherever it hangs, without saving anything.

    OnewanError if no trainer of the run is alive, or it is on another host or in another container.
    """
    process = trainer_of(layout)
    if process is None or process.is_alive is False:
        raise OnewanError(f"{layout.root}: is not running, so there is nothing to end")
    if not process.is_here:
        raise OnewanError(
            f"{layout.root}: is trained by process {process.number} on {process.host}, which can't "
            f"be reached from here; run there: onewan stop --force {layout.root}"
        )
    force_stop(process)


def force_stop(process: ProcessId) -> None:
    """End a trainer at once, with its process group and all that it has started.

    Nothing happens if it has ended. It can't prevent that, as it could a request or SIGTERM.
    OnewanError if it belongs to another user, or the system can't end it.
    """
    import psutil

    found = process.find()
    if found is None:
        return
    if found.pid == os.getpid():
        raise OnewanError(f"process {found.pid}: trains in this program and can't be ended by it")
    try:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.suspend()  # so that it starts nothing any more that could be missed
        doomed = set(_belonging_to(found))
        known = [ProcessId.of(one.pid) for one in doomed]
        if not IS_WINDOWS and _leads_its_group(found):
            with contextlib.suppress(OSError):  # macOS refuses it for a group with a zombie
                os.killpg(found.pid, signal.SIGKILL)
        for one in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    except psutil.AccessDenied:
        raise OnewanError(
            f"process {found.pid}: belongs to another user ({_owner(found)}); let them end it"
        ) from None
    # Not psutil's own wait: it would take the exit status of a child from whoever waits for that.
    end = time.monotonic() + _END_SECONDS
    while (still := [one.number for one in known if one.is_alive]) and time.monotonic() < end:
        time.sleep(0.02)
    if still:
        raise OnewanError(
            f"process {', '.join(map(str, still))}: was killed, but the system has not ended it "
            "yet; it waits for a driver or a disk, and if that never answers only a restart of the "
            "machine helps"
        )


def _belonging_to(trainer: psutil.Process) -> Iterator[psutil.Process]:
    """The trainer and all that it has started, also what has left its process group."""
    import psutil

    yield trainer
    with contextlib.suppress(psutil.NoSuchProcess):
        yield from trainer.children(recursive=True)
    # A process whose parent has ended is nobody's child any more.
    if (mark := _mark_of(trainer)) is not None:
        yield from marked(mark)


def _leads_its_group(trainer: psutil.Process) -> bool:
    """Whether the trainer's group is its own, and not that of a script that runs it."""
    with contextlib.suppress(OSError):
        return os.getpgid(trainer.pid) == trainer.pid != os.getpgrp()
    return False


def _mark_of(process: psutil.Process) -> str | None:
    import psutil

    with contextlib.suppress(psutil.Error, OSError):  # of another user, or it has ended
        return process.environ().get(MARK)
    return None


def _owner(process: psutil.Process) -> str:
    import psutil

    with contextlib.suppress(psutil.Error):
        return process.username()
    return "unknown"
