"""The screen New run: setting up a run."""

from __future__ import annotations

from nicegui import ui

from onewan.web.frame import frame
from onewan.web.page import Page


def add(page: Page) -> None:
    """Register the screen."""

    @ui.page("/new")
    def screen() -> None:
        with frame("New run", "/new"):
            ui.label(f"Runs are in {page.runs}")
