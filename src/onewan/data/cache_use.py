"""What a cache's folder holds, what of it some runs need, and removing the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from onewan.data.cache import EntryCache, EntryKind
from onewan.data.contact_sheet import sheets_in
from onewan.data.file_memory import forget_vanished
from onewan.data.sources.copies import Copies
from onewan.files import remove, remove_abandoned, total_bytes

PartKind = EntryKind | Literal["remote", "shards", "sheet"]
"""Entries, copies of files of other machines, archives that are unpacked, and contact sheets."""
PART_KINDS: tuple[PartKind, ...] = (*get_args(EntryKind), "remote", "shards", "sheet")

_MEMORIES = ("digests.jsonl", "probes.jsonl", "cuts.jsonl")
"""Files in a cache's folder that remember something of media files, by path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needed:
    """What runs need of the folder of a cache."""

    entries: frozenset[tuple[EntryKind, str]]
    """By kind and key."""
    copies: frozenset[Path]
    """Copies of files of other machines, and the folders of archives that are unpacked."""
    runs: frozenset[str]
    """The runs' names, which their contact sheets have."""

    @staticmethod
    def by_any(several: Iterable[Needed]) -> Needed:
        """What at least one of `several` needs."""
        each = list(several)
        return Needed(
            entries=frozenset().union(*(needed.entries for needed in each)),
            copies=frozenset().union(*(needed.copies for needed in each)),
            runs=frozenset().union(*(needed.runs for needed in each)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KindUse:
    """The parts of one kind."""

    number: int
    bytes: int
    needed_number: int
    needed_bytes: int


@dataclass(frozen=True, slots=True)
class _Part:
    """A file or folder that is kept or deleted as a whole."""

    path: Path
    bytes: int
    is_needed: bool


def cache_use(cache: EntryCache, needed: Needed) -> dict[PartKind, KindUse]:
    """How many parts of each kind there are, and how many of them are `needed`."""
    use = dict[PartKind, KindUse]()
    for kind in PART_KINDS:
        parts = list(_parts(cache, kind, needed))
        used = [part.bytes for part in parts if part.is_needed]
        use[kind] = KindUse(
            number=len(parts),
            bytes=sum(part.bytes for part in parts),
            needed_number=len(used),
            needed_bytes=sum(used),
        )
    return use


def prune(cache: EntryCache, needed: Needed) -> int:
    """Delete all parts that are not `needed`, what interrupted processes left, and what is
    remembered of files that are gone.

    Returns the number of deleted parts. One that another process deletes at the same time is
    counted too.
    """
    copies = Copies(cache.folder)
    cache.remove_abandoned()
    remove_abandoned(copies.shards)
    unneeded = [
        part.path
        for kind in PART_KINDS
        for part in _parts(cache, kind, needed)
        if not part.is_needed
    ]
    for path in unneeded:
        with suppress(FileNotFoundError):
            remove(path)
    for name in _MEMORIES:
        forget_vanished(cache.folder / name)
    copies.remote.tidy()
    return len(unneeded)


def total(use: Mapping[PartKind, KindUse]) -> KindUse:
    """The parts of all kinds together."""
    return KindUse(
        number=sum(kind.number for kind in use.values()),
        bytes=sum(kind.bytes for kind in use.values()),
        needed_number=sum(kind.needed_number for kind in use.values()),
        needed_bytes=sum(kind.needed_bytes for kind in use.values()),
    )


def _parts(cache: EntryCache, kind: PartKind, needed: Needed) -> Iterator[_Part]:
    """The parts of one kind."""
    copies = Copies(cache.folder)
    if kind == "remote":
        for path, wanted in copies.remote.stored():
            yield _Part(path, total_bytes(path), wanted in needed.copies)
    elif kind == "shards":
        for path in copies.unpacked():
            yield _Part(path, total_bytes(path), path in needed.copies)
    elif kind == "sheet":
        for path, runs in sheets_in(cache.folder):
            yield _Part(path, total_bytes(path), not needed.runs.isdisjoint(runs))
    else:
        for key, size in cache.sizes(kind):
            yield _Part(cache.path(kind, key), size, (kind, key) in needed.entries)
