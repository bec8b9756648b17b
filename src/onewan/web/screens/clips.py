"""A clip on the screen Data: its picture, the dialog with its frames, and its caption, which is
changed in place, taken back, or replaced in all clips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from nicegui import ui

from onewan.data.caption_edits import Change, Outcome, Replacement
from onewan.data.caption_places import Elsewhere, Place, Written
from onewan.data.clip import Clip
from onewan.data.clip_views import VIEW_NAMES, View, crop_of, views_of
from onewan.doctor.clip_set import Entry
from onewan.doctor.clip_table import clip_facts
from onewan.errors import one_line
from onewan.serving.caption_editing import Answer, EditedCaption, EditSession, State
from onewan.web.elements import box, button, dialog, facts, styled, table, tell, text, view

_CHANGES_SHOWN = 30
_LOOKS: dict[State, str] = {"good": "ow-muted", "unsaved": "ow-warn", "failed": "ow-bad"}
_UNLESS_TYPING = '(e) => { if (!e.target.closest("textarea, input, video")) emit(); }'


def poster(session: EditSession, entry: Entry) -> None:
    """The first trained frame of a clip, small."""
    if entry.clip is None:
        ui.label("Refused").classes("ow-poster ow-no-poster")
    else:
        source = session.opened.address(entry, "poster")
        box("ow-poster", "img", src=source, alt="", loading="lazy", width=360, height=240)


def open_clip(session: EditSession, entries: Sequence[Entry], index: int) -> None:
    """Open the clip at `index` of `entries`, in a dialog that goes to those before and behind."""

    def go(by: int) -> None:
        nonlocal index
        if 0 <= index + by < len(entries):
            index += by
            name.text = one_line(entries[index].name)
            previous.set_enabled(index > 0)
            following.set_enabled(index + 1 < len(entries))
            show(session, entries[index])

    with ui.context.client, ui.dialog() as shown, ui.card().classes("ow-dialog ow-player"):
        # The heading stays where it is from clip to clip, and with it the cursor on its buttons.
        with box("ow-row"):
            name = text("h2", "", "ow-grow")
            previous = button("", partial(go, -1), icon="chevron_left", about="Previous clip")
            following = button("", partial(go, 1), icon="chevron_right", about="Next clip")
            button("", shown.close, icon="close", about="Close").props("autofocus")
        show = view(box("ow-clip-body"), _clip)
    shown.props('maximized aria-label="A clip"').on("hide", shown.delete)
    shown.on("keydown.left", partial(go, -1), js_handler=_UNLESS_TYPING)
    shown.on("keydown.right", partial(go, 1), js_handler=_UNLESS_TYPING)
    go(0)
    shown.open()


def _clip(session: EditSession, entry: Entry) -> None:
    """The videos and pictures of a clip, what is known of it, and its caption."""
    if entry.clip is None:
        ui.label(f"Refused: {entry.reason}").classes("ow-bad")
    else:
        with box("ow-views", data_together=True):
            for each in views_of(entry.clip):
                with box(tag="figure"):
                    _view(session.opened.address(entry, each), entry, entry.clip, each)
                    text("figcaption", VIEW_NAMES[each], "ow-muted")
        found = clip_facts(entry.clip, is_held_out=entry.held_out)
        facts((name, one_line(value)) for name, value in found.items())
    for note in entry.notes:
        ui.label(f"{note.kind}: {note.text}").classes("ow-warn")
    text("h3", "Caption")
    caption(session, entry, rows=5)


def _view(source: str, entry: Entry, clip: Clip, kind: View) -> None:
    """A video or picture of a clip; over the one of its file, what is cropped is dimmed."""
    width, height = clip.source_size if kind == "original" else clip.size
    shape = f"aspect-ratio: {width} / {height}; max-width: calc(60vh * {width / height:.4f})"
    name = f"{VIEW_NAMES[kind]} of {one_line(entry.name)}"
    with box("ow-view").style(shape):
        if clip.frames > 1 and kind != "condition":
            video = box(tag="video", src=source, aria_label=name)
            video.props("muted loop playsinline preload=auto")
            video.props("controls autoplay" if kind == "trained" else "")
        else:
            box(tag="img", src=source, alt=name)
        if kind == "original":
            left, top, across, down = (f"{100 * part:.3f}%" for part in crop_of(clip))
            crop = f"left: {left}; top: {top}; width: {across}; height: {down}"
            box("ow-crop").style(crop)


def caption(session: EditSession, entry: Entry, *, rows: int = 3) -> None:
    """The caption of a clip, in a field if it can be changed here."""
    place, clips = entry.place, session.opened.clips
    if isinstance(place, Elsewhere):
        ui.label(clips.text(entry) or "No text").classes("ow-clip-caption")
        ui.label(f"Not changed here: {one_line(place.why)}").classes("ow-muted")
    elif place in clips.captions:
        _CaptionField(session, entry, place, rows)
    else:
        ui.label("The caption can't be read or is outside the page's folders").classes("ow-bad")


class _CaptionField(EditedCaption):
    """A field that writes what is typed when it is left, or with Ctrl+Enter."""

    def __init__(self, session: EditSession, entry: Entry, place: Place, rows: int) -> None:
        super().__init__(session, entry, place)
        self._area = ui.textarea(value=self.typed, on_change=self._change)
        styled(self._area, "ow-clip-caption", rows=rows, aria_label=f"Caption of {self.name}")
        self._area.on("blur", self.save).on("keydown.ctrl.enter", self.save)
        self._show_state = view(box("ow-clip-state", role="status"), partial(text, "div"))
        self.say_state()

    @property
    def is_gone(self) -> bool:
        return self._area.is_deleted

    def take(self, written: Written) -> None:
        super().take(written)
        if not self.is_gone:
            self._area.value = self.typed

    def _change(self) -> None:
        self.typed = self._area.value or ""
        self.say_state()

    def say(self, note: str, state: State) -> None:
        if not self.is_gone:
            self._show_state(note, _LOOKS[state])

    async def ask(self, theirs: str) -> Answer:
        # The field may be gone by now, but its tab is still there.
        with self._area.client, dialog("This caption was changed meanwhile", "ow-dialog") as asked:
            about = "another tab or another program has written another text."
            ui.label(f"{self.name}: {about}")
            facts((("Yours", self.typed), ("In the file now", theirs)))
            with box("ow-row"):
                button("Write yours", partial(asked.submit, "write"), "filled")
                button("Take the other", partial(asked.submit, "take"), "outline")
                button("Go on editing", asked.close)
        return await asked


def edit_buttons(session: EditSession) -> None:
    """Buttons to take edits back, make them again, and replace a text."""
    edits = session.edits

    def refresh() -> None:
        for step, name, number in ((undo, "Undo", edits.can_undo), (redo, "Redo", edits.can_redo)):
            step.set_enabled(number > 0)
            step.text = f"{name} ({number})" if number > 1 else name

    undo = button("Undo", partial(_change, session, edits.undo), "outline", icon="undo", small=True)
    redo = button("Redo", partial(_change, session, edits.redo), "outline", icon="redo", small=True)
    replace = partial(_find_and_replace, session)
    button("Find and replace", replace, "outline", icon="find_replace", small=True)
    session.after_edit = refresh
    refresh()


async def _change(session: EditSession, action: Callable[[], Outcome]) -> None:
    outcome = await session.change(action)
    tell(outcome.summary, error=bool(outcome.failed))


async def _find_and_replace(session: EditSession) -> None:
    """Open a dialog that replaces a text in all captions, after it has shown what changes."""
    captions = await session.read()

    def update() -> None:
        show(Replacement(**{name: field.value for name, field in fields.items()}))

    def preview(wanted: Replacement) -> None:
        changes = wanted.changes(captions)
        found = "1 caption changes" if len(changes) == 1 else f"{len(changes)} captions change"
        status.text = f"{found}; Undo takes that back" if wanted.find else "Type what to look for"
        with box("ow-changes", "section", tabindex=0, aria_label="What changes"):
            rows = [(one_line(c.place.path.name), c.before or "", c.after or "") for c in changes]
            table(("Caption", "Before", "After") if rows else (), rows[:_CHANGES_SHOWN])
            if (others := len(changes) - _CHANGES_SHOWN) > 0:
                text("p", f"and {others} others", "ow-muted")
        with box("ow-row"):
            label = f"Replace in {len(changes)}" if changes else "Replace"
            button(label, partial(replace, changes), "filled").set_enabled(bool(changes))
            button("Close", shown.close)

    async def replace(changes: list[Change]) -> None:
        shown.close()
        await _change(session, partial(session.edits.apply, changes))

    with dialog("Find and replace in all captions", "ow-dialog") as shown:
        with box("ow-row"):
            fields: dict[str, Any] = {
                "find": ui.input("Find", on_change=update).props("debounce=300"),
                "replace": ui.input("Replace with", on_change=update).props("debounce=300"),
                "match_case": ui.checkbox("Match case", on_change=update),
                "whole_words": ui.checkbox("Whole words", on_change=update),
            }
        status = text("div", role="status")
        show = view(box("ow-clip-body"), preview)
    update()
    shown.open()
