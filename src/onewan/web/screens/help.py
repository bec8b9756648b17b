"""The screen Help: the machine, and the documentation."""

from __future__ import annotations

from nicegui import ui

from onewan.web.frame import frame
from onewan.web.page import Page


def add(page: Page) -> None:
    """Register the screen."""

    @ui.page("/help")
    def screen() -> None:
        with frame("Help", "/help"):
            ui.label(f"Runs are in {page.runs}")
