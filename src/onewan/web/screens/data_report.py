"""What was found about a data set: findings, duplicates, buckets and the contact sheet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from nicegui import ui

from onewan.data.report import count
from onewan.doctor.clip_set import Entry
from onewan.errors import OnewanError, one_line
from onewan.serving.clips import OpenSet
from onewan.web.elements import tell, text
from onewan.web.screens.captions import Desk

_FILES_SHOWN = 100
_PAIRS_SHOWN = 60


def poster(opened: OpenSet, entry: Entry) -> None:
    """The first trained frame of a clip, small."""
    picture = ui.element("img").props("loading=lazy width=360 height=240").classes("ow-poster")
    picture.props["alt"] = ""
    picture.props["src"] = f"/clips/{opened.key}/{entry.number}/poster"


def findings(opened: OpenSet) -> None:
    """Everything that was found, by kind."""
    clips, groups = opened.clips, opened.clips.findings()
    if not groups and not clips.notes:
        ui.label("Nothing was found.").classes("ow-good")
    for note in clips.notes:
        ui.label(note)
    for kind, found in groups.items():
        title = f"{kind.capitalize()} ({len(found)})"
        with ui.expansion(title, value=kind == "refused").classes("ow-card"):
            with ui.element("dl").classes("ow-facts"):
                for name, reason in found[:_FILES_SHOWN]:
                    text("dt", one_line(name))
                    text("dd", reason)
            if (others := len(found) - _FILES_SHOWN) > 0:
                ui.label(f"and {others} others; the filters of Clips show them")


def duplicates(opened: OpenSet) -> None:
    """Clips that are there twice, side by side."""
    if opened.clips.examination is None:
        ui.label("Duplicates are found when all frames are examined.").classes("ow-muted")
        return
    pairs = opened.clips.duplicates()
    if not pairs:
        ui.label("No clip is there twice.").classes("ow-good")
    for kind, first, second in pairs[:_PAIRS_SHOWN]:
        same = "the same content" if kind == "duplicate" else "look nearly the same"
        with ui.element("section").classes("ow-card ow-pair"):
            text("h3", f"{one_line(first.name)} and {one_line(second.name)}: {same}")
            with ui.element("div").classes("ow-two"):
                for entry in (first, second):
                    with ui.element("div"):
                        poster(opened, entry)
                        ui.label(one_line(str(entry.path))).classes("ow-muted")
                        ui.label(opened.clips.text(entry) or "No caption")
    if len(pairs) > _PAIRS_SHOWN:
        ui.label(f"and {count(len(pairs) - _PAIRS_SHOWN, 'other pair')}").classes("ow-muted")


def buckets(opened: OpenSet) -> None:
    """How many clips have each shape, and what of them fills no batch."""
    found = opened.clips.buckets
    batch = opened.clips.config.train.batch_size
    most = max((number for _, number in found), default=1)
    ui.label(
        f"The clips of a batch have the same number of frames and the same size. A batch has "
        f"{count(batch, 'clip')} (train.batch_size)."
    )
    with ui.element("div").classes("ow-scroll"), ui.element("table").classes("ow-table"):
        with ui.element("thead"), ui.element("tr"):
            for name in ("Bucket", "Clips", "", "Batches"):
                text("th" if name else "td", name)
        with ui.element("tbody"):
            for name, number in found:
                full, left = divmod(number, batch)
                batches = [f"{full} full"] if full else []
                batches += [f"one of {count(left, 'clip')}"] if left else []
                with ui.element("tr"):
                    text("th", name).props('scope="row"')
                    text("td", str(number))
                    with ui.element("td").classes("ow-bar-cell"):
                        bar = ui.element("div").classes("ow-bar")
                        bar.style(f"width: {100 * number / most:.1f}%")
                    text("td", " and ".join(batches))


def contact_sheet(desk: Desk) -> None:
    """The contact sheet, once it is drawn."""
    opened = desk.opened

    def show() -> None:
        area.clear()
        with area:
            for number, page in enumerate(opened.sheets):
                picture = ui.element("img").classes("ow-sheet").props("loading=lazy")
                picture.props["alt"] = f"Page {number + 1} of the contact sheet"
                picture.props["src"] = (
                    f"/clips/{opened.key}/sheet/{number}?{page.stat().st_mtime_ns}"
                )

    async def draw() -> None:
        button.disable()
        try:
            await asyncio.to_thread(desk.sets.draw_sheet, opened)
        except OnewanError as error:
            tell(str(error), error=True)
        finally:
            button.enable()
        show()

    ui.label("First, middle and last frame of each clip as it is trained, on pages to print.")
    button = ui.button("Draw the contact sheet", on_click=draw).props("outline no-caps")
    area = ui.element("div")
    show()


PANELS: dict[str, Callable[[Desk], None]] = {
    "Findings": lambda desk: findings(desk.opened),
    "Duplicates": lambda desk: duplicates(desk.opened),
    "Buckets": lambda desk: buckets(desk.opened),
    "Contact sheet": contact_sheet,
}
