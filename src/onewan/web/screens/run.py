"""The screen Run: one run."""

from __future__ import annotations

from nicegui import ui

from onewan.web.frame import frame
from onewan.web.page import Page


def add(page: Page) -> None:
    """Register the screen."""

    @ui.page("/run/{name}")
    def screen(name: str) -> None:
        with frame(name, "/"):
            ui.label(f"Runs are in {page.runs}")
