"""The screen Data: the clips of a run, a run file or a folder, as they are trained."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, get_args
from urllib.parse import urlencode

from fastapi import Query
from nicegui import app, context, ui

from onewan.data.report import count
from onewan.data.spans import Strategy
from onewan.doctor.clip_set import ClipSet, Entry
from onewan.errors import OnewanError, one_line
from onewan.runs.status import find_runs
from onewan.serving import clip_routes
from onewan.serving.caption_editing import EditSession
from onewan.serving.clips import ClipQuery, ClipSets, OpenSet
from onewan.serving.commands import command_line
from onewan.variants import VARIANTS
from onewan.web.elements import attempt, box, button, card, facts, table, text, view
from onewan.web.frame import frame
from onewan.web.page import Page
from onewan.web.screens.clips import caption, edit_buttons, open_clip, poster

_CARDS = 36
"""Clips on a page of the grid."""
_FILES_SHOWN = 100
_PAIRS_SHOWN = 60


def add(page: Page) -> None:
    """Register the screen, and the addresses of what it shows of clips."""
    sets = ClipSets(page.roots, page.commands)
    app.include_router(clip_routes.router(sets))

    @ui.page("/data")
    async def screen(query: Annotated[ClipQuery, Query()]) -> None:
        runs = [folder.name for folder in await asyncio.to_thread(find_runs, page.roots.runs)]
        with frame("Data", "/data", styles=["clips.css"], scripts=["clips.js"]):
            _chooser(runs, query)
            if query.kind:
                clips = _Clips(sets, query)
                await context.client.connected()
                if context.client.has_socket_connection:  # and not given up meanwhile
                    await clips.open()


def _chooser(runs: list[str], query: ClipQuery) -> None:
    """Whose clips are shown."""

    def show() -> None:
        given = {name: f.value for name, f in fields.items() if f.visible and f.value}
        ui.navigate.to(f"/data?{urlencode(given, errors='surrogateescape')}")

    with box("ow-card", "section", aria_label="Whose clips"):
        about = "See each clip as it is trained and what speaks against it, and edit captions."
        text("p", about, "ow-muted ow-about")
        kinds = {"run": "A run", "file": "A run file", "folder": "A folder"}
        kind = ui.toggle(kinds, value=query.kind or ("run" if runs else "folder"))
        kind.props("no-caps unelevated")
        run = query.run if query.run in runs else next(iter(runs), None)
        spans = ["", *get_args(Strategy)]
        with box("ow-row ow-fields"):
            fields: dict[str, Any] = {
                "run": ui.select(runs, label="Run", value=run),
                "file": ui.input("Run file", value=query.file).classes("ow-wide"),
                "folder": ui.input("Folder", value=query.folder).classes("ow-wide"),
                "variant": ui.select(list(VARIANTS), label="Model", value=query.variant),
                "frames": ui.number("Most frames", value=query.frames, min=1, precision=0),
                "size": ui.input("Size, such as 832x480", value=query.size),
                "fps": ui.number("Frames per second", value=query.fps, min=0.1),
                "strategy": ui.select(spans, label="Spans of videos", value=query.strategy),
                "masks": ui.checkbox("Loss masks", value=query.masks),
            }
            for name, field in fields.items():
                own = name if name in kinds else "folder"
                field.bind_visibility_from(kind, "value", value=own)
            button("Show clips", show, "filled")


class _Clips:
    """The clips that a query names, and what was found about them."""

    def __init__(self, sets: ClipSets, query: ClipQuery) -> None:
        self._sets, self._query = sets, query
        with box("ow-found") as self._area:
            ui.label("Reading the headers of the files...").props('role="status"')

    async def open(self, *, again: bool = False) -> None:
        """Show them; `again` reads all files anew."""
        try:
            opened = await self._sets.open(self._query, again=again)
        except OnewanError as error:
            with self._area.clear():
                text("p", error, "ow-card ow-bad", role="alert")
        else:
            with self._area.clear():
                self._fill(opened)

    def _fill(self, opened: OpenSet) -> None:
        tab = context.client.tab_id or context.client.id
        self._opened, self._shown = opened, None
        self._session = EditSession(self._sets, opened, f"{tab} {opened.key}")
        with box("ow-head", "section", aria_label="What was found"):
            self._show_head = view(box(), self._head)
            self._show_progress = view(box("ow-line", role="status"), partial(text, "div"))
            command = one_line(command_line(["doctor", str(opened.run_file)]))
            ui.label(f"The same in a terminal: {command}").classes("ow-mono ow-muted")
        with ui.tabs().props("no-caps align=left dense") as tabs:
            for name in ("Clips", *_PANELS):
                ui.tab(name)
        with ui.tab_panels(tabs, value="Clips").classes("ow-panels").props("keep-alive"):
            with ui.tab_panel("Clips"):
                self._grid()
            self._panels = [view(ui.tab_panel(name), fill) for name, fill in _PANELS.items()]
        self._show()
        ui.timer(2.0, self._show)

    def _examine(self) -> None:
        self._sets.examine(self._opened)
        self._show()

    def _show(self) -> None:
        """Show how far the examination is, and what it has found."""
        clips, progress = self._opened.clips, self._opened.progress
        self._show_head(clips, progress is not None)
        self._show_progress(progress or self._opened.failed or "", "" if progress else "ow-bad")
        # What is typed would be lost with its field.
        if clips is not self._shown and not self._session.is_typing:
            self._shown = clips
            self._filter()
            for show in self._panels:
                show(self._session, clips)

    def _head(self, clips: ClipSet, is_running: bool) -> None:
        text("h2", clips.summary)
        with box("ow-row"):
            if is_running:
                button("Stop", self._opened.stop, "outline", small=True)
            else:
                again = "" if clips.examination is None else " again"
                examine = button(f"Examine all frames{again}", self._examine, "outline", small=True)
                examine.set_enabled(bool(clips.kept))
            button("Read the files again", partial(self.open, again=True), small=True)
        for line in clips.unsure:
            ui.label(line).classes("ow-warn")

    def _grid(self) -> None:
        """The filters, and the clips that they leave."""
        with box("ow-row ow-fields"):
            self._filters: dict[str, Any] = {
                name: ui.select(options, label=name.title(), value="", on_change=self._filter)
                for name, options in self._opened.clips.choices().items()
            }
            search = ui.input("Search names and captions", on_change=self._filter)
            self._filters["search"] = search.props("clearable debounce=300").classes("ow-wide")
        with box("ow-row"):
            self._count = text("div", "", "ow-grow", role="status")
            edit_buttons(self._session)
        self._show_cards = view(box("ow-grid ow-clips", role="list"), self._cards)
        with box("ow-row", "nav", aria_label="Pages of clips"):
            self._pages = ui.pagination(1, 1, direction_links=True, on_change=self._show_page)
            self._pages.props("max-pages=7 boundary-numbers")

    def _filter(self) -> None:
        self._pages.value = 1
        self._show_page()

    def _show_page(self) -> None:
        clips = self._opened.clips
        chosen = clips.chosen(**{name: field.value or "" for name, field in self._filters.items()})
        self._count.text = f"{len(chosen)} of {len(clips.entries)}"
        self._pages.max = max(1, -(-len(chosen) // _CARDS))
        self._pages.visible = self._pages.max > 1
        self._show_cards(clips, chosen, min(self._pages.value or 1, self._pages.max))

    def _cards(self, _: ClipSet, chosen: list[Entry], page: int) -> None:
        first = (page - 1) * _CARDS
        for index, entry in enumerate(chosen[first : first + _CARDS], first):
            self._card(entry, partial(open_clip, self._session, chosen, index))
        if not chosen:
            ui.label("No clip fits these filters.").classes("ow-muted")

    def _card(self, entry: Entry, opened: Callable[[], None]) -> None:
        name = one_line(entry.name)
        with box("ow-card ow-clip", "article", role="listitem"):
            label = f"{'' if entry.clip else 'Refused: '}Open {name}"
            with box("ow-open", "button", aria_label=label).on("click", opened):
                poster(self._session, entry)
            text("h3", name)
            ui.label(entry.summary).classes("ow-muted" if entry.clip else "ow-bad")
            # Also where there are none yet: an examination moves nothing.
            kinds = ", ".join(dict.fromkeys(note.kind for note in entry.notes))
            notes = "\n".join(note.text for note in entry.notes)
            text("div", kinds, "ow-warn ow-line", title=notes)
            caption(self._session, entry)


def _findings(_: EditSession, clips: ClipSet) -> None:
    """Everything that was found, by kind."""
    groups = clips.findings()
    if not groups and not clips.notes:
        ui.label("Nothing was found.").classes("ow-good")
    for note in clips.notes:
        ui.label(note)
    for kind, found in groups.items():
        title = f"{kind.capitalize()} ({len(found)})"
        with ui.expansion(title, value=kind == "refused").classes("ow-card"):
            facts((one_line(name), reason) for name, reason in found[:_FILES_SHOWN])
            if (others := len(found) - _FILES_SHOWN) > 0:
                ui.label(f"and {others} others; the filters of Clips show them")


def _duplicates(session: EditSession, clips: ClipSet) -> None:
    """Clips that are there twice, side by side."""
    pairs = clips.duplicates()
    if clips.examination is None:
        ui.label("Duplicates are found when all frames are examined.").classes("ow-muted")
    elif not pairs:
        ui.label("No clip is there twice.").classes("ow-good")
    for kind, first, second in pairs[:_PAIRS_SHOWN]:
        same = "the same content" if kind == "duplicate" else "look nearly the same"
        title = f"{one_line(first.name)} and {one_line(second.name)}: {same}"
        with card(title, "ow-pair", "h3"), box("ow-two"):
            for entry in (first, second):
                with box():
                    poster(session, entry)
                    ui.label(one_line(str(entry.path))).classes("ow-muted")
                    ui.label(clips.text(entry) or "No caption")
    if (others := len(pairs) - _PAIRS_SHOWN) > 0:
        ui.label(f"and {count(others, 'other pair')}").classes("ow-muted")


def _buckets(_: EditSession, clips: ClipSet) -> None:
    """How many clips have each shape, and what of them fills no batch."""
    most = max((number for _, number in clips.buckets), default=1)

    def bar(number: int) -> None:
        box("ow-bar").style(f"width: {100 * number / most:.1f}%")

    ui.label(
        f"The clips of a batch have the same number of frames and the same size. A batch has "
        f"{count(clips.config.train.batch_size, 'clip')} (train.batch_size)."
    )
    rows = (
        (name, str(number), partial(bar, number), clips.batches(number))
        for name, number in clips.buckets
    )
    table(("Bucket", "Clips", "", "Batches"), rows, "ow-buckets")


def _contact_sheet(session: EditSession, _: ClipSet) -> None:
    """The contact sheet, once it is drawn."""

    def pages(addresses: list[str]) -> None:
        for number, address in enumerate(addresses, 1):
            name = f"Page {number} of the contact sheet"
            box("ow-sheet", "img", src=address, alt=name, loading="lazy")

    async def draw() -> None:
        drawing.disable()
        await attempt(partial(session.sets.draw_sheet, session.opened))
        drawing.enable()
        show(session.opened.sheet_addresses)

    ui.label("First, middle and last frame of each clip as it is trained, on pages to print.")
    drawing = button("Draw the contact sheet", draw, "outline")
    show = view(box(), pages)
    show(session.opened.sheet_addresses)


_PANELS: dict[str, Callable[[EditSession, ClipSet], None]] = {
    "Findings": _findings,
    "Duplicates": _duplicates,
    "Buckets": _buckets,
    "Contact sheet": _contact_sheet,
}
