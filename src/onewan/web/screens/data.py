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
from onewan.doctor.clip_set import STATES, Entry
from onewan.errors import OnewanError, one_line
from onewan.runs.status import find_runs
from onewan.serving import clip_routes
from onewan.serving.clips import ClipQuery, ClipSets, OpenSet
from onewan.serving.commands import command_line
from onewan.variants import VARIANTS
from onewan.web.elements import tell, text
from onewan.web.frame import frame
from onewan.web.page import Page
from onewan.web.screens.captions import CaptionField, Desk, history_buttons
from onewan.web.screens.clip_player import ClipPlayer
from onewan.web.screens.data_report import PANELS, poster

_CARDS = 36
"""Clips on a page of the grid."""
_EXAMINED_AT_ONCE = 40
"""So few clips are examined without being asked to."""


def add(page: Page) -> None:
    """Register the screen, and the addresses of what it shows of clips."""
    sets = ClipSets(page.roots)
    app.include_router(clip_routes.router(sets))

    @ui.page("/data")
    async def screen(query: Annotated[ClipQuery, Query()]) -> None:
        runs = [folder.name for folder in await asyncio.to_thread(find_runs, page.runs)]
        with frame("Data", "/data", styles=["clips.css"], scripts=["clips.js"]):
            _Chooser(runs, query)
            if query.run or query.file or query.folder:
                area = ui.element("div").classes("ow-found")
                with area:
                    ui.label("Reading the headers of the files...").props('role="status"')
                await context.client.connected()
                if context.client.has_socket_connection:  # and not given up meanwhile
                    await _open(page, sets, query, area)


async def _open(
    page: Page, sets: ClipSets, query: ClipQuery, area: ui.element, *, again: bool = False
) -> None:
    try:
        opened = await asyncio.to_thread(partial(sets.open, query, again=again))
    except OnewanError as error:
        area.clear()
        with area, ui.element("div").classes("ow-card").props('role="alert"'):
            ui.label(error.message).classes("ow-bad")
            for line in error.details:
                ui.label(line)
        return
    area.clear()
    with area:
        tab = context.client.tab_id or context.client.id
        desk = Desk(sets, opened, f"{tab} {opened.key}", area)
        reload = partial(_open, page, sets, query, area, again=True)
        _DataScreen(page, desk, reload)


async def _examined(page: Page, sets: ClipSets, opened: OpenSet) -> None:
    """Run `onewan doctor`, and add what it has found."""

    def told(line: str) -> None:
        opened.progress = line.capitalize()

    opened.failed = None
    try:
        arguments = ["doctor", str(opened.run_file), "--json"]
        document = await page.commands.json_of(arguments, status=(0, 1), told=told)
        # Anew, since files may have changed, and changes of scene are known only now.
        opened.clips = await asyncio.to_thread(sets.clips, opened.clips.config)
        opened.clips.examined(document)
    except OnewanError as error:
        opened.failed = str(error)
    finally:
        opened.progress = None


