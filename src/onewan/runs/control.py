"""Asking a running trainer for something: by a file in the run folder, or by a signal.

Hides how requests travel. Never acts on one: the trainer looks between two steps and decides.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Literal

from onewan.errors import OnewanError
from onewan.runs.layout import RunLayout

Request = Literal["stop", "save", "sample"]
"""End the run with its state saved; save now and go on; make the sample videos now and go on."""


def request(layout: RunLayout, name: Request) -> None:
    """Asks the run for `name`; asking again before it is heard changes nothing."""
    try:
        layout.control_dir.mkdir(exist_ok=True)
    except FileNotFoundError:
        raise OnewanError(f"{layout.root}: there is no such run; name a run's folder") from None
    (layout.control_dir / name).touch()


def pending(layout: RunLayout, name: Request) -> bool:
    """Whether `name` has been asked for and not cleared since."""
    return (layout.control_dir / name).exists()


def clear(layout: RunLayout, name: Request) -> None:
    """Takes the request back. Clear before acting, so that one made meanwhile is not lost."""
    (layout.control_dir / name).unlink(missing_ok=True)


class StopSignals:
    """While entered, the first Ctrl-C or SIGTERM only sets `requested`; a second Ctrl-C interrupts.

    Python lets the main thread alone set handlers, so in another thread this does nothing.
    """

    def __init__(self) -> None:
        self.requested: bool = False
        self.name: str | None = None
        """The signal that came first: SIGINT or SIGTERM."""
        self._interrupts = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            # None is a handler that was not set from Python, and can't be set again from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        self.requested = True
        self.name = self.name or signal.Signals(number).name
