"""The screen Files: what is in the folders of the page, and what each file is."""

from __future__ import annotations

import asyncio
from functools import partial
from urllib.parse import urlencode

from fastapi import HTTPException
from nicegui import ui

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.checkpoint.inspection import Inspection
from onewan.data.report import count
from onewan.errors import OnewanError
from onewan.serving import files
from onewan.serving.weight_commands import CONVERTED, MERGED
from onewan.web.command_card import command_card
from onewan.web.elements import box, button, copy_button, styled, table, text
from onewan.web.frame import frame
from onewan.web.page import Page
from onewan.web.weight_forms import convert_form, merge_form

_ROWS = 50
"""Files that are shown at once."""
_STYLES = ("files.css",)
_READS = {True: ("yes", "ow-good"), False: ("no", "ow-bad")}


def add(page: Page) -> None:
    """Register the screens of the list and of one file."""

    @ui.page("/files")
    def listing(search: str = "", kind: str = "") -> None:
        with frame("Files", "/files", styles=_STYLES):
            if commands := page.commands.running("convert", "merge"):
                text("h2", "In progress")
                for command in commands:
                    command_card(page.roots, command)
            _List(page, search, kind if kind in files.KINDS else "")

    @ui.page("/files/{root}/{path:path}")
    async def file(root: str, path: str) -> None:
        try:
            entry = await asyncio.to_thread(files.entry_at, page.roots, root, path)
        except OnewanError:
            raise HTTPException(404) from None
        what = await asyncio.to_thread(files.summary, entry)
        address = page.roots.address(entry.path)
        with frame(entry.path.name, "/files", styles=_STYLES):
            ui.link("All files", "/files")
            text("div", entry.path, "ow-mono ow-muted")
            text("div", f"{what}.", "ow-files-summary")
            with box("ow-row ow-files-actions"):
                if entry.path.is_file():
                    styled(ui.button("Download", icon="download"), href=f"{address}?save=1")
                copy_button(str(entry.path), "Copy the path")
            if entry.kind == "weights":
                found = await asyncio.to_thread(files.inspection, entry)
                _facts(found)
                if found.kind in CONVERTED:
                    convert_form(page, entry, found)
                if found.kind in MERGED:
                    merge_form(page, entry, found)
            elif entry.kind == "video":
                video = box("ow-files-video", "video", src=address, aria_label=entry.path.name)
                video.props("controls loop muted playsinline preload=metadata")
            else:
                text("h2", "Content")
                content = await asyncio.to_thread(files.text_of, entry)
                text("div", content, "ow-mono ow-card", tabindex=0)


class _List:
    """The list with its search."""

    def __init__(self, page: Page, search: str, kind: str) -> None:
        self._page = page
        self._listing = files.Listing((), True)
        self._limit = _ROWS
        with box("ow-row", role="search"):
            self._search = ui.input("Search", value=search, on_change=self._show)
            self._search.props("clearable debounce=300").classes("ow-files-search")
            self._kind = ui.select(files.KINDS, label="Kind", value=kind, on_change=self._show)
            self._kind.classes("ow-files-kind")
            button("Look again", self._read, icon="refresh")
        self._count = text("div", "Reading the folders ...", "ow-files-count", role="status")
        self._rows = box("ow-files", "ul")
        self._more = button("Show more", self._show_more, "outline")
        self._more.set_visibility(False)
        ui.timer(0, self._read, once=True)

    async def _read(self) -> None:
        self._listing = await asyncio.to_thread(files.find_files, self._page.roots)
        await self._show()

    async def _show_more(self) -> None:
        self._limit += _ROWS
        await self._show()

    async def _show(self) -> None:
        given = {"search": self._search.value or "", "kind": self._kind.value}
        found = self._listing.matching(given["search"], given["kind"])
        shown = found.entries[: self._limit]
        summaries = await asyncio.to_thread(lambda: [files.summary(entry) for entry in shown])
        if self._rows.is_deleted:
            return
        query = urlencode({name: value for name, value in given.items() if value})
        ui.navigate.history.replace(f"/files?{query}" if query else "/files")
        self._rows.clear()
        with self._rows:
            for entry, what in zip(shown, summaries, strict=True):
                with box(tag="li"):
                    ui.link(entry.shown, entry.address).classes("ow-files-name")
                    text("div", what, "ow-files-what ow-muted")
                    text("div", format_bytes(entry.size), "ow-files-size")
                    text("div", entry.when, "ow-files-when ow-muted")
        self._more.set_visibility(len(found.entries) > len(shown))
        nothing = self._listing.entries and not found.entries
        self._count.text = "Nothing matches." if nothing else found.total


def _facts(found: Inspection) -> None:
    """What is wrong with weights, who reads them and what they hold, also of each component."""
    if found.problems:
        text("h3", "Problems")
        with box(tag="ul"):
            for problem in found.problems:
                text("li", problem, "ow-bad")
    if found.readers:
        text("h3", "Which programs read it")
        rows = [
            (program.name, partial(text, "span", *_READS[program.reads]), program.note)
            for program in found.readers
        ]
        table(("Program", "Reads it", "How, or why not"), rows, "ow-files-facts")
    text("h3", "What it holds")
    table((), found.facts(), "ow-files-facts")
    if header := found.header(longest=2000):
        with styled(ui.expansion(f"Header: {count(len(header), 'value')}"), "ow-files-facts"):
            table((), header, "ow-files-facts")
    for part in found.components:
        text("h2", part.path.name)
        text("div", f"{part.summary}.")
        _facts(part)
