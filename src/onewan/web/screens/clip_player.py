"""The dialog in which one clip is looked at: its frames as they are trained, beside its file's."""

from __future__ import annotations

from collections.abc import Sequence

from nicegui import ui

from onewan.data.clip import Clip
from onewan.data.clip_views import View, crop_of, views_of
from onewan.doctor.clip_set import Entry
from onewan.doctor.clip_table import conditions, origin, taken, timesteps
from onewan.errors import one_line
from onewan.web.frame import text
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
            self._card = ui.card().classes("ow-dialog ow-player")
        self._dialog.on("keydown.left", lambda: self._go(-1), js_handler=_UNLESS_TYPING)
        self._dialog.on("keydown.right", lambda: self._go(1), js_handler=_UNLESS_TYPING)
        self._dialog.on("hide", self._card.clear)

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
        self._card.clear()
        with self._card:
            with ui.element("div").classes("ow-row"):
                text("h2", one_line(entry.name)).classes("ow-grow")
                self._step_button("Previous clip", "chevron_left", -1)
                self._step_button("Next clip", "chevron_right", 1)
                close = ui.button(icon="close", on_click=self._dialog.close)
                close.props('flat round dense autofocus aria-label="Close"')
            if entry.clip is None:
                ui.label(f"Refused: {entry.reason}").classes("ow-bad")
            else:
                self._pictures(entry, entry.clip)
                _facts(entry, entry.clip)
            for note in entry.notes:
                ui.label(f"{note.kind}: {note.text}").classes("ow-warn")
            text("h3", "Caption")
            CaptionField(desk, entry, rows=5)

    def _step_button(self, name: str, icon: str, by: int) -> None:
        button = ui.button(icon=icon, on_click=lambda: self._go(by))
        button.props(f'flat round dense aria-label="{name}"')
        button.set_enabled(0 <= self._index + by < len(self._entries))

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


def _facts(entry: Entry, clip: Clip) -> None:
    """What is taken of the clip's file, and how it is trained."""
    left, top, across, down = crop_of(clip)
    variation = clip.variation
    rows = {
        "File": f"{one_line(str(clip.path))} ({origin(clip)})",
        "Taken": f"{taken(clip)}, {clip.frames} frames at {clip.fps:.4g} fps"
        if clip.frames > 1
        else taken(clip),
        "Trained at": f"{clip.size[0]}x{clip.size[1]}",
        "Crop": f"{100 * across:.1f} % of the width and {100 * down:.1f} % of the height, from "
        f"{100 * left:.1f} % left and {100 * top:.1f} % top",
        "Changed": "" if variation is None else _changes(clip),
        "Each pass": f"one of {clip.takes} such clips" if clip.takes > 1 else "",
        "Repeats": f"{clip.repeats} in each epoch" if clip.repeats > 1 else "",
        "Loss weight": f"{clip.loss_weight:g}" if clip.loss_weight != 1 else "",
        "Timesteps": timesteps(clip),
        "Given": conditions(clip),
        "Validation": "held out, not trained on" if entry.held_out else "",
    }
    with ui.element("dl").classes("ow-facts"):
        for name, value in rows.items():
            if value:
                text("dt", name)
                text("dd", value)


def _changes(clip: Clip) -> str:
    variation = clip.variation
    assert variation is not None
    factors = {
        "brightness": variation.brightness,
        "contrast": variation.contrast,
        "saturation": variation.saturation,
    }
    texts = ["mirrored"] if variation.mirrored else []
    texts += [f"{name} {factor:.2f}" for name, factor in factors.items() if factor != 1]
    texts += [f"hue turned by {variation.hue:.3f}"] if variation.hue else []
    return ", ".join(texts) or "another crop"
