"""The files that the page shows: models, adapters, embeddings, videos and run files of its folders.

What has no place in a list for people is left out: caches, training states, clips' captions and
masks, hidden files. What a file of weights is says its header, which is read once per state of the
file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.checkpoint.inspect import inspect
from onewan.checkpoint.inspection import Inspection
from onewan.data.report import count
from onewan.errors import OnewanError
from onewan.media import VIDEO_SUFFIXES, describe, extension
from onewan.runs.layout import RunLayout
from onewan.runs.status import is_run
from onewan.serving.roots import Roots

Kind = Literal["weights", "video", "run file"]
KINDS = {
    "": "All",
    "weights": "Models and adapters",
    "video": "Videos",
    "run file": "Run files",
}
"""The kinds with their titles."""

MOST = 5000
"""Files that are listed at most."""
_MOST_VISITED = 100_000
"""Names that are looked at; a folder such as a home folder has many that are none of ours."""
_MOST_DEEP = 8
_WEIGHTS = (".safetensors", ".pth", ".gguf")
_RUN_FILES = (".yaml", ".yml")
_MOST_RUN_FILE_BYTES = 1_000_000
_MOST_TEXT = 200_000
"""Bytes of a run file that are shown."""
_FOREIGN = ("node_modules", "site-packages", "__pycache__")


@dataclass(frozen=True)
class Entry:
    """A file, or the folder of a model, which is shown as one."""

    path: Path
    place: str
    """Where it is below its root, with the root's name: an address's part after ``/files/``."""
    kind: Kind
    size: int
    """Bytes, of all files of a folder."""
    modified: float
    """Seconds since the epoch, of the newest file."""

    @property
    def shown(self) -> str:
        """Its place as people read it."""
        return self.place.partition("/")[2] or self.path.name

    @property
    def address(self) -> str:
        """The address of its screen."""
        return f"/files/{quote(self.place)}"

    @property
    def when(self) -> str:
        """The time at which it was written, on the clock of this machine."""
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(self.modified))


@dataclass(frozen=True)
class Listing:
    """What was found, the newest first."""

    entries: tuple[Entry, ...]
    complete: bool
    """False if there is more than is listed."""

    @property
    def total(self) -> str:
        """How many files it has and how large they are, in words."""
        if not self.entries:
            return "There are no models, adapters, videos or run files in the folders of this page."
        size = format_bytes(sum(entry.size for entry in self.entries))
        more = "" if self.complete else "; there are more, which are not listed"
        return f"{count(len(self.entries), 'file')}, {size}{more}"

    def matching(self, words: str, kind: str) -> Listing:
        """What has all words in its place, and is of a kind; "" is any."""
        wanted = words.casefold().split()
        found = [
            entry
            for entry in self.entries
            if kind in ("", entry.kind) and all(word in entry.place.casefold() for word in wanted)
        ]
        return Listing(tuple(found), self.complete)


def find_files(roots: Roots) -> Listing:
    """All files of the roots that people look for. A folder that can't be read is left out."""
    walk = _Walk(roots)
    entries = [entry for entry in walk.entries() if entry is not None]
    entries.sort(key=lambda entry: -entry.modified)
    return Listing(tuple(entries), walk.complete)


def entry_at(roots: Roots, root: str, path: str) -> Entry:
    """The file of an address. OnewanError if there is none, or it is none of those in the list."""
    found = roots.at(root, path)
    kind = _kind(found) if found.is_file() else "weights" if _is_model(found) else None
    entry = None if kind is None else _entry(roots, found, kind)
    if entry is None:
        raise OnewanError(f"{root}/{path}: there is no such file on this page")
    return entry


def summary(entry: Entry) -> str:
    """What an entry is, in one line."""
    if entry.kind == "run file":
        return "run file"
    if entry.kind == "weights":
        return inspection(entry).summary
    try:
        what, rows = _video(entry.path, entry.size, entry.modified)
    except OnewanError as error:
        return error.message.removeprefix(f"{entry.path}: ")
    return ", ".join([what.removeprefix("a "), *rows.values()])


def text_of(entry: Entry) -> str:
    """The text of a run file, or its beginning."""
    with entry.path.open("rb") as file:
        return file.read(_MOST_TEXT).decode("utf-8", "replace")


