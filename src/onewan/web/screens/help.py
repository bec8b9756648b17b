"""The screen Help: the documentation and the machine."""

from __future__ import annotations

import asyncio

from fastapi import HTTPException
from nicegui import ui

from onewan.doctor.diagnosis import environment_report
from onewan.serving.documentation import contents, find, pages
from onewan.web.elements import box, button, copy_button, text
from onewan.web.frame import frame
from onewan.web.page import Page

_STYLES = ("help.css",)


def add(page: Page) -> None:
    """Register the screens of help and of one page of the documentation."""
    del page

    @ui.page("/help")
    def screen(search: str = "") -> None:
        with frame("Help", "/help", styles=_STYLES):
            _documentation(search)
            _machine()
            text("h2", "Keyboard")
            ui.link("What the keys do", "/help/page#keyboard")

    @ui.page("/help/{name}")
    def document(name: str) -> None:
        if (found := pages().get(name)) is None:
            raise HTTPException(404)
        with frame(found.title, "/help", styles=_STYLES):
            ui.link("All of the documentation", "/help")
            # Made from the package's own files, with HTML in them as text.
            ui.html(found.html, sanitize=False).classes("ow-doc")


def _documentation(search: str) -> None:
    """The list of pages, or what was found in them."""

    def show(words: str) -> None:
        hits = find(words) if words.strip() else contents()
        count = f"{len(hits)} found" if hits else "Nothing has all of these words."
        status.text = count if words.strip() else ""
        listed.clear()
        with listed:
            for hit in hits:
                with box(tag="li"):
                    ui.link(hit.section.full_title, hit.section.address)
                    text("div", hit.excerpt, "ow-muted")

    text("h2", "Documentation")
    with box(role="search"):
        field = ui.input("Search the documentation", value=search)
        field.props("clearable debounce=200").classes("ow-help-search")
    status = text("div", role="status")
    listed = box("ow-help-list", "ul")
    field.on_value_change(lambda: show(field.value or ""))
    show(search)


def _machine() -> None:
    """The report on the machine, which can be copied."""

    async def look() -> None:
        shown.text = await asyncio.to_thread(environment_report)

    async def again() -> None:
        shown.text = "Looking at the machine ..."
        environment_report.cache_clear()
        await look()

    text("h2", "This machine")
    text("div", "What onewan doctor says of it. It can be pasted into a bug report.")
    shown = text("div", "Looking at the machine ...", "ow-mono ow-card ow-help-report")
    shown.props('tabindex="0" role="status"')
    with box("ow-row"):
        copy_button(lambda: shown.text, "Copy the report")
        button("Look again", again, icon="refresh")
    ui.timer(0, look, once=True)
