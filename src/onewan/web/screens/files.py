"""The screen Files: models and adapters."""

from __future__ import annotations

from nicegui import ui

from onewan.web.frame import frame
from onewan.web.page import Page


def add(page: Page) -> None:
    """Register the screen."""

    @ui.page("/files")
    def screen() -> None:
        with frame("Files", "/files"):
            ui.label(f"Runs are in {page.runs}")