class _Chooser:
    """Whose clips are shown."""

    def __init__(self, names: list[str], query: ClipQuery) -> None:
        kind = "run" if query.run else "file" if query.file else "folder" if query.folder else ""
        kind = kind or ("run" if names else "folder")
        with ui.element("section").classes("ow-card").props('aria-label="Whose clips"'):
            about = "See each clip as it is trained and what speaks against it, and edit captions."
            text("p", about).classes("ow-muted ow-about")
            options = {"run": "A run", "file": "A run file", "folder": "A folder"}
            toggle = ui.toggle(options, value=kind).props("no-caps unelevated")
            with ui.element("div").classes("ow-row ow-fields"):
                chosen_run = query.run if query.run in names else next(iter(names), None)
                run = ui.select(names, label="Run", value=chosen_run)
                file = ui.input("Run file", value=query.file)
                folder = ui.input("Folder", value=query.folder)
                own: dict[str, Any] = {
                    "variant": ui.select(list(VARIANTS), label="Model", value=query.variant),
                    "frames": ui.number("Most frames", value=query.frames, min=1, precision=0),
                    "size": ui.input("Size, such as 832x480", value=query.size),
                    "fps": ui.number("Frames per second", value=query.fps, min=0.1),
                    "strategy": ui.select(
                        ["", *get_args(Strategy)], label="Spans of videos", value=query.strategy
                    ),
                    "masks": ui.checkbox("Loss masks", value=query.masks),
                }
                for each in (run, file, folder, *own.values()):
                    if not isinstance(each, ui.checkbox):
                        each.props("outlined dense")
                run.bind_visibility_from(toggle, "value", value="run")
                file.bind_visibility_from(toggle, "value", value="file").classes("ow-wide")
                folder.bind_visibility_from(toggle, "value", value="folder").classes("ow-wide")
                for each in own.values():
                    each.bind_visibility_from(toggle, "value", value="folder")

                def go() -> None:
                    chosen: dict[str, Any] = {
                        toggle.value: (
                            {"run": run, "file": file, "folder": folder}[toggle.value].value or ""
                        ).strip()
                    }
                    if toggle.value == "folder":
                        chosen |= {name: each.value for name, each in own.items()}
                    given = {k: v for k, v in chosen.items() if v not in (None, "", False)}
                    ui.navigate.to(f"/data?{urlencode(given, errors='surrogateescape')}")

                ui.button("Show clips", on_click=go).props("no-caps")


