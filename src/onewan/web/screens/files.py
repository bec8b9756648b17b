"""The screen Files: what is in the folders of the page, and what each file is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from urllib.parse import quote, urlencode

from fastapi import Depends, HTTPException
from nicegui import ui

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.checkpoint.inspection import Inspection
from onewan.data.report import count
from onewan.errors import OnewanError
from onewan.serving.files import Entry, Listing, entry_at, find_files, inspection, summary
from onewan.web.command_card import command_card
from onewan.web.elements import copy_button, text
from onewan.web.frame import frame
from onewan.web.page import Page
from onewan.web.weight_forms import convert_form, merge_form

_ROWS = 50
"""Files that are shown at once."""
_MOST_CELL = 2000
"""Characters of a header's entry that are shown; some hold whole workflows."""
_MOST_TEXT = 200_000
"""Bytes of a run file that are shown."""
_KINDS = {"": "All", "weights": "Models and adapters", "video": "Videos", "run file": "Run files"}
_STYLES = ("files.css",)


def add(page: Page) -> None:
    """Register the screens of the list and of one file."""

    def known(root: str, path: str) -> Entry:
        try:
            return entry_at(page.roots, root, path)
        except OnewanError:
            raise HTTPException(404) from None

    at_address = Depends(known)

    @ui.page("/files")
    def listing(search: str = "", kind: str = "") -> None:
        with frame("Files", "/files", styles=_STYLES):
            _running(page)
            _List(page, search, kind if kind in _KINDS else "")

    @ui.page("/files/{root}/{path:path}")
    async def file(entry: Entry = at_address) -> None:
        with frame(entry.path.name, "/files", styles=_STYLES):
            ui.link("All files", "/files")
            ui.label(str(entry.path)).classes("ow-mono ow-muted")
            if entry.kind == "weights":
                await _weights(page, entry)
            else:
                await _other(page, entry)


def _running(page: Page) -> None:
    """Conversions and merges that are going on."""
    found = [
        each
        for each in page.commands.started
        if each.result is None and each.arguments[0] in ("convert", "merge")
    ]
    if found:
        text("h2", "In progress")
        for command in found:
            command_card(command)


class _List:
    """The list with its search."""

    def __init__(self, page: Page, search: str, kind: str) -> None:
        self._page = page
        self._listing = Listing((), True)
        self._limit = _ROWS
        with ui.element("div").classes("ow-row").props('role="search"'):
            self._search = ui.input("Search", value=search, on_change=self._changed)
            self._search.props("outlined dense clearable debounce=300").classes("ow-files-search")
            self._kind = ui.select(_KINDS, label="Kind", value=kind, on_change=self._changed)
            self._kind.props("outlined dense").classes("ow-files-kind")
            again = ui.button("Look again", icon="refresh", on_click=self._read)
            again.props("flat no-caps")
        self._count = ui.label("Looking through the folders ...").classes("ow-files-count")
        self._count.props('role="status"')
        self._rows = ui.element("ul").classes("ow-files")
        self._more = ui.button("Show more", on_click=self._show_more).props("outline no-caps")
        self._more.set_visibility(False)
        ui.timer(0, self._read, once=True)

    async def _read(self) -> None:
        self._listing = await asyncio.to_thread(find_files, self._page.roots)
        await self._show()

    async def _changed(self) -> None:
        self._limit = _ROWS
        given = {"search": self._search.value or "", "kind": self._kind.value or ""}
        query = urlencode({name: value for name, value in given.items() if value})
        ui.navigate.history.replace(f"/files?{query}" if query else "/files")
        await self._show()

    async def _show_more(self) -> None:
        self._limit += _ROWS
        await self._show()

    async def _show(self) -> None:
        found = await asyncio.to_thread(
            _matching, self._listing, (self._search.value or "").casefold(), self._kind.value
        )
        shown = found[: self._limit]
        summaries = await asyncio.to_thread(_summaries, shown)
        if self._rows.is_deleted:
            return
        self._rows.clear()
        with self._rows:
            for entry, what in zip(shown, summaries, strict=False):
                _row(entry, what)
        self._count.text = self._counted(found)
        self._more.set_visibility(len(found) > len(shown))

    def _counted(self, found: list[Entry]) -> str:
        size = format_bytes(sum(entry.size for entry in found))
        if not self._listing.entries:
            return "There are no models, adapters, videos or run files in the folders of this page."
        if not found:
            return "Nothing matches."
        more = "" if self._listing.complete else "; there are more, which are not listed"
        return f"{count(len(found), 'file')}, {size}{more}"


