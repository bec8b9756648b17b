"""The screen Runs: all runs, and the queue."""

from __future__ import annotations

from nicegui import ui

from onewan.web.frame import frame
from onewan.web.page import Page


def add(page: Page) -> None:
    """Register the screen."""

    @ui.page("/")
    def screen() -> None:
        with frame("Runs", "/"):
            ui.label(f"Runs are in {page.runs}")
