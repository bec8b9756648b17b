"""A clip as a small picture, and the dialog in which its frames are seen as they are trained."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from nicegui import ui

from onewan.data.clip import Clip
from onewan.data.clip_views import VIEW_NAMES, View, crop_of, views_of
from onewan.doctor.clip_set import Entry
from onewan.doctor.clip_table import clip_facts
from onewan.errors import one_line
from onewan.serving.caption_editing import EditSession
from onewan.web.elements import box, button, facts, text, view
from onewan.web.screens.captions import caption

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

    with ui.context.client, ui.dialog() as dialog, ui.card().classes("ow-dialog ow-player"):
        # The heading stays where it is from clip to clip, and with it the cursor on its buttons.
        with box("ow-row"):
            name = text("h2", "", "ow-grow")
            previous = button("", partial(go, -1), icon="chevron_left", about="Previous clip")
            following = button("", partial(go, 1), icon="chevron_right", about="Next clip")
            button("", dialog.close, icon="close", about="Close").props("autofocus")
        show = view(box("ow-clip-body"), _clip)
    dialog.props('maximized aria-label="A clip"').on("hide", dialog.delete)
    dialog.on("keydown.left", partial(go, -1), js_handler=_UNLESS_TYPING)
    dialog.on("keydown.right", partial(go, 1), js_handler=_UNLESS_TYPING)
    go(0)
    dialog.open()


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