def _matching(listing: Listing, words: str, kind: str) -> list[Entry]:
    """The entries of a kind that have each word in their place."""
    return [
        entry
        for entry in listing.entries
        if (not kind or entry.kind == kind)
        and all(word in entry.place.casefold() for word in words.split())
    ]


def _summaries(entries: list[Entry]) -> list[str]:
    return [summary(entry) for entry in entries]


def _row(entry: Entry, what: str) -> None:
    with ui.element("li"):
        ui.link(entry.shown, f"/files/{quote(entry.place)}").classes("ow-files-name")
        ui.label(what).classes("ow-files-what ow-muted")
        ui.label(format_bytes(entry.size)).classes("ow-files-size")
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.modified))
        ui.label(when).classes("ow-files-when ow-muted")


# --------------------------------------------------------------------------------------- one file


async def _weights(page: Page, entry: Entry) -> None:
    found = await asyncio.to_thread(inspection, entry)
    ui.label(f"{found.summary}.").classes("ow-files-summary")
    _actions(page, entry)
    _facts(found)
    if found.kind in ("unreadable", "other"):
        return
    for part in found.components:
        text("h2", part.path.name)
        ui.label(f"{part.summary}.")
        _facts(part)
    if found.kind in ("model", "transformer", "vae", "text_encoder", "adapter"):
        convert_form(page, entry, found)
    if found.kind in ("model", "transformer", "adapter"):
        merge_form(page, entry, found)


def _actions(page: Page, entry: Entry) -> None:
    with ui.row().classes("ow-row ow-files-actions"):
        if entry.path.is_file():
            save = partial(ui.navigate.to, f"{page.roots.address(entry.path)}?save=1")
            ui.button("Download", icon="download", on_click=save).props("no-caps")
        copy_button(str(entry.path), "Copy the path")


def _facts(found: Inspection) -> None:
    """What is wrong with weights, who reads them, and what is known of them."""
    if found.problems:
        text("h3", "Problems")
        with ui.element("ul"):
            for problem in found.problems:
                text("li", problem).classes("ow-bad")
    if found.programs:
        text("h3", "Which programs read it")
        own = [] if found.problems else [("onewan", "yes", "")]
        rows = [(each.name, "yes" if each.reads else "no", each.note) for each in found.programs]
        _table([*own, *rows], ("Program", "Reads it", "How, or why not"))
    elsewhere = ("read by", "not by", "problem", "header")
    text("h3", "What it holds")
    _table([row for row in found.rows() if row[0] not in elsewhere])
    if found.metadata:
        with ui.expansion(f"Header: {count(len(found.metadata), 'value')}").classes(
            "ow-files-facts"
        ):
            _table(sorted(found.metadata.items()))


def _table(rows: Sequence[tuple[str, ...]], heads: tuple[str, ...] = ()) -> None:
    """A table whose rows begin with their names."""
    with (
        ui.element("div").classes("ow-scroll"),
        ui.element("table").classes("ow-table ow-files-facts"),
    ):
        if heads:
            with ui.element("thead"), ui.element("tr"):
                for head in heads:
                    text("th", head).props('scope="col"')
        with ui.element("tbody"):
            for name, *rest in rows:
                with ui.element("tr"):
                    text("th", name).props('scope="row"')
                    for each in rest:
                        cell = text("td", each[:_MOST_CELL])
                        cell.classes({"yes": "ow-good", "no": "ow-bad"}.get(each, ""))


async def _other(page: Page, entry: Entry) -> None:
    """A video, or a run file."""
    ui.label(f"{await asyncio.to_thread(summary, entry)}.").classes("ow-files-summary")
    _actions(page, entry)
    if entry.kind == "video":
        player = ui.element("video").classes("ow-files-video")
        player.props("controls loop muted playsinline preload=metadata")
        player.props["src"] = page.roots.address(entry.path)
        player.props["aria-label"] = entry.path.name
        return
    content = await asyncio.to_thread(_text_of, entry)
    text("h2", "Content")
    ui.label(content).classes("ow-mono ow-card").props('tabindex="0"')


def _text_of(entry: Entry) -> str:
    with entry.path.open("rb") as file:
        return file.read(_MOST_TEXT).decode("utf-8", "replace")
