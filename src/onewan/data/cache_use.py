"""What a cache holds, what of it some runs need, and removing the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from onewan.data.cache import EntryCache, EntryKind
from onewan.data.file_memory import forget_vanished

Entries = frozenset[tuple[EntryKind, str]]
"""Entries by kind and key."""

_MEMORIES = ("digests.jsonl", "probes.jsonl", "cuts.jsonl")
"""Files in a cache's folder that remember something of media files, by path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KindUse:
    """The entries of one kind."""

    number: int
    bytes: int
    needed_number: int
    needed_bytes: int


def cache_use(cache: EntryCache, needed: Entries) -> dict[str, KindUse]:
    """How many entries of each kind there are, and how many of them are `needed`."""
    use = dict[str, KindUse]()
    for kind in get_args(EntryKind):
        sizes = dict(cache.sizes(kind))
        used = [size for key, size in sizes.items() if (kind, key) in needed]
        use[kind] = KindUse(
            number=len(sizes),
            bytes=sum(sizes.values()),
            needed_number=len(used),
            needed_bytes=sum(used),
        )
    return use


def prune(cache: EntryCache, needed: Entries) -> int:
    """Delete all entries that are not `needed`, and what is remembered of files that are gone.

    Returns the number of deleted entries. One that another process deletes at the same time is
    counted too.
    """
    unneeded = [
        (kind, key)
        for kind in get_args(EntryKind)
        for key, _ in cache.sizes(kind)
        if (kind, key) not in needed
    ]
    for kind, key in unneeded:
        cache.discard(kind, key)
    for name in _MEMORIES:
        forget_vanished(cache.folder / name)
    return len(unneeded)


def total(use: Mapping[str, KindUse]) -> KindUse:
    """The entries of all kinds together."""
    return KindUse(
        number=sum(kind.number for kind in use.values()),
        bytes=sum(kind.bytes for kind in use.values()),
        needed_number=sum(kind.needed_number for kind in use.values()),
        needed_bytes=sum(kind.needed_bytes for kind in use.values()),
    )
