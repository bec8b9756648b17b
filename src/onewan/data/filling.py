"""Filling a cache with what is missing, by one process or by several that share the work.

A process claims each entry before it begins it (`onewan.locks.Claim`), and leaves to others what
they have claimed. The claim of a process that is killed ends with it, and the others then make its
entries. Two processes that make one entry do no harm, since equal inputs give equal files: this
happens where a file system has no locks, and after `_MOST_WAITING`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import Enum, auto
from random import SystemRandom
from typing import Generic, TypeVar

from torch import Tensor

from onewan.data.ahead import results_ahead
from onewan.data.cache import EntryCache, EntryKind
from onewan.data.encode import ProgressCallback
from onewan.errors import DataError
from onewan.locks import Claim

_POLL = 0.1
"""Seconds between two looks at what other processes are making."""
_MOST_WAITING = 60.0
"""Seconds without a new entry after which one that another process has claimed is made here too: it
may be stopped, or slow."""

_ACTIVITIES: Mapping[EntryKind, str] = {
    "video": "encoding clips",
    "condition": "encoding conditions",
    "mask": "encoding masks",
    "text": "encoding captions",
}

_Item = TypeVar("_Item")
_Read = TypeVar("_Read")


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """What became of the missing entries of one kind."""

    encoded: int
    """Number of entries that this process made."""
    errors: Mapping[int, DataError]
    """Of the items that can't be used, by their place."""


class CacheFiller:
    """Makes missing entries of a cache."""

    def __init__(self, cache: EntryCache) -> None:
        self._cache = cache
        # Entries that must be made again although they exist.
        self._damaged = set[tuple[EntryKind, str]]()

    def find_damaged(self, kind: EntryKind, keys: Iterable[str]) -> None:
        """Read the entries that exist; those that are damaged count as missing."""
        # They are replaced later, not deleted now: another process, which verifies the same cache,
        # may have replaced them in the meantime.
        self._damaged |= {
            (kind, key)
            for key in keys
            if self._cache.has(kind, key) and self._cache.problem(kind, key)
        }

    def is_missing(self, kind: EntryKind, key: str) -> bool:
        """Whether an entry has to be made."""
        return (kind, key) in self._damaged or not self._cache.has(kind, key)

    def was_made(self, kind: EntryKind, key: str) -> bool:
        """Whether an entry that was missing is there: another process has made it."""
        if (kind, key) in self._damaged and self._cache.has(kind, key):
            if self._cache.problem(kind, key):
                return False
            self._damaged.discard((kind, key))
        return self._cache.has(kind, key)

    def save(self, kind: EntryKind, key: str, tensors: Mapping[str, Tensor], about: str) -> None:
        """Store an entry that was made."""
        self._cache.save(kind, key, tensors, about)
        self._damaged.discard((kind, key))

    def discard(self, kind: EntryKind, key: str) -> None:
        """Delete an entry, if there is one, whose item can't be used."""
        self._cache.discard(kind, key)

    def claim(self, kind: EntryKind, key: str) -> Claim:
        """Try to keep other processes from making an entry."""
        return Claim(self._cache.claim_path(kind, key))

    def fill(
        self,
        kind: EntryKind,
        keyed: Sequence[tuple[str, _Item]],
        read: Callable[[_Item], _Read],
        encode: Callable[[_Item, _Read], Mapping[str, Tensor]],
        progress: ProgressCallback,
        *,
        about: Callable[[_Item], str],
        workers: int = 0,
        size: Callable[[_Item], int] = lambda _: 0,
    ) -> Filled:
        """Make the missing entries of the items in `keyed`: `read` in threads, `encode` in this
        one. Returns when all are there, whichever process made them.

        Items for which one of the two raises a DataError get no entry. `about` describes an item
        for people, and `size` is the memory that the result of `read` takes, in bytes.
        """
        filling = _Filling(self, kind, keyed, read, encode, progress, about)
        filling.run(workers, size)
        return Filled(encoded=filling.encoded, errors=filling.errors)


