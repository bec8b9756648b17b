"""Changes of captions that can be taken back: one caption at a time, or a text in all of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from onewan.data.caption_places import (
    CaptionConflictError,
    CaptionStore,
    Place,
    Written,
)
from onewan.data.report import count
from onewan.errors import DataError, one_line

_MOST_STEPS = 200
"""Changes that can be taken back."""
_FILES_NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A caption before and after an edit."""

    place: Place
    before: str | None
    """None if there was no caption file."""
    after: str | None
    digest: str = ""
    """What `before` was read with."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the changes of several captions."""

    changed: tuple[Change, ...]
    failed: Mapping[Place, DataError]
    """Those that were left as they are, since they were changed meanwhile or can't be written."""
    written: Mapping[Place, Written] = field(default_factory=dict[Place, Written])
    """What the places of the others say now."""

    @property
    def summary(self) -> str:
        """How many captions were changed, and which were left as they are."""
        changed = f"{count(len(self.changed), 'caption')} changed"
        if not self.failed:
            return changed
        names = ", ".join(one_line(place.path.name) for place in list(self.failed)[:_FILES_NAMED])
        others = len(self.failed) - _FILES_NAMED
        more = f" and {others} others" if others > 0 else ""
        why = "left as it is, since it was changed meanwhile or can't be written"
        return f"{changed}; {names}{more}: {why}"


@dataclass
class CaptionEdits:
    """Edits captions through `store`, and remembers how to take that back."""

    store: CaptionStore
    _done: list[tuple[Change, ...]] = field(default_factory=list[tuple[Change, ...]])
    _undone: list[tuple[Change, ...]] = field(default_factory=list[tuple[Change, ...]])

    @property
    def can_undo(self) -> int:
        """How many captions `undo` changes; 0 if there is nothing to take back."""
        return len(self._done[-1]) if self._done else 0

    @property
    def can_redo(self) -> int:
        """How many captions `redo` changes."""
        return len(self._undone[-1]) if self._undone else 0

    def edit(self, place: Place, text: str, seen: Written) -> Written:
        """Write `text` where `seen` was read. CaptionConflictError and DataError as
        `CaptionStore.write`."""
        after = self.store.write(place, text, seen.digest)
        if after.digest != seen.digest:
            self._remember((Change(place=place, before=seen.text, after=after.text),))
        return after

    def apply(self, changes: Iterable[Change]) -> Outcome:
        """Make `changes` as one step; each has the digest that its caption was read with."""
        wanted = list(changes)
        outcome = self._write(wanted, {change.place: change.digest for change in wanted})
        if outcome.changed:
            self._remember(outcome.changed)
        return outcome

    def undo(self) -> Outcome:
        """Take back the last step, but for captions that were changed since."""
        if not self._done:
            return Outcome((), {})
        changes = self._done.pop()
        back = [Change(place=c.place, before=c.after, after=c.before) for c in changes]
        outcome = self._again(back)
        kept = {change.place for change in outcome.changed}
        self._undone += [again] if (again := tuple(c for c in changes if c.place in kept)) else []
        return outcome

    def redo(self) -> Outcome:
        """Make the step that was taken back last again, but for captions changed since."""
        if not self._undone:
            return Outcome((), {})
        outcome = self._again(self._undone.pop())
        self._done += [outcome.changed] if outcome.changed else []
        return outcome

    def _remember(self, changes: tuple[Change, ...]) -> None:
        self._done.append(changes)
        del self._done[:-_MOST_STEPS]
        self._undone.clear()

    def _again(self, changes: Iterable[Change]) -> Outcome:
        """Make changes whose captions are still what they were before them."""
        digests, failed, wanted = dict[Place, str](), dict[Place, DataError](), list[Change]()
        for change in changes:
            try:
                current = self.store.read(change.place)
                if current.text != change.before:
                    raise CaptionConflictError(change.place, current)
            except DataError as error:
                failed[change.place] = error
                continue
            digests[change.place] = current.digest
            wanted.append(change)
        outcome = self._write(wanted, digests)
        return Outcome(outcome.changed, {**failed, **outcome.failed}, outcome.written)

    def _write(self, changes: Iterable[Change], digests: Mapping[Place, str]) -> Outcome:
        by_place = {change.place: change for change in changes}
        results = self.store.write_all(
            {place: (change.after, digests[place]) for place, change in by_place.items()}
        )
        failed = {place: r for place, r in results.items() if isinstance(r, DataError)}
        written = {place: r for place, r in results.items() if not isinstance(r, DataError)}
        changed = tuple(change for place, change in by_place.items() if place in written)
        return Outcome(changed, failed, written)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """What is looked for in captions, and what comes in its place."""

    find: str
    replace: str
    match_case: bool = False
    whole_words: bool = False

    def in_text(self, text: str) -> str:
        """`text` with every occurrence replaced; `find` and `replace` are texts, not patterns."""
        if not self.find:
            return text
        pattern = re.escape(self.find)
        if self.whole_words:
            pattern = rf"(?<!\w){pattern}(?!\w)"
        flags = 0 if self.match_case else re.IGNORECASE
        return re.sub(pattern, lambda _: self.replace, text, flags=flags)

    def changes(self, captions: Mapping[Place, Written]) -> list[Change]:
        """The captions that it changes."""
        found = list[Change]()
        for place, written in captions.items():
            if written.text is None:
                continue
            after = self.in_text(written.text)
            if after != written.text:
                found.append(
                    Change(place=place, before=written.text, after=after, digest=written.digest)
                )
        return found
