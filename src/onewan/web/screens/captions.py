"""Captions on the screen Data: changed in place, taken back, replaced in all clips."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from nicegui import ui

from onewan.data.caption_edits import Change, Outcome, Replacement
from onewan.data.caption_places import CaptionConflictError, Elsewhere, Place, Written
from onewan.doctor.captions import estimated_tokens
from onewan.doctor.clip_set import Entry
from onewan.errors import DataError, OnewanError, one_line
from onewan.serving.clips import ClipSets, OpenSet
from onewan.variants import TEXT_LENGTH
from onewan.web.elements import tell, text

_CHANGES_SHOWN = 30


@dataclass
class Desk:
    """What one tab of a browser has open, and the fields in which its captions are changed."""

    sets: ClipSets
    opened: OpenSet
    tab: str
    """Whose edits can be taken back."""
    area: ui.element
    """Where dialogs belong: a field may be gone by the time it asks."""
    fields: list[CaptionField] = field(default_factory=list)
    after_edit: Callable[[], None] = lambda: None

    @property
    def is_typing(self) -> bool:
        """Whether a field has a text that is not written yet."""
        return any(each.is_changed for each in self._shown())

    def _shown(self) -> list[CaptionField]:
        """The fields that are still there."""
        self.fields = [each for each in self.fields if not each.is_gone]
        return self.fields

    def show(self, place: Place, written: Written) -> None:
        """Show what is written at `place` now in all fields of it."""
        self.opened.clips.captions[place] = written
        for each in self._shown():
            if each.place == place:
                each.show(written)
        self.after_edit()

    async def step(self, *, back: bool) -> None:
        """Take the last edit back, or make it again."""
        edits = self.sets.edits(self.tab)
        await self.report(await asyncio.to_thread(edits.undo if back else edits.redo))

    async def report(self, outcome: Outcome) -> None:
        """Show what became of several changes."""
        places = [change.place for change in outcome.changed]
        for place, written in (await asyncio.to_thread(self.sets.read, places)).items():
            self.show(place, written)
        self.after_edit()
        if outcome.failed:
            names = ", ".join(one_line(place.path.name) for place in list(outcome.failed)[:3])
            others = len(outcome.failed) - 3
            more = f" and {others} others" if others > 0 else ""
            tell(
                f"{names}{more}: left as it is, since it was changed meanwhile or can't be written",
                error=True,
            )


class CaptionField:
    """The caption of a clip as a field that writes what is typed when it is left."""

    def __init__(self, desk: Desk, entry: Entry, *, rows: int = 3) -> None:
        self._desk, self._name = desk, one_line(entry.name)
        self._is_refused = entry.clip is None
        self._saving = asyncio.Lock()
        self._is_asking = False
        self.place = entry.place
        shown = desk.opened.clips.text(entry)
        if isinstance(self.place, Elsewhere):
            ui.label(shown or "No text").classes("ow-clip-caption")
            ui.label(f"Not changed here: {one_line(self.place.why)}").classes("ow-muted")
            return
        self.seen = desk.opened.clips.captions.get(self.place)
        if self.seen is None:
            ui.label("The caption can't be read or is outside the page's folders").classes("ow-bad")
            return
        self._area = ui.textarea(value=shown, on_change=self._typed)
        self._area.props(f'outlined dense rows={rows} input-style="resize: vertical"')
        self._area.props["aria-label"] = f"Caption of {self._name}"
        self._area.classes("ow-clip-caption").on("blur", self.save)
        self._area.on("keydown.ctrl.enter", self.save)
        self._state = ui.label("").classes("ow-clip-state ow-muted").props('role="status"')
        desk.fields.append(self)
        self._typed()

    @property
    def is_gone(self) -> bool:
        """Whether the page shows it no more."""
        return self._area.is_deleted

    @property
    def is_changed(self) -> bool:
        """Whether another text was typed than is written."""
        return self.seen is not None and (self._area.value or "") != (self.seen.text or "")

    def show(self, written: Written) -> None:
        """Show what is written now, unless something else was typed here."""
        if not self.is_changed:
            self.seen = written
            self._area.value = written.text or ""

    def _typed(self) -> None:
        value = self._area.value or ""
        longest = max((estimated_tokens(line) for line in value.split("\n")), default=0)
        notes = ["Not saved yet"] if self.is_changed else []
        if longest > TEXT_LENGTH:
            notes.append(f"about {longest} tokens; the text encoder reads the first {TEXT_LENGTH}")
        self._state.text = "; ".join(notes)
        self._state.classes(replace="ow-clip-state " + ("ow-warn" if notes else "ow-muted"))

    async def save(self) -> None:
        """Write the caption if it was changed; if someone else has, ask which one is to stay."""
        # Ctrl+Enter saves, and so does the blur when a dialog opens, or right behind it.
        async with self._saving:
            if self._is_asking or not self.is_changed or isinstance(self.place, Elsewhere):
                return
            assert self.seen is not None
            await self._write(self.place, self._area.value or "", self.seen)

    async def _write(self, place: Place, value: str, seen: Written) -> None:
        sets, tab = self._desk.sets, self._desk.tab
        try:
            written = await asyncio.to_thread(sets.edit, tab, place, value, seen)
        except CaptionConflictError as conflict:
            self._ask(place, value, conflict.current)
        except OnewanError as error:
            self._state.text = error.message
            self._state.classes(replace="ow-clip-state ow-bad")
        else:
            self.seen, self._area.value = written, written.text or ""
            self._desk.show(place, written)
            again = "; read the files again to take this one in" if self._is_refused else ""
            self._state.text = f"Saved{again}"

    def _ask(self, place: Place, mine: str, current: Written) -> None:
        def close() -> None:
            self._is_asking = False
            dialog.close()

        async def keep_mine() -> None:
            close()
            await self._write(place, mine, current)

        def take_theirs() -> None:
            close()
            self.seen, self._area.value = current, current.text or ""
            self._desk.show(place, current)

        self._is_asking = True
        with self._desk.area:
            dialog = ui.dialog().props('persistent aria-label="Two captions"')
        with dialog, ui.card().classes("ow-dialog"):
            text("h2", "This caption was changed meanwhile")
            ui.label(f"{self._name}: another tab or another program has written another text.")
            with ui.element("div").classes("ow-two"):
                for title, words in (
                    ("Yours", mine),
                    (
                        "In the file now",
                        "There is no caption file" if current.text is None else current.text,
                    ),
                ):
                    with ui.element("section"):
                        text("h3", title)
                        ui.label(words).classes("ow-mono")
            with ui.element("div").classes("ow-row"):
                ui.button("Write yours", on_click=keep_mine).props("no-caps")
                ui.button("Take the other", on_click=take_theirs).props("outline no-caps")
                ui.button("Go on editing", on_click=close).props("flat no-caps")
        dialog.open()


class FindAndReplace:
    """A dialog that replaces a text in all captions, after it has shown what changes."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._captions: dict[Place, Written] = {}
        self._changes: Sequence[Change] = ()
        with (
            ui.dialog().props('aria-label="Find and replace"') as self.dialog,
            ui.card().classes("ow-dialog"),
        ):
            text("h2", "Find and replace in all captions")
            with ui.element("div").classes("ow-row"):
                update = self._update
                self._find = ui.input("Find", on_change=update).props("outlined dense debounce=300")
                self._replace = ui.input("Replace with", on_change=update)
                self._replace.props("outlined dense debounce=300")
                self._case = ui.checkbox("Match case", on_change=update)
                self._words = ui.checkbox("Whole words", on_change=update)
            self._count = ui.label().props('role="status"')
            self._list = ui.element("section").classes("ow-changes")
            self._list.props('tabindex=0 aria-label="What changes"')
            with ui.element("div").classes("ow-row"):
                self._apply = ui.button("Replace", on_click=self._replace_all).props("no-caps")
                ui.button("Close", on_click=self.dialog.close).props("flat no-caps")

    async def open(self) -> None:
        """Read all captions anew, and open."""
        known = self._desk.opened.clips.captions
        self._captions = await asyncio.to_thread(self._desk.sets.read, list(known))
        known.update(self._captions)
        self.dialog.open()
        self._update()

    def _update(self) -> None:
        wanted = Replacement(
            find=self._find.value or "",
            replace=self._replace.value or "",
            match_case=bool(self._case.value),
            whole_words=bool(self._words.value),
        )
        self._changes = wanted.changes(self._captions)
        number = len(self._changes)
        captions = "1 caption changes" if number == 1 else f"{number} captions change"
        self._count.text = captions if wanted.find else "Type what to look for"
        self._apply.set_enabled(bool(number))
        self._apply.text = f"Replace in {number}" if number else "Replace"
        self._list.clear()
        with self._list:
            for change in self._changes[:_CHANGES_SHOWN]:
                with ui.element("section"):
                    text("h3", one_line(change.place.path.name))
                    ui.label(change.before or "").classes("ow-mono ow-before")
                    ui.label(change.after or "").classes("ow-mono ow-after")
            if number > _CHANGES_SHOWN:
                ui.label(f"and {number - _CHANGES_SHOWN} others").classes("ow-muted")

    async def _replace_all(self) -> None:
        self._apply.disable()
        edits = self._desk.sets.edits(self._desk.tab)
        try:
            outcome = await asyncio.to_thread(edits.apply, self._changes)
        except DataError as error:
            tell(str(error), error=True)
            return
        self.dialog.close()
        await self._desk.report(outcome)
        number = len(outcome.changed)
        tell(f"{number} caption{'' if number == 1 else 's'} changed; Undo takes that back")


def history_buttons(desk: Desk) -> None:
    """Buttons to take edits back, make them again, and replace a text."""
    undo = ui.button("Undo", icon="undo", on_click=partial(desk.step, back=True))
    redo = ui.button("Redo", icon="redo", on_click=partial(desk.step, back=False))
    dialog = FindAndReplace(desk)
    ui.button("Find and replace", icon="find_replace", on_click=dialog.open).props(
        "outline dense no-caps"
    )

    def refresh() -> None:
        edits = desk.sets.edits(desk.tab)
        for button, number, name in (
            (undo, edits.can_undo, "Undo"),
            (redo, edits.can_redo, "Redo"),
        ):
            button.set_enabled(number > 0)
            button.text = f"{name} ({number})" if number > 1 else name

    for button in (undo, redo):
        button.props("outline dense no-caps")
    desk.after_edit = refresh
    refresh()