class _Entry(Generic[_Item]):
    """A missing entry, and the items that it is for: more than one if their inputs are equal."""

    def __init__(self, key: str, items: Sequence[tuple[int, _Item]]) -> None:
        """`items` come with their places in the data set."""
        self.key = key
        (self.number, self.item), *self.copies = items


class _OfAnother(Enum):
    """Why an entry was not read here."""

    MADE = auto()
    CLAIMED = auto()


class _Filling(Generic[_Item, _Read]):
    """One call of `CacheFiller.fill`."""

    def __init__(
        self,
        filler: CacheFiller,
        kind: EntryKind,
        keyed: Sequence[tuple[str, _Item]],
        read: Callable[[_Item], _Read],
        encode: Callable[[_Item, _Read], Mapping[str, Tensor]],
        progress: ProgressCallback,
        about: Callable[[_Item], str],
    ) -> None:
        self._filler = filler
        self._kind: EntryKind = kind
        self._read, self._encode, self._about = read, encode, about
        items = dict[str, list[tuple[int, _Item]]]()
        for number, (key, item) in enumerate(keyed):
            if filler.is_missing(kind, key):
                items.setdefault(key, []).append((number, item))
        self._missing = [_Entry(key, copies) for key, copies in items.items()]
        # In an order that differs between processes, for where no entry can be claimed. Entries do
        # not depend on the order.
        SystemRandom().shuffle(self._missing)
        self._total, self._finished, self._progress = len(self._missing), 0, progress
        self._claims = dict[str, Claim]()
        self._insists = False
        self.encoded = 0
        self.errors = dict[int, DataError]()

    def run(self, workers: int, size: Callable[[_Item], int]) -> None:
        last_news = time.monotonic()
        try:
            while self._missing:
                before = self._finished, len(self.errors)
                self._missing = self._round(workers, size)
                if (self._finished, len(self.errors)) != before:
                    last_news, self._insists = time.monotonic(), False
                    continue
                # What is left is claimed by other processes, and nothing else remains to be done.
                self._insists = time.monotonic() - last_news > _MOST_WAITING
                self._show_progress()  # which may stop the work
                time.sleep(_POLL)
        finally:
            for claim in self._claims.values():
                claim.release()

    def _round(self, workers: int, size: Callable[[_Item], int]) -> list[_Entry[_Item]]:
        """Go through what is missing once; returns the entries that are still to be made."""
        left = list[_Entry[_Item]]()
        entries = results_ahead(
            self._read_if_free, self._missing, workers=workers, size=lambda entry: size(entry.item)
        )
        with closing(entries) as results:
            for entry, result in results:
                try:
                    found = result()
                    if found is _OfAnother.CLAIMED:
                        left.append(entry)
                        continue
                    if not isinstance(found, _OfAnother):
                        tensors = self._encode(entry.item, found)
                        self._filler.save(self._kind, entry.key, tensors, self._about(entry.item))
                        self.encoded += 1
                except DataError as error:
                    self._filler.discard(self._kind, entry.key)
                    self.errors[entry.number] = error
                    # Copies of a damaged file fail one by one, each under its own name.
                    if entry.copies:
                        left.append(_Entry(entry.key, entry.copies))
                        continue
                finally:
                    if claim := self._claims.pop(entry.key, None):
                        claim.release()
                self._finished += 1
                self._show_progress()
        return left

    def _read_if_free(self, entry: _Entry[_Item]) -> _Read | _OfAnother:
        """What is encoded for an entry, which is claimed then."""
        if not self._filler.is_missing(self._kind, entry.key):
            return _OfAnother.MADE
        claim = self._filler.claim(self._kind, entry.key)
        if not claim.taken and not self._insists:
            return _OfAnother.CLAIMED
        self._claims[entry.key] = claim
        # Again, since another process may have made it, and released it, in between.
        if self._filler.was_made(self._kind, entry.key):
            return _OfAnother.MADE
        return self._read(entry.item)

    def _show_progress(self) -> None:
        self._progress(_ACTIVITIES[self._kind], self._finished, self._total)
