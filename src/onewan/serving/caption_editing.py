"""Captions as one tab of a browser edits them.

What is typed in a field is written when the field is left, and shown in all fields of the tab with
this caption. Nothing is written over what someone else has written meanwhile, unless the user wants
that. How a field looks and asks is the matter of the screen, whose fields are `EditedCaption`.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, TypeAlias

from onewan.data.caption_edits import Outcome
from onewan.data.caption_places import CaptionConflictError, Place, Written
from onewan.doctor.captions import estimated_length_note
from onewan.doctor.clip_set import Entry
from onewan.errors import OnewanError, one_line
from onewan.serving.clips import ClipSets, OpenSet

State: TypeAlias = Literal["good", "unsaved", "failed"]
Answer: TypeAlias = Literal["write", "take"] | None
"""What the user wants of two captions: `write` the own one, `take` the other; None: edit on."""


class EditSession:
    """What one tab of a browser has open, and its edits, which it can take back.

    `tab` names the tab; `after_edit` is called when there is something else to take back.
    """

    def __init__(self, sets: ClipSets, opened: OpenSet, tab: str) -> None:
        self.sets, self.opened, self.edits = sets, opened, sets.edits(tab)
        self.after_edit: Callable[[], None] = lambda: None
        self._fields: list[EditedCaption] = []

    def add(self, field: EditedCaption) -> None:
        """Show in `field` what is written, as long as it is there."""
        self._fields = [*self._shown(), field]

    @property
    def is_typing(self) -> bool:
        """Whether a field has a text that is not written yet."""
        return any(field.is_changed for field in self._shown())

    def show(self, written: Mapping[Place, Written]) -> None:
        """Show what is written now, but where another text was typed."""
        self.opened.clips.captions.update(written)
        for field in self._shown():
            if field.place in written and not field.is_changed:
                field.take(written[field.place])
        self.after_edit()

    async def read(self) -> dict[Place, Written]:
        """All captions as they are written now."""
        captions = await asyncio.to_thread(self.sets.read, list(self.opened.clips.captions))
        self.show(captions)
        return captions

    async def change(self, action: Callable[[], Outcome]) -> Outcome:
        """Let `action` change captions, and show what became of them."""
        outcome = await asyncio.to_thread(action)
        self.show(outcome.written)
        return outcome

    def _shown(self) -> list[EditedCaption]:
        return [field for field in self._fields if not field.is_gone]


class EditedCaption(ABC):
    """A caption in a field."""

    def __init__(self, session: EditSession, entry: Entry, place: Place) -> None:
        self.session, self.place, self.name = session, place, one_line(entry.name)
        self.seen = session.opened.clips.captions[place]
        """What was written when it was shown."""
        self.typed = self.seen.text or ""
        self._is_refused = entry.clip is None
        self._is_saving = False
        session.add(self)

    @property
    @abstractmethod
    def is_gone(self) -> bool:
        """Whether the page shows it no more."""

    @abstractmethod
    def say(self, note: str, state: State) -> None:
        """Show a note about the caption."""

    @abstractmethod
    async def ask(self, theirs: str) -> Answer:
        """Ask what is to be written, where someone else has written `theirs` meanwhile."""

    @property
    def is_changed(self) -> bool:
        """Whether another text was typed than is written."""
        return self.typed != (self.seen.text or "")

    def take(self, written: Written) -> None:
        """Show what is written instead of what was typed."""
        self.seen, self.typed = written, written.text or ""
        self.say_state()

    def say_state(self) -> None:
        """Say what the user should know about what is typed."""
        notes = ["Not saved yet"] if self.is_changed else []
        if note := estimated_length_note(self.typed):
            notes.append(note)
        self.say("; ".join(notes), "unsaved" if notes else "good")

    async def save(self) -> None:
        """Write the caption if it was changed; if someone else has, ask which one is to stay."""
        # Ctrl+Enter saves, and so does the blur when a question opens, or right behind it.
        if self._is_saving:
            return
        self._is_saving = True
        try:
            goes_on = True
            while self.is_changed and goes_on:  # what is typed meanwhile is written too
                goes_on = await self._write(self.typed)
        except OnewanError as error:
            self.say(error.message, "failed")
        finally:
            self._is_saving = False

    async def _write(self, mine: str) -> bool:
        """Write `mine`, or decide what is to be written; False if the user continues editing."""
        session = self.session
        edit = partial(session.sets.edit, session.edits, self.place, mine, self.seen)
        try:
            written = await asyncio.to_thread(edit)
        except CaptionConflictError as conflict:
            written = conflict.current
            theirs = "There is no caption file" if written.text is None else written.text
            answer = await self.ask(theirs)
            if answer == "write":
                self.seen = written
            elif answer == "take":
                self.take(written)
                session.show({self.place: written})
            return answer is not None
        self.seen = written
        if self.typed == mine:
            self.take(written)
        session.show({self.place: written})
        again = "; read the files again to take this one in" if self._is_refused else ""
        self.say(f"Saved{again}", "good")
        return True
