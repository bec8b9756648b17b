"""The dialog in which one clip is looked at: its frames as they are trained, beside its file's."""

from __future__ import annotations

from collections.abc import Sequence

from nicegui import ui

from onewan.data.clip import Clip
from onewan.data.clip_views import View, crop_of, views_of
from onewan.doctor.clip_set import Entry
from onewan.doctor.clip_table import clip_facts
from onewan.errors import one_line
from onewan.web.elements import text
from onewan.web.screens.captions import CaptionField, Desk

_NAMES: dict[View, str] = {
    "trained": "Trained frames",
    "original": "The file, with the crop",
    "mask": "Loss mask: what is red is not trained on",
    "control": "Control video",
    "condition": "Condition image",
}


class ClipPlayer:
    """Opens one of `entries`, and goes from one to the next."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._entries: Sequence[Entry] = ()
        self._index = 0
        with ui.dialog().props('maximized aria-label="A clip"') as self._dialog:
            card = ui.card().classes("ow-dialog ow-player")
        self._dialog.on("keydown.left", lambda: self._go(-1), js_handler=_UNLESS_TYPING)
        self._dialog.on("keydown.right", lambda: self._go(1), js_handler=_UNLESS_TYPING)
        # The heading stays where it is from clip to clip, and with it the cursor on its buttons.
        with card:
            with ui.element("div").classes("ow-row"):
                self._name = text("h2", "").classes("ow-grow")
                self._buttons = {
                    -1: ui.button(icon="chevron_left", on_click=lambda: self._go(-1)),
                    1: ui.button(icon="chevron_right", on_click=lambda: self._go(1)),
                }
                self._buttons[-1].props('flat round dense aria-label="Previous clip"')
                self._buttons[1].props('flat round dense aria-label="Next clip"')
                close = ui.button(icon="close", on_click=self._dialog.close)
                close.props('flat round dense autofocus aria-label="Close"')
            self._body = ui.element("div").classes("ow-clip-body")
        self._dialog.on("hide", self._body.clear)

    def open(self, entries: Sequence[Entry], index: int) -> None:
        """Open the clip at `index` of `entries`."""
        self._entries, self._index = entries, index
        self._show()
        self._dialog.open()

    def _go(self, by: int) -> None:
        if 0 <= self._index + by < len(self._entries):
            self._index += by
            self._show()

    def _show(self) -> None:
        entry, desk = self._entries[self._index], self._desk
        self._name.text = one_line(entry.name)
        for by, button in self._buttons.items():
            button.set_enabled(0 <= self._index + by < len(self._entries))
        self._body.clear()
        with self._body:
            if entry.clip is None:
                ui.label(f"Refused: {entry.reason}").classes("ow-bad")
            else:
                self._pictures(entry, entry.clip)
                with ui.element("dl").classes("ow-facts"):
                    for name, value in clip_facts(entry.clip, is_held_out=entry.held_out).items():
                        text("dt", name)
                        text("dd", one_line(value))
            for note in entry.notes:
                ui.label(f"{note.kind}: {note.text}").classes("ow-warn")
            text("h3", "Caption")
            CaptionField(desk, entry, rows=5)

    def _pictures(self, entry: Entry, clip: Clip) -> None:
        with ui.element("div").classes("ow-views").props("data-together"):
            for view in views_of(clip):
                with ui.element("figure"):
                    self._picture(entry, clip, view)
                    text("figcaption", _NAMES[view]).classes("ow-muted")

    def _picture(self, entry: Entry, clip: Clip, view: View) -> None:
        width, height = clip.source_size if view == "original" else clip.size
        box = ui.element("div").classes("ow-view")
        box.style(f"aspect-ratio: {width} / {height}; max-width: calc(60vh * {width / height:.4f})")
        label = f"{_NAMES[view]} of {one_line(entry.name)}"
        with box:
            is_video = clip.frames > 1 and view != "condition"
            picture = ui.element("video" if is_video else "img")
            picture.props["src"] = f"/clips/{self._desk.opened.key}/{entry.number}/{view}"
            picture.props["aria-label" if is_video else "alt"] = label
            if is_video:
                picture.props("muted loop playsinline preload=auto")
                picture.props("controls autoplay" if view == "trained" else "")
            if view == "original":
                left, top, across, down = (f"{100 * part:.3f}%" for part in crop_of(clip))
                where = f"left: {left}; top: {top}; width: {across}; height: {down}"
                ui.element("div").classes("ow-crop").style(where)


_UNLESS_TYPING = '(e) => { if (!e.target.closest("textarea, input, video")) emit(); }'
