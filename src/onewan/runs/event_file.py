"""``events.jsonl``: events as one JSON object a line; the trainer appends, any process may read.

Hides the file's format and what a crash can do to it: each line is valid JSON and pure ASCII, and
a truncated line is skipped by readers and never joined to the next one. Never interprets an event.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from io import FileIO
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from onewan.runs.events import HEARTBEAT_SECONDS, Event, Heartbeat, Started

try:
    # Comes with the page, which reads long files while somebody waits; five times as fast.
    from orjson import loads as _loads
except ImportError:
    from json import loads as _loads

_BLOCK_BYTES = 1 << 18
"""Bytes that are read at once from the end of a file."""
_HEAD_BYTES = 256
"""By which a file is known again."""


class EventFile:
    """Appends events to a file. Thread-safe; an event is on disk when `write` returns.

    On disk means handed to the operating system: it survives the end of this process, though not
    a crash of the machine. After an OSError the file is closed, and the next `write` opens it again
    (and creates it if it was deleted).
    """

    def __init__(self, path: Path) -> None:
        """OSError if the file can't be opened for appending."""
        self._path = path
        # The heartbeat is written by a thread of its own.
        self._lock = threading.Lock()
        self._last_write = time.monotonic()
        # Opened now, so that a run folder without write permission is an error before training.
        self._file: FileIO | None = _open(path)

    def write(self, event: Event) -> None:
        """Append `event` with the current time. OSError if that fails, or if the file was deleted
        or replaced since it was opened."""
        line = _line(event)
        with self._lock:
            if self._file is None:
                self._file = _open(self._path)
            elif not self._is_at_path(self._file):
                self._close()
                raise FileNotFoundError("it was deleted or replaced while the run used it")
            self._append(self._file, line)

    def write_heartbeat(self, seconds: float) -> None:
        """Append a heartbeat if nothing was written for `seconds`.

        Errors are ignored: the next `write` raises them again, and its caller can report them.
        """
        with self._lock, contextlib.suppress(OSError):
            idle = time.monotonic() - self._last_write
            if self._file is not None and idle >= seconds and self._is_at_path(self._file):
                self._append(self._file, _line(Heartbeat()))

    def close(self) -> None:
        with self._lock:
            self._close()

    def __enter__(self) -> EventFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _append(self, file: FileIO, line: bytes) -> None:
        # Unbuffered, so that a line that failed is not written again by a later flush.
        try:
            written = file.write(line)
        except OSError:
            self._close()
            raise
        if written != len(line):
            # Part of the line is in the file; `_open` ends it before the next one.
            self._close()
            raise OSError(f"only {written} of {len(line)} bytes were written")
        self._last_write = time.monotonic()

    def _is_at_path(self, file: FileIO) -> bool:
        """Whether the path still names the open file: writing to a deleted file raises no error."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class HeartbeatThread:
    """Context manager: while entered, a thread writes a heartbeat to `file` whenever nothing else
    was written for `seconds`, so that readers can distinguish a slow run from a dead one."""

    def __init__(self, file: EventFile, seconds: float = HEARTBEAT_SECONDS) -> None:
        self._file = file
        self._seconds = seconds
        self._stop = threading.Event()
        # A daemon, so that it can't keep a process alive that ends without leaving the block.
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def _run(self) -> None:
        # Wakes more often than it writes, so that no gap is much longer than `seconds`.
        while not self._stop.wait(self._seconds / 5):
            self._file.write_heartbeat(self._seconds)

    def __enter__(self) -> HeartbeatThread:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()


def time_of(event: Mapping[str, Any]) -> datetime | None:
    """When an event was written, with its time zone; None if that is not in it."""
    try:
        # Python 3.10 parses no "Z".
        time = datetime.fromisoformat(str(event.get("time")).replace("Z", "+00:00"))
    except ValueError:
        return None
    if not 1970 < time.year < 9999:  # which can't be converted to every time zone
        return None
    return time if time.tzinfo else time.replace(tzinfo=timezone.utc)


class EventTail:
    """Reads an event file that may still grow: each `read` gives the events since the last one.

    The file may be written by another process meanwhile, be deleted, or be replaced by another one,
    which is then read from its start.
    """

    def __init__(
        self,
        path: Path,
        on_damage: Callable[[int], None] = lambda _line: None,
        on_restart: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_damage` is called with the number, from 1, of each line that is no event;
        `on_restart` when what was read before is no longer in the file."""
        self._path = path
        self._on_damage = on_damage
        self._on_restart = on_restart
        self._position = 0
        self._lines = 0
        self._head = b""

    def read(self) -> Iterator[dict[str, Any]]:
        """The events that are new, without a last line that is still being written; one at a time,
        so that a file of any length can be read. Without a file there are none; OSError if it can't
        be read."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            self._start_anew()
            return
        with file:
            # The first line has the time at which the run started, so another run's has another.
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            head = file.read(_HEAD_BYTES)
            if size < self._position or not head.startswith(self._head):
                self._start_anew()
            self._head = head
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                # Before the event is handed out: who stops in between does not get it again.
                self._position += len(line)
                self._lines += 1
                if (event := _parsed(line)) is not None:
                    yield event
                elif line.strip():
                    self._on_damage(self._lines)

    def _start_anew(self) -> None:
        was_read = self._position > 0
        self._position, self._lines, self._head = 0, 0, b""
        if was_read:
            self._on_restart()


def read_events(
    path: Path, on_damage: Callable[[int], None] = lambda _line: None
) -> Iterator[dict[str, Any]]:
    """The events in the file so far, as `EventTail.read` gives them."""
    return EventTail(path, on_damage).read()


def read_backwards(
    path: Path, *parts: str, before: int | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The events in the file so far with the positions of their lines, the newest first; with
    `parts` only those whose line contains one of them, such as ``"expert": "low"``, and with
    `before`, a position, only those of earlier lines.

    Only as much of the file is read as is consumed, and only the lines that are yielded are parsed,
    so that the newest events of a long run are there at once.
    """
    wanted = [part.encode("ascii") for part in parts]
    for start, block in _blocks_backwards(path, before):
        if wanted and not any(part in block for part in wanted):
            continue
        end = start + len(block)
        for line in reversed(block.split(b"\n")):
            position, end = end - len(line), end - len(line) - 1
            if wanted and not any(part in line for part in wanted):
                continue
            if (event := _parsed(line)) is not None:
                yield position, event


