"""What media files contain (`onewan.media.probe`), remembered from one start to the next."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from onewan.data.file_memory import FileMemory, FileState
from onewan.errors import DataError
from onewan.media import PROBE_VERSION, MediaInfo, probe

_THREADS = min(8, 2 * (os.cpu_count() or 1))
"""More than cores, since a thread waits for the disk or the network for some of its time."""

_MEDIA_INFO = TypeAdapter(MediaInfo)


class MediaProbes:
    """Probes media files, each once as long as its size and modification time are the same.

    A value of another `PROBE_VERSION`, or with other fields than `MediaInfo` has now, is not used.
    Files that can't be used are probed again at each start, since the reason may be a passing one.
    """

    def __init__(self, file: Path | None = None, *, verify: bool = False) -> None:
        """`file` is where values are remembered; None for this process alone. With `verify`, every
        file is probed once, whatever its size and time are."""
        self._memory = FileMemory(file)
        self._verify = verify
        self._found: dict[Path, tuple[FileState, MediaInfo | DataError]] = {}

    def of(self, path: Path) -> MediaInfo:
        """What the file contains; DataError, which names it, if it can't be used."""
        found = self._known(path)
        if found is None:
            found = self._probe(path)
        if isinstance(found, DataError):
            # A new one, since each `raise` adds to the traceback of its error.
            raise DataError(found.message, found.details) from found
        return found

    def prepare(self, paths: Iterable[Path]) -> None:
        """Probe those of the files that are not known yet, several at a time."""
        new = [path for path in dict.fromkeys(paths) if self._known(path) is None]
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="onewan-probe") as pool:
            try:
                list(pool.map(self._probe, new))
            except BaseException:  # Ctrl-C, which must not wait for thousands of files
                pool.shutdown(cancel_futures=True)
                raise

    def save(self) -> None:
        """Remember what was found for the next start."""
        self._memory.save()

    def _known(self, path: Path) -> MediaInfo | DataError | None:
        state = _state(path)
        if path in self._found:
            before, found = self._found[path]
            return found if before == state else None
        if state is None or self._verify:
            return None
        info = _read(path, self._memory.get(path, state))
        if info is not None:
            self._found[path] = state, info
        return info

    def _probe(self, path: Path) -> MediaInfo | DataError:
        state = _state(path)  # before reading: a file that is replaced meanwhile is probed again
        try:
            found = probe(path)
        except DataError as error:
            found = error
        if state is not None:
            self._found[path] = state, found
            if isinstance(found, MediaInfo):
                self._memory.set(path, state, _written(found))
        return found


def _state(path: Path) -> FileState | None:
    try:
        return FileState.of(path)
    except (OSError, ValueError):  # which `probe` reports
        return None


def _written(info: MediaInfo) -> dict[str, object]:
    # As text, since JSON has no tuples; without the path, which the memory has already.
    fields = {name: value for name, value in asdict(info).items() if name != "path"}
    return {"version": PROBE_VERSION, **fields}


def _read(path: Path, value: Any) -> MediaInfo | None:
    """The value that `_written` made; None if it is of another version."""
    if not isinstance(value, dict) or value.get("version") != PROBE_VERSION:
        return None
    fields = {name: content for name, content in value.items() if name != "version"}
    try:
        info = _MEDIA_INFO.validate_python({**fields, "path": Path()})
    except ValidationError:
        return None
    return replace(info, path=path)
