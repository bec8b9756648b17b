"""What happened in a run, as one JSON object a line: the trainer appends, anyone may follow.

Hides the form of the file and what a crash can do to it: each line is valid JSON and pure ASCII,
and a line that was cut short is skipped by readers and never glued to the next. Never interprets
an event.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import Any, cast


class EventLog:
    """Appends events to a file. Threads may share one; each event is on disk when `write` returns.

    On disk means handed to the operating system: it survives the end of this process, though not
    of the machine.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._file = path.open("a+b")
        if self._file.seek(0, os.SEEK_END):
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")
                self._file.flush()

    def write(self, event: str, /, **fields: object) -> None:
        """Appends `event` with the time of now and `fields`."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"event": event, "time": now.replace("+00:00", "Z")}
        if twice := line.keys() & fields.keys():
            raise TypeError(f"event {event!r}: field {min(twice)!r} is given by the log itself")
        line.update((name, _plain(value, name)) for name, value in fields.items())
        text = json.dumps(line, allow_nan=False) + "\n"
        with self._lock:
            self._file.write(text.encode("ascii"))
            self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events in the file so far, but not a last line that is still being written."""
    return iter(_read_from(path, 0)[0])


def follow(path: Path, stop: threading.Event, *, poll: float = 0.5) -> Iterator[dict[str, Any]]:
    """The events in the file, then each new one, until `stop` is set; waits for the file itself.

    Looks every `poll` seconds. What was written before `stop` was set is still yielded. A file that
    has become shorter is a new one (`train --again`) and is read from its start.
    """
    position = 0
    while True:
        stopping = stop.is_set()  # asked before reading, so that nothing written by then is lost
        events, position = _read_from(path, position)
        yield from events
        if stopping:
            return
        stop.wait(poll)


def _read_from(path: Path, position: int) -> tuple[list[dict[str, Any]], int]:
    """The events in the whole lines behind `position`, and the position behind these lines."""
    try:
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < position:
                position = 0
            file.seek(position)
            lines, _, _ = file.read().rpartition(b"\n")
    except FileNotFoundError:
        return [], 0
    if not lines:
        return [], position
    events = (_parsed(line) for line in lines.split(b"\n"))
    return [event for event in events if event is not None], position + len(lines) + 1


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The event in a line; None if it is empty or was cut short by a crash."""
    try:
        event: Any = json.loads(line)
    except ValueError:
        return None
    return cast("dict[str, Any]", event) if isinstance(event, dict) else None


def _plain(value: object, name: str) -> Any:
    """`value` in the types of JSON. Numbers that are not finite become null: JSON has none."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):  # NumPy's numbers are among these
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        fields = cast("Mapping[object, object]", value)
        return {str(key): _plain(item, f"{name}.{key}") for key, item in fields.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, name) for item in cast("Sequence[object]", value)]
    raise TypeError(f"event field {name!r}: {type(value).__name__} has no form in JSON")
