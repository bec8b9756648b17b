"""The screen Data: the clips of a run."""

from __future__ import annotations

from nicegui import ui

from onewan.web.frame import frame
from onewan.web.page import Page


def add(page: Page) -> None:
    """Register the screen."""

    @ui.page("/data")
    def screen() -> None:
        with frame("Data", "/data"):
            ui.label(f"Runs are in {page.runs}")