class _DataScreen:
    """The clips of one data set."""

    def __init__(self, page: Page, desk: Desk, reload: Callable[[], Any]) -> None:
        self._page, self._desk, self._reload = page, desk, reload
        self._opened: OpenSet = desk.opened
        self._player = ClipPlayer(desk)
        self._chosen: list[Entry] = []
        self._timer = ui.timer(2.0, self._watch, active=False)
        self._head = ui.element("section").classes("ow-head").props('aria-label="What was found"')
        with ui.tabs().props("no-caps align=left dense") as self._tabs:
            for name in ("Clips", *PANELS):
                ui.tab(name)
        with ui.tab_panels(self._tabs, value="Clips").classes("ow-panels").props("keep-alive"):
            with ui.tab_panel("Clips"):
                self._clips_panel()
            self._panels = {}
            for name in PANELS:
                with ui.tab_panel(name) as panel:
                    self._panels[name] = panel
        self._show_all()
        kept = sum(entry.clip is not None for entry in self._opened.clips.entries)
        if self._opened.clips.examination is None and 0 < kept <= _EXAMINED_AT_ONCE:
            self._examine()

    def _show_all(self) -> None:
        self._show_head()
        self._filter()
        for name, panel in self._panels.items():
            panel.clear()
            with panel:
                PANELS[name](self._desk)

    # --- What was found ---------------------------------------------------------------------------

    def _show_head(self) -> None:
        opened = self._opened
        entries = opened.clips.entries
        kept = [entry for entry in entries if entry.clip is not None]
        numbers = [f"{count(len(kept), 'clip')} kept"]
        if noted := sum(bool(entry.notes) for entry in kept):
            numbers.append(f"{noted} with notes")
        if refused := len(entries) - len(kept):
            numbers.append(f"{count(refused, 'file')} refused")
        if held_out := sum(entry.held_out for entry in kept):
            numbers.append(f"{held_out} held out for validation")
        self._head.clear()
        with self._head:
            text("h2", ", ".join(numbers))
            with ui.element("div").classes("ow-row"):
                examined = opened.clips.examination is not None
                again = "Examine all frames again" if examined else "Examine all frames"
                self._button = ui.button(again, on_click=self._examine)
                self._button.set_enabled(bool(kept))
                self._stop = ui.button("Stop", on_click=opened.stop)
                for button in (self._button, self._stop):
                    button.props("no-caps outline dense")
                ui.button("Read the files again", on_click=self._reload).props("no-caps flat dense")
            self._progress = ui.label().classes("ow-line").props('role="status"')
            for line in opened.clips.unsure:
                ui.label(line).classes("ow-warn")
            command = one_line(command_line(["doctor", str(opened.run_file)]))
            ui.label(f"The same in a terminal: {command}").classes("ow-mono ow-muted")
        self._show_progress()

    def _show_progress(self) -> None:
        runs = self._opened.progress is not None
        self._progress.text = self._opened.progress or ""
        self._button.visible, self._stop.visible = not runs, runs
        self._timer.active = runs

    def _examine(self) -> None:
        """Let `onewan doctor` look at all frames, in a process of its own."""
        opened = self._opened
        if opened.progress is None:
            opened.progress = "Looking at all frames..."
            opened.task = asyncio.create_task(_examined(self._page, self._desk.sets, opened))
        self._show_progress()

    def _watch(self) -> None:
        if self._opened.progress is not None:
            self._show_progress()
        elif not self._desk.is_typing:  # what is typed would be lost with its field
            if self._opened.failed:
                tell(self._opened.failed, error=True)
            self._show_all()

    # --- Clips ------------------------------------------------------------------------------------

    def _clips_panel(self) -> None:
        entries = self._opened.clips.entries
        sources = sorted({entry.source for entry in entries if entry.source})
        buckets = [name for name, _ in self._opened.clips.buckets]
        with ui.element("div").classes("ow-row ow-fields"):
            change = self._filter
            self._state = ui.select(STATES, label="State", value="", on_change=change)
            shown = {"": "All", **{source: one_line(source) for source in sources}}
            self._source = ui.select(shown, label="Source", value="", on_change=change)
            shapes = {"": "All", **{name: name for name in buckets}}
            self._bucket = ui.select(shapes, label="Bucket", value="", on_change=change)
            self._search = ui.input("Search names and captions", on_change=change)
            self._search.props("clearable debounce=300").classes("ow-wide")
            for each in (self._state, self._source, self._bucket, self._search):
                each.props("outlined dense")
        with ui.element("div").classes("ow-row"):
            self._count = ui.label().props('role="status"').classes("ow-grow")
            history_buttons(self._desk)
        self._grid = ui.element("div").classes("ow-grid ow-clips").props('role="list"')
        with ui.element("nav").props('aria-label="Pages of clips"').classes("ow-row"):
            self._pages = ui.pagination(1, 1, direction_links=True, on_change=self._show_page)
            self._pages.props("max-pages=7 boundary-numbers")

    def _filter(self) -> None:
        self._chosen = self._opened.clips.chosen(
            state=self._state.value or "",
            source=self._source.value or "",
            bucket=self._bucket.value or "",
            search=self._search.value or "",
        )
        self._count.text = f"{len(self._chosen)} of {len(self._opened.clips.entries)}"
        self._pages.max = max(1, -(-len(self._chosen) // _CARDS))
        self._pages.visible = self._pages.max > 1
        if self._pages.value != 1:
            self._pages.value = 1  # which shows it
        else:
            self._show_page()

    def _show_page(self) -> None:
        first = ((self._pages.value or 1) - 1) * _CARDS
        self._grid.clear()
        with self._grid:
            for index, entry in enumerate(self._chosen[first : first + _CARDS], first):
                self._card(entry, index)
            if not self._chosen:
                ui.label("No clip fits these filters.").classes("ow-muted")

    def _card(self, entry: Entry, index: int) -> None:
        name = one_line(entry.name)
        with ui.element("article").classes("ow-card ow-clip").props('role="listitem"'):
            button = ui.element("button").classes("ow-open")
            button.props["aria-label"] = f"{'' if entry.clip else 'Refused: '}Open {name}"
            button.on("click", lambda: self._player.open(self._chosen, index))
            with button:
                if entry.clip is None:
                    ui.label("Refused").classes("ow-poster ow-no-poster")
                else:
                    poster(self._opened, entry)
            text("h3", name)
            if entry.clip is None:
                ui.label(entry.reason).classes("ow-bad")
            else:
                held_out = ", held out" if entry.held_out else ""
                mask = ", mask" if entry.clip.mask else ""
                ui.label(f"{entry.bucket}{mask}{held_out}").classes("ow-muted")
            # Also where there are none yet: an examination moves nothing.
            kinds = ui.label(", ".join(dict.fromkeys(note.kind for note in entry.notes)))
            kinds.classes("ow-warn ow-line")
            if entry.notes:
                kinds.tooltip("\n".join(note.text for note in entry.notes))
            CaptionField(self._desk, entry)
