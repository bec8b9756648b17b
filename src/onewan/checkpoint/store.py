"""Training states on disk: complete or absent, verified, rotated.

A state is a folder ``state/000500`` of files and a manifest with their sizes and digests. It is
written under a temporary name and synced; the manifest is written last, then the folder renamed. A
state that does not match its manifest is never loaded: the newest intact one is loaded instead, and
the damage is reported. The content of the files is up to the caller.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from onewan.errors import CheckpointError
from onewan.files import file_digest, remove, remove_abandoned, replace, sync, temporary_beside
from onewan.runs.layout import RunLayout

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundState:
    """The newest intact state of a run."""

    step: int
    folder: Path
    damaged: tuple[str, ...]
    """Why newer states were skipped, one line each."""


class StateStore:
    """The states of one run; keeps the newest `keep`, and those whose step divides by `keep_every`
    permanently."""

    def __init__(self, layout: RunLayout, keep: int, keep_every: int | None = None) -> None:
        self._layout = layout
        self._keep = keep
        self._keep_every = keep_every

    def save(self, step: int, write: Callable[[Path], None], best: int | None = None) -> Path:
        """Let `write` fill a folder with the state after `step` steps, and make it durable.

        Saving the same step again replaces the state. Older ones that are not to be kept are
        deleted, after the new one is safe; that of step `best` stays.
        """
        final = self._layout.state(step)
        # First: what a killed save left could take the space that this one needs.
        remove_abandoned(self._layout.states_dir)
        with temporary_beside(final) as temporary:
            temporary.mkdir()
            write(temporary)
            _write_manifest(temporary)
            replace(temporary, final)
        self._rotate(best)
        return final

    def newest(self) -> FoundState | None:
        """The newest state that matches its manifest; None if the run has no state at all.

        CheckpointError if there are states, but every one is damaged.
        """
        damaged: list[str] = []
        for step in reversed(self._layout.saved_steps()):
            folder = self._layout.state(step)
            problem = _damage(folder)
            if problem is None:
                return FoundState(step=step, folder=folder, damaged=tuple(damaged))
            damaged.append(f"{folder}: {problem}")
        if damaged:
            raise CheckpointError(
                "no training state is intact; start a new run\n  " + "\n  ".join(damaged)
            )
        return None

    def _rotate(self, best: int | None) -> None:
        # Called only after the new state is on the disk: a crash in between leaves one too many.
        for step in self._layout.saved_steps()[: -self._keep]:
            if step != best and not (self._keep_every and step % self._keep_every == 0):
                remove(self._layout.state(step))


def _write_manifest(folder: Path) -> None:
    """List the files in `folder`, after all of them have reached the disk."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    manifest = {p.name: {"bytes": p.stat().st_size, "blake2b": file_digest(p)} for p in files}
    for path in files:
        sync(path)
    # Last: a folder without a manifest, or with one that does not match, counts as damaged.
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def _damage(folder: Path) -> str | None:
    """What is wrong with a state's files; None if nothing."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            path = folder / name
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if file_digest(path) != expected["blake2b"]:
                return f"{name} does not match its digest"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"unreadable ({error})"
    return None
