"""What was found out about files, remembered from one start to the next in a file of JSON lines.

Without it each start would read the whole data set again.
"""

from __future__ import annotations

import json
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

from onewan.files import append_lines, replacing


class FileState(NamedTuple):
    """What shows that a file has changed."""

    size: int
    """Bytes."""
    modified: int
    """Modification time, ns."""

    @staticmethod
    def of(path: Path) -> FileState:
        stat = path.stat()
        return FileState(stat.st_size, stat.st_mtime_ns)


class FileMemory:
    """A JSON value for each of many files, valid as long as the file's size and time are the same.

    One JSON array per line: path, size, modification time in ns, value; of several lines for a
    path, the last is valid. Processes only append, so none overwrites what another one has found. A
    damaged line, such as the last one after a crash, only means that one value is found out again.
    """

    def __init__(self, file: Path | None) -> None:
        """None for `file` remembers values for this process alone."""
        self._file = file
        self._known: dict[str, tuple[FileState, Any]] = {}
        self._new_lines: list[str] = []
        self._read = 0
        """Bytes of the file that were read."""
        self._reading = threading.Lock()
        self.refresh()

    def refresh(self) -> None:
        """Take in what other processes have saved since the file was read. Any thread may."""
        if self._file is None:
            return
        with self._reading, suppress(OSError), self._file.open("rb") as file:
            file.seek(self._read)
            lines = file.read()
            # The end of the last line may be missing yet.
            lines = lines[: lines.rfind(b"\n") + 1]
            self._read += len(lines)
            for line in lines.decode("utf-8", errors="replace").split("\n"):
                if record := _record(line):
                    path, state, value = record
                    self._known[path] = (state, value)

    def get(self, path: Path, state: FileState) -> Any:
        """The value of a file; None if there is none, or one of another state."""
        before, value = self._known.get(str(path), (None, None))
        return value if before == state else None

    def set(self, path: Path, state: FileState, value: object) -> None:
        """Remember a JSON value of a file that has this state."""
        line = json.dumps([str(path), *state, value])
        before = self._known.get(str(path))
        if before is None or json.dumps([str(path), *before[0], before[1]]) != line:
            self._known[str(path)] = (state, value)
            self._new_lines.append(line)

    def save(self) -> None:
        """Append the values that were found since the file was read."""
        if self._new_lines and self._file is not None:
            append_lines(self._file, self._new_lines)
        self._new_lines.clear()


def _record(line: str) -> tuple[str, FileState, object] | None:
    """One line of the file; None if it is empty or damaged."""
    try:
        path, size, modified, value = cast("tuple[str, int, int, object]", json.loads(line))
        return str(path), FileState(int(size), int(modified)), value
    except (ValueError, TypeError):
        return None


def forget_vanished(file: Path, folder: Path = Path()) -> None:
    """Take the lines of files that do not exist any more, and all but the last of each other one,
    out of a file of `FileMemory`, or one whose lines begin with a path in the same way. Paths that
    are not absolute are those of files in `folder`.

    What another process appends at the same time may be lost, and is found out again.
    """
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return
    kept = dict[str, str]()
    for line in lines:
        with suppress(ValueError, TypeError, KeyError, IndexError):
            path = str(json.loads(line)[0])
            kept.pop(path, None)
            kept[path] = line
    kept = {path: line for path, line in kept.items() if os.path.lexists(folder / path)}
    with replacing(file) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in kept.values()), encoding="utf-8")
