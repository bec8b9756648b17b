"""Requests to a running trainer: by a file in the run folder, or by a signal.

Hides how requests travel. Never acts on one: the trainer polls between two steps and decides.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

from onewan.documents import LIMITS, decode_text, is_mapping, parse_json
from onewan.errors import OnewanError, one_line
from onewan.files import read_input, replacing
from onewan.runs.layout import RunLayout

Request = Literal["stop", "save", "export", "sample"]
"""stop: end the run with its state saved. save: save the state and export the weights now.
export: export the weights now. sample: generate the sample videos now."""

REQUESTS: tuple[Request, ...] = ("stop", "save", "export", "sample")

Order = Literal["sample", "settings"]
"""A request with a content. sample: generate a video of a prompt. settings: change settings."""

_ORDER = re.compile(r"(sample|settings)-[0-9]{20}-[0-9a-f]{8}\.json")
"""Name of an order's file. The time in it, in nanoseconds, gives the sequence."""


def request(layout: RunLayout, name: Request) -> None:
    """Request `name` from the run's trainer; idempotent until the trainer picks it up.

    OnewanError if there is no run folder at `layout.root`.
    """
    # An empty file works on shared folders and needs no process, port or permission to signal.
    (_control_dir(layout) / name).touch()


def order(layout: RunLayout, name: Order, content: Mapping[str, Any]) -> None:
    """Order what `content`, plain JSON data, says from the run's trainer, which follows orders in
    their sequence.

    OnewanError if there is no run folder at `layout.root`, or if the content is too large.
    """
    text = json.dumps(content, ensure_ascii=False)
    if len(text.encode("utf-8", "replace")) > LIMITS.bytes:
        raise OnewanError(f"{name}: has more than {LIMITS.bytes // 1024} KiB; give less text")
    file = f"{name}-{time.time_ns():020d}-{secrets.token_hex(4)}.json"
    with replacing(_control_dir(layout) / file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def take_orders(layout: RunLayout, name: Order) -> Iterator[Mapping[str, Any] | str]:
    """The contents of all orders `name` in their sequence; in place of one that can't be read the
    reason, in a line. The file of each is removed when it is reached; OSError if that fails."""
    for path in _order_files(layout):
        if path.name.startswith(f"{name}-"):
            yield _taken(path)


def drop_orders(layout: RunLayout) -> list[Order]:
    """Remove all orders unread; returns what they were."""
    dropped: list[Order] = []
    for path in _order_files(layout):
        path.unlink(missing_ok=True)
        dropped.append("sample" if path.name.startswith("sample-") else "settings")
    return dropped


def pending(layout: RunLayout, name: Request) -> bool:
    """Whether `name` was requested and not cleared since."""
    # Not `Path.exists`, which raises for a folder that may not be entered.
    return os.path.lexists(layout.control_dir / name)


def clear(layout: RunLayout, name: Request) -> None:
    """Remove the request. Clear before acting on it, so that one made meanwhile is not lost."""
    (layout.control_dir / name).unlink(missing_ok=True)


def unknown(layout: RunLayout) -> list[str]:
    """Names of files in the folder of requests that are none, ascending; without hidden files."""
    return [
        name
        for name in _names(layout)
        if name not in REQUESTS and not name.startswith(".") and not _ORDER.fullmatch(name)
    ]


def take(layout: RunLayout, name: Request) -> bool:
    """Whether `name` was requested; removes the request."""
    requested = pending(layout, name)
    if requested:
        clear(layout, name)
    return requested


def _control_dir(layout: RunLayout) -> Path:
    if not layout.resolved.is_file():
        what = "is not the folder of a run" if layout.root.is_dir() else "does not exist"
        raise OnewanError(f"{layout.root}: {what}; give a run's folder, such as runs/NAME")
    layout.control_dir.mkdir(exist_ok=True)
    return layout.control_dir


def _names(layout: RunLayout) -> list[str]:
    try:
        return sorted(os.listdir(layout.control_dir))
    except OSError:
        return []


def _order_files(layout: RunLayout) -> list[Path]:
    """Files of orders, the oldest first."""
    names = [name for name in _names(layout) if _ORDER.fullmatch(name)]
    return [layout.control_dir / name for name in sorted(names, key=lambda n: n.partition("-")[2])]


def _taken(path: Path) -> Mapping[str, Any] | str:
    try:
        content = parse_json(decode_text(read_input(path, LIMITS.bytes)))
    except (OSError, ValueError) as error:
        content = one_line(f"can't be read ({error})")
    path.unlink(missing_ok=True)
    return content if is_mapping(content) or isinstance(content, str) else "is no JSON object"


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