def inspection(entry: Entry) -> Inspection:
    """The description of weights."""
    return _inspected(entry.path, entry.size, entry.modified)


@lru_cache(maxsize=MOST)
def _inspected(path: Path, size: int, modified: float) -> Inspection:
    del size, modified  # parts of the key: a file that was written anew is another one
    return inspect(path)


@lru_cache(maxsize=MOST)
def _video(path: Path, size: int, modified: float) -> tuple[str, dict[str, str]]:
    del size, modified
    return describe(path)


def _kind(path: Path) -> Kind | None:
    suffix = path.suffix.lower()
    if suffix in _WEIGHTS:
        return "weights"
    if extension(path) in VIDEO_SUFFIXES:
        return "video"
    return "run file" if suffix in _RUN_FILES and _is_run_file(path) else None


def _is_run_file(path: Path) -> bool:
    """Whether a YAML file has the section that every run file has."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MOST_RUN_FILE_BYTES)
    except (OSError, ValueError):
        return False
    return any(line.startswith("model:") for line in text.splitlines())


def _is_model(folder: Path) -> bool:
    """Whether a folder holds one model, or one component of several files."""
    try:
        names = set(os.listdir(folder))
    except OSError:
        return False
    if {"model_index.json", "high_noise_model"} & names:
        return True
    shards = any(name.endswith(".safetensors.index.json") for name in names)
    weights = any(name.endswith(".safetensors") for name in names)
    return weights and ("config.json" in names or shards)


def _entry(roots: Roots, path: Path, kind: Kind) -> Entry | None:
    try:
        files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
        facts = [each.stat() for each in files]
        place = unquote(roots.address(path).removeprefix("/media/"))
    except (OSError, OnewanError):
        return None
    size, modified = sum(each.st_size for each in facts), max(each.st_mtime for each in facts)
    return Entry(path, place, kind, size, modified)


class _Walk:
    """One walk over all roots."""

    def __init__(self, roots: Roots) -> None:
        self._roots = roots
        self._visited = 0
        self._listed = 0
        self.complete = True

    def entries(self) -> Iterator[Entry | None]:
        seen = set[Path]()
        # A root below another one is walked first, so that its files have its name.
        for root in sorted(self._roots.by_name.values(), key=lambda each: -len(each.parts)):
            yield from self._folder(root, 0, seen)
            seen.add(root)

    def _folder(self, folder: Path, depth: int, seen: set[Path]) -> Iterator[Entry | None]:
        if depth > _MOST_DEEP or folder in seen:
            return
        if is_run(folder):
            yield from self._run(folder)
            return
        try:
            found = sorted(os.scandir(folder), key=lambda each: each.name)
        except OSError:
            return
        names = {each.name for each in found}
        if "digests.jsonl" in names or "pyvenv.cfg" in names:  # a cache of onewan; an environment
            return
        for each in found:
            self._visited += 1
            if self._visited > _MOST_VISITED or self._listed >= MOST:
                self.complete = False
                return
            if each.name.startswith(".") or each.name in _FOREIGN:
                continue
            path = Path(each.path)
            if not each.is_dir(follow_symlinks=False):
                yield from self._file(path)
            elif _is_model(path):
                yield self._take(path, "weights")
            else:
                yield from self._folder(path, depth + 1, seen)

    def _run(self, folder: Path) -> Iterator[Entry | None]:
        layout = RunLayout(folder)
        yield from self._file(layout.run_file)
        for place in (layout.weights_dir, layout.samples_dir):
            for path in sorted(place.rglob("*")):
                if _is_model(path):
                    yield self._take(path, "weights")
                elif not _is_model(path.parent):
                    yield from self._file(path)

    def _file(self, path: Path) -> Iterator[Entry | None]:
        try:
            found = self._roots.inside(path)  # a symbolic link may lead outside
            if found.is_file() and (kind := _kind(path)) is not None:
                yield self._take(found, kind)
        except (OSError, OnewanError):
            return

    def _take(self, path: Path, kind: Kind) -> Entry | None:
        self._listed += 1
        return _entry(self._roots, path, kind)
