"""`Statuses`: where all runs of a folder stand, for programs that watch them for long.

Hides what has to be read again: of a run of which nothing has changed, only the times of a few
files are looked at, so that hundreds of runs can be watched.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from onewan.errors import one_line
from onewan.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, extension
from onewan.runs.layout import RunLayout
from onewan.runs.processes import trainer_of
from onewan.runs.status import RunStatus, is_run, read_status

_READ_AGAIN_SECONDS = 10.0
"""After which an active run is read again although it has written nothing: it may be silent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownRun:
    """What is known of a run."""

    name: str
    """That of its folder. If that is not UTF-8, it is written with escapes, and nothing but looking
    at the run is possible."""
    folder: Path
    is_trained: bool | None
    """Whether the process that trains it is alive; None if that can't be told from here."""
    status: RunStatus | None = None
    """None if it was not read yet, or can't be read."""
    problem: str = ""
    """Why it can't be read."""
    sample: Path | None = None
    """The first of the newest sample videos or pictures."""

    @property
    def state(self) -> str:
        """The state in a word or two, for people."""
        known = "" if self.status is None else self.status.state
        if self.is_trained and known not in ("running", "silent"):
            return "starting"  # its events are those of an earlier process
        return known or ("can't be read" if self.problem else "is being read")

    @property
    def is_active(self) -> bool:
        """Whether it is trained, here or elsewhere, as far as can be told."""
        return bool(self.is_trained) or (self.status is not None and self.status.is_active)

    @property
    def can_continue(self) -> bool:
        """Whether it can be trained further, from its saved state or from the beginning."""
        # Without settings that can be read there is nothing to train.
        readable = self.status is not None and self.status.variant is not None
        return readable and self.state in ("stopped", "failed", "killed", "not started")

    def matches(self, search: str) -> bool:
        """Whether each word of `search` is in its name, state, variant or method."""
        if not (words := search.lower().split()):
            return True
        status = self.status
        known = () if status is None else (status.variant or "", status.method or "")
        found = " ".join((self.name, self.state, *known)).lower()
        return all(word in found for word in words)


@dataclass(frozen=True, slots=True)
class _Facts:
    """What a run is read again for when it has changed."""

    is_trained: bool | None
    files: tuple[float | None, ...]
    """Times and sizes."""
    begun: float
    """When its trainer has begun, or its newest event was written."""


class Statuses:
    """The runs that are directly in the folder `runs`. `refresh` is called by one thread."""

    def __init__(self, runs: Path) -> None:
        self._folder = runs
        self._seen: dict[str, tuple[_Facts, float, KnownRun]] = {}
        """Each run that was read, with what was known and the time when it was."""
        self.runs: tuple[KnownRun, ...] = ()
        """Those that are trained first, then those with the newest events; replaced as a whole by
        `refresh`, so that any thread may read it."""
        self.complete = False
        """Whether all runs have been read."""

    def refresh(self, seconds: float = 1.0) -> None:
        """Read what has changed, but begin nothing after `seconds`: hundreds of new runs are read
        in parts, the newest first. OSError if the folder of runs can't be read."""
        end = time.monotonic() + seconds
        found = {layout.name: (layout, _facts(layout)) for layout in self._layouts()}
        self._seen = {name: seen for name, seen in self._seen.items() if name in found}
        complete, runs = True, list[KnownRun]()
        for name, (layout, facts) in sorted(found.items(), key=lambda item: _order(item[1][1])):
            if self._is_old(name, facts) and time.monotonic() < end:
                self._seen[name] = facts, time.monotonic(), _read(layout, facts.is_trained)
            elif name not in self._seen:
                complete = False
                unread = KnownRun(
                    name=one_line(name), folder=layout.root, is_trained=facts.is_trained
                )
                runs.append(unread)
                continue
            runs.append(self._seen[name][2])
        self.runs, self.complete = tuple(runs), complete

    def _layouts(self) -> Iterator[RunLayout]:
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and is_run(folder := Path(entry.path)):
                    yield RunLayout(folder)

    def _is_old(self, name: str, facts: _Facts) -> bool:
        if name not in self._seen:
            return True
        known, read, run = self._seen[name]
        # An active run that writes nothing becomes a silent one by time alone.
        active = run.status is not None and run.status.is_active
        return known != facts or (active and time.monotonic() - read > _READ_AGAIN_SECONDS)


def _order(facts: _Facts) -> tuple[bool, float]:
    return (not facts.is_trained, -facts.begun)


def _facts(layout: RunLayout) -> _Facts:
    trainer = trainer_of(layout)
    is_trained = False if trainer is None else trainer.is_alive
    files: list[float | None] = []
    folders = (layout.states_dir, layout.samples_dir)
    for path in (layout.lock, layout.events, layout.resolved, *folders):
        found = None
        with contextlib.suppress(OSError):
            found = path.stat()
        files += [found and found.st_mtime, found and found.st_size]
    lock, events = files[0], files[2]
    begun = (lock if is_trained else events) or 0.0
    return _Facts(is_trained, tuple(files), begun)


def _read(layout: RunLayout, is_trained: bool | None) -> KnownRun:
    status, problem, sample = None, "", None
    try:
        status = read_status(layout.root)
        sample = _newest_sample(layout)
    except OSError as error:
        problem = one_line(f"can't be read ({error})")
    return KnownRun(
        name=one_line(layout.name),
        folder=layout.root,
        is_trained=is_trained,
        status=status,
        problem=problem,
        sample=sample,
    )


def _newest_sample(layout: RunLayout) -> Path | None:
    for step in reversed(layout.sampled_steps()):
        for file in sorted(layout.samples(step).iterdir()):
            shown = extension(file) in VIDEO_SUFFIXES | IMAGE_SUFFIXES
            if shown and not file.name.startswith("."):
                return file
    return None
