"""Requests to a running trainer: by a file in the run folder, or by a signal.

Hides how requests travel. Never acts on one: the trainer polls between two steps and decides.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Literal

from onewan.errors import OnewanError
from onewan.runs.layout import RunLayout

Request = Literal["stop", "save", "sample"]
"""stop: end the run with its state saved. save: save the state and export the weights now.
sample: generate the sample videos now."""

REQUESTS: tuple[Request, ...] = ("stop", "save", "sample")


def request(layout: RunLayout, name: Request) -> None:
    """Request `name` from the run's trainer; idempotent until the trainer picks it up.

    OnewanError if there is no run folder at `layout.root`.
    """
    if not layout.resolved.is_file():
        what = "is not the folder of a run" if layout.root.is_dir() else "does not exist"
        raise OnewanError(f"{layout.root}: {what}; give a run's folder, such as runs/NAME")
    # An empty file works on shared folders and needs no process, port or permission to signal.
    layout.control_dir.mkdir(exist_ok=True)
    (layout.control_dir / name).touch()


def pending(layout: RunLayout, name: Request) -> bool:
    """Whether `name` was requested and not cleared since."""
    # Not `Path.exists`, which raises for a folder that may not be entered.
    return os.path.lexists(layout.control_dir / name)


def clear(layout: RunLayout, name: Request) -> None:
    """Remove the request. Clear before acting on it, so that one made meanwhile is not lost."""
    (layout.control_dir / name).unlink(missing_ok=True)


def unknown(layout: RunLayout) -> list[str]:
    """Names of files in the folder of requests that are none, ascending; without hidden files."""
    try:
        names = os.listdir(layout.control_dir)
    except OSError:
        return []
    return sorted(name for name in names if name not in REQUESTS and not name.startswith("."))


def take(layout: RunLayout, name: Request) -> bool:
    """Whether `name` was requested; removes the request."""
    requested = pending(layout, name)
    if requested:
        clear(layout, name)
    return requested


# SIGTERM is how schedulers, containers and a shutdown of the machine end a process; SIGHUP is sent
# when the terminal is closed or its connection is lost. SIGBREAK is the signal of both on Windows.
_STOPPING = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
    if hasattr(signal, name)
]


class StopSignals:
    """Context manager: the first signal that asks the process to end (Ctrl-C, SIGTERM, a closed
    terminal) only sets `requested`; a second Ctrl-C raises KeyboardInterrupt.

    A SIGHUP that is ignored (`nohup`) stays ignored. Only the main thread may install signal
    handlers, so in another thread this does nothing.
    """

    def __init__(self) -> None:
        self.requested: bool = False
        self._interrupts = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _STOPPING:
                # A shell that starts a process with `&` ignores SIGINT for it, but `kill -INT` is
                # a request all the same.
                if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler installed outside of Python, which can't be restored here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    # Saving here, in the handler, could store weights of which the optimizer has updated only some.
    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT:
            # A second one interrupts a step that takes minutes, at the cost of its state.
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        self.requested = True
