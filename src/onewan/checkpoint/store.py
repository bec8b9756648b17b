"""Training states on disk: complete or absent, verified, rotated.

A state is a folder ``state/000500`` of files, some of them in folders of their own, and a manifest
with their sizes and digests. It is written under a temporary name and synced; the manifest is
written last, then the folder renamed. A state that does not match its manifest, or whose content
the caller refuses as damaged, is never used: the newest intact one is, and the damage is reported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from onewan.errors import CheckpointError
from onewan.files import (
    check_input,
    file_digest,
    read_input,
    remove,
    remove_abandoned,
    replace,
    sync,
    temporary_beside,
)
from onewan.runs.layout import RunLayout

MANIFEST = "manifest.json"
_MAX_MANIFEST_BYTES = 1 << 20

Content = TypeVar("Content")
_Signature = tuple[tuple[str, int, int, int], ...]


class DamagedStateError(CheckpointError):
    """A state's files are not what was saved, so an older state is used instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundState(Generic[Content]):
    """The newest intact state of a run."""

    step: int
    folder: Path
    content: Content
    """What the caller's function has read from it."""
    damaged: tuple[str, ...]
    """Why newer states were skipped, one line each."""


class StateStore:
    """The states of one run; keeps the newest `keep`, and those whose step divides by `keep_every`
    permanently."""

    def __init__(self, layout: RunLayout, keep: int, keep_every: int | None = None) -> None:
        self._layout = layout
        self.keep = keep
        self.keep_every = keep_every
        self._intact: dict[int, _Signature] = {}
        """The states that this object has written or verified, as they were then."""

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Let `write` fill a folder with the state after `step` steps, and make it durable.

        Saving the same step again replaces the state. CheckpointError if it can't be written; then
        all earlier states are as they were.
        """
        final = self._layout.state(step)
        try:
            # First: what a killed save left could take the space that this one needs.
            remove_abandoned(self._layout.states_dir)
            with temporary_beside(final) as temporary:
                temporary.mkdir()
                write(temporary)
                _write_manifest(temporary)
                replace(temporary, final)
            self._intact[step] = _signature(final)
        except OSError as error:
            # Not str(error): an error without a number, to which `temporary_beside` added the name
            # of the file, would be written without its message.
            reason = error.strerror or error.args[0]
            raise CheckpointError(f"{final}: the state can't be saved ({reason})") from error
        return final

    def newest(
        self, read: Callable[[Path], Content], required: Collection[str] = ()
    ) -> FoundState[Content] | None:
        """The newest intact state, with what `read` returns for its folder; None if the run has no
        state at all.

        A state is damaged if it does not match its manifest, if that does not list the files
        `required`, or if `read` raises DamagedStateError. CheckpointError if there are states, but
        every one is damaged.
        """
        damaged: list[str] = []
        for step in reversed(self._layout.saved_steps()):
            folder = self._layout.state(step)
            try:
                _verify(folder, required)
                content = read(folder)
            except DamagedStateError as error:
                damaged.append(str(error))
                continue
            self._intact[step] = _signature(folder)
            return FoundState(step=step, folder=folder, content=content, damaged=tuple(damaged))
        if damaged:
            raise CheckpointError(
                f"{self._layout.states_dir}: no training state is intact; restore one from a "
                "backup, or start a new run (output.name=...)",
                damaged,
            )
        return None

    def rotate(self, saved: int, best: int | None = None) -> list[str]:
        """Delete states that are older than the `keep` newest intact ones; that of step `best`
        stays. To be called when the state of step `saved` is safe.

        Only states up to `saved` count. Newer ones are damaged, else the run would have continued
        from them; each is replaced when the run comes to its step. Returns a line for each state
        that can't be deleted.
        """
        kept = 0
        problems: list[str] = []
        for step in reversed(self._layout.saved_steps()):
            if step > saved:
                continue
            if kept < self.keep:
                kept += step == saved or self._is_intact(step)
            elif step != best and not (self.keep_every and step % self.keep_every == 0):
                problems += self._delete(step)
        return problems

    def _is_intact(self, step: int) -> bool:
        """Whether the files of a state match its manifest; read only if they have changed since
        they were last read, because a state can have more than 100 GB."""
        folder = self._layout.state(step)
        try:
            signature = _signature(folder)
            if self._intact.get(step) != signature:
                _verify(folder)
                self._intact[step] = signature
        except (DamagedStateError, OSError):
            return False
        return True

    def _delete(self, step: int) -> list[str]:
        folder = self._layout.state(step)
        try:
            remove(folder)
        except OSError as error:
            return [f"{folder}: this old state can't be deleted ({error}); delete it yourself"]
        return []


def _signature(folder: Path) -> _Signature:
    """What changes when one of the files is written or replaced."""
    found = ((path.relative_to(folder).as_posix(), path.stat()) for path in _files(folder))
    return tuple((name, each.st_ino, each.st_size, each.st_mtime_ns) for name, each in found)


def _write_manifest(folder: Path) -> None:
    """List the files in `folder`, after all of them have reached the disk."""
    files = _files(folder)
    manifest = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "blake2b": file_digest(path),
        }
        for path in files
    }
    for path in (*files, *{path.parent for path in files}):
        sync(path)
    # Last: a folder without a manifest, or with one that does not match, counts as damaged.
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def _files(folder: Path) -> list[Path]:
    """All files of a state, also those in its folders."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _verify(folder: Path, required: Collection[str] = ()) -> None:
    """DamagedStateError if a state's files do not match its manifest."""
    manifest = _read_manifest(folder / MANIFEST)
    if missing := [name for name in required if name not in manifest]:
        raise DamagedStateError(f"{folder / MANIFEST}: does not list {', '.join(missing)}")
    for name, (size, digest) in manifest.items():
        path = folder / name
        try:
            found = check_input(path).stat().st_size
            if found != size:
                raise DamagedStateError(f"{path}: has {found} bytes instead of {size}")
            if file_digest(path) != digest:
                raise DamagedStateError(f"{path}: does not match its digest in {MANIFEST}")
        except OSError as error:
            raise DamagedStateError(f"{path}: can't be read ({error.strerror})") from error


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Sizes and digests by file name; DamagedStateError if the manifest is not one that
    `_write_manifest` writes."""
    try:
        manifest = json.loads(read_input(path, _MAX_MANIFEST_BYTES))
    except OSError as error:
        raise DamagedStateError(f"{path}: can't be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # the latter: thousands of nested brackets
        raise DamagedStateError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(manifest, dict) or not manifest:
        raise DamagedStateError(f"{path}: lists no files")
    return {
        _checked_name(path, name): _checked_entry(path, name, entry)
        for name, entry in cast("dict[str, object]", manifest).items()
    }


def _checked_name(manifest: Path, name: str) -> str:
    """`name` if it is that of a file in the manifest's own folder, or in a folder there."""
    parts = name.split("/")
    is_outside = len(parts) > 2 or any(part in {"", ".", ".."} for part in parts)
    if is_outside or name == MANIFEST or any(c in name for c in "\\:\0"):
        raise DamagedStateError(f"{manifest}: {name!r} is not the name of a file of the state")
    return name


def _checked_entry(manifest: Path, name: str, entry: object) -> tuple[int, str]:
    values = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
    size, digest = values.get("bytes"), values.get("blake2b")
    if type(size) is not int or not isinstance(digest, str):
        raise DamagedStateError(f"{manifest}: {name!r} has no size or no digest")
    return size, digest