def last_event(path: Path) -> dict[str, Any] | None:
    """The newest event in the file; None if there is none. Reads only the end of the file."""
    return next((event for _, event in read_backwards(path)), None)


@dataclass(frozen=True, slots=True)
class Process:
    """The first and the last event of one process that trained a run."""

    first: dict[str, Any]
    last: dict[str, Any]


def processes(path: Path) -> list[Process]:
    """The processes that have trained the run, in their order."""
    found: list[Process] = []
    last = last_event(path)
    for position, event in read_backwards(path, f'"event": "{Started.kind}"'):
        if event.get("event") == Started.kind and last is not None:
            found.append(Process(event, last))
            last = next((event for _, event in read_backwards(path, before=position)), None)
    return found[::-1]


def follow(path: Path, stop: threading.Event, *, poll: float = 0.5) -> Iterator[dict[str, Any]]:
    """The events in the file, then each new one, until `stop` is set; waits for the file itself.

    Looks for new ones every `poll` seconds. All events written before `stop` was set are yielded. A
    file that was replaced is read from its start.
    """
    tail = EventTail(path)
    while True:
        stopping = stop.is_set()  # checked before reading: nothing written by then is missed
        yield from tail.read()
        if stopping:
            return
        stop.wait(poll)


def _blocks_backwards(path: Path, end: int | None) -> Iterator[tuple[int, bytes]]:
    """The complete lines before the position `end` (None: the file's end) in blocks, the newest
    first, each with its position and without its last line break."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        start = file.seek(0, os.SEEK_END) if end is None else end
        ended = False  # whether the line break after the newest complete line was found
        rest = b""  # the end of a line that begins in an earlier block
        while start > 0:
            stop, start = start, max(0, start - _BLOCK_BYTES)
            file.seek(start)
            data = file.read(stop - start) + rest
            if not ended:
                data, line_break, _ = data.rpartition(b"\n")
                ended = bool(line_break)
            rest = data
            if ended and start == 0:
                yield 0, data
            elif ended and (first := data.find(b"\n")) >= 0:
                rest = data[:first]
                yield start + first + 1, data[first + 1 :]


def _open(path: Path) -> FileIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = FileIO(path, "a+")
    # A line that a crash truncated is ended, so that the next one does not become part of it.
    # (seek returns the position, so an empty file needs no newline.)
    if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file


def _line(event: Event) -> bytes:
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    line: dict[str, Any] = {"event": event.kind, "time": now.replace("+00:00", "Z")}
    line.update((name, _json_value(value, name)) for name, value in event.fields().items())
    # ASCII, so that a truncated line can't end within a character.
    return (json.dumps(line, allow_nan=False) + "\n").encode("ascii")


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The event in a line; None if the line is empty or was truncated by a crash."""
    event: Any = None
    try:
        event = _loads(line)
    except ValueError:
        # Python's own takes NaN too, which some programs write.
        with contextlib.suppress(ValueError):
            event = json.loads(line)
    return cast("dict[str, Any]", event) if isinstance(event, dict) else None


def _json_value(value: object, name: str) -> Any:
    """`value` in the types of JSON; NaN and infinities, which JSON does not have, become null."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):  # includes NumPy's scalars
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value)
        return {str(key): _json_value(item, f"{name}.{key}") for key, item in items.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item, name) for item in cast("Sequence[object]", value)]
    raise TypeError(f"event field {name!r}: {type(value).__name__} can't be written as JSON")
