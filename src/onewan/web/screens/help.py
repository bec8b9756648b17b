"""The screen Help: the documentation, the machine, and the keys."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastapi import Depends, HTTPException
from nicegui import ui

from onewan.doctor.diagnosis import Diagnosis
from onewan.doctor.environment import environment_ahead
from onewan.serving.documentation import DocPage, find, pages
from onewan.web.elements import copy_button, text
from onewan.web.frame import frame
from onewan.web.page import Page

_STYLES = ("help.css",)
KEYS = (
    ("Tab, Shift + Tab", "to the next or the previous button, field or link"),
    ("Enter, Space", "press the button, open the list, follow the link"),
    ("Escape", "close the dialog or the list"),
    ("Left, Right", "in a clip's dialog: the previous or the next clip"),
    ("Ctrl + Enter", "in a caption: save it"),
)
"""What the keyboard does, besides what browsers do themselves."""


def add(page: Page) -> None:
    """Register the screens of help and of one page of the documentation."""
    del page

    def known(name: str) -> DocPage:
        found = pages().get(name)
        if found is None:
            raise HTTPException(404)
        return found

    of_name = Depends(known)

    @ui.page("/help")
    def screen(search: str = "") -> None:
        with frame("Help", "/help", styles=_STYLES):
            _Documentation(search)
            text("h2", "This machine")
            ui.label("What onewan doctor says of it. It can be pasted into a bug report.")
            _Environment()
            text("h2", "Keyboard")
            with ui.element("table").classes("ow-table ow-help-keys"), ui.element("tbody"):
                for key, what in KEYS:
                    with ui.element("tr"):
                        text("th", key).props('scope="row"')
                        text("td", what)

    @ui.page("/help/{name}")
    def document(found: DocPage = of_name) -> None:
        with frame(found.title, "/help", styles=_STYLES):
            ui.link("All of the documentation", "/help")
            # Made from the package's own files, with HTML in them as text.
            ui.html(found.html, sanitize=False).classes("ow-doc")


class _Documentation:
    """The list of pages, or what was found in them."""

    def __init__(self, search: str) -> None:
        text("h2", "Documentation")
        with ui.element("div").props('role="search"'):
            field = ui.input("Search the documentation", value=search)
            field.props("outlined dense clearable debounce=200").classes("ow-help-search")
        self._count = ui.label().props('role="status"')
        self._list = ui.element("ul").classes("ow-help-list")
        field.on_value_change(lambda event: self._show(event.value or ""))
        self._show(search)

    def _show(self, words: str) -> None:
        self._list.clear()
        with self._list:
            if not words.strip():
                self._count.text = ""
                for name, page in pages().items():
                    with ui.element("li"):
                        ui.link(page.title, f"/help/{name}")
                return
            hits = find(words)
            self._count.text = f"{len(hits)} found" if hits else "Nothing has all of these words."
            for hit in hits:
                place = f"/help/{hit.section.page}"
                anchor = f"#{hit.section.anchor}" if hit.section.anchor else ""
                with ui.element("li"):
                    title = pages()[hit.section.page].title
                    own = hit.section.title
                    ui.link(own if own == title else f"{title}: {own}", f"{place}{anchor}")
                    ui.label(hit.excerpt).classes("ow-muted")


class _Environment:
    """The report on the machine, which is made once for all viewers."""

    _lines: Sequence[str] = ()

    def __init__(self) -> None:
        self._report = ui.label("Looking at the machine ...").classes("ow-mono ow-card")
        self._report.classes("ow-help-report").props('tabindex="0" role="status"')
        self._buttons = ui.row().classes("ow-row ow-help-buttons")
        ui.timer(0, self._first, once=True)

    async def _first(self) -> None:
        if not _Environment._lines:
            await self._look()
        else:
            self._show()

    async def _look(self) -> None:
        self._report.text = "Looking at the machine ..."
        _Environment._lines = await asyncio.to_thread(_environment)
        self._show()

    def _show(self) -> None:
        if self._report.is_deleted:
            return
        self._report.text = "\n".join(_Environment._lines)
        self._buttons.clear()
        with self._buttons:
            copy_button(self._report.text, "Copy the report")
            ui.button("Look again", icon="refresh", on_click=self._look).props("flat no-caps")


def _environment() -> list[str]:
    # It imports torch in a process of its own.
    return list(Diagnosis(environment=environment_ahead()()).lines())
