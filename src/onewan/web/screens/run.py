"""The screen Run: how a run stands, its curves and samples, its events and log.

The elements are made here; `resources/web/run.js` fills them from the answers of
`onewan.serving.run_routes`, which all who look at a run share.
"""

from __future__ import annotations

import asyncio
import json

from fastapi import HTTPException
from nicegui import app, background_tasks, ui

from onewan.errors import OnewanError
from onewan.runs.status import find_runs
from onewan.serving import run_routes
from onewan.serving.feed import Feeds
from onewan.web.elements import box, text
from onewan.web.frame import frame
from onewan.web.page import Page
from onewan.web.screens.run_controls import controls

_STYLES = ("pages/plots.css", "pages/players.css", "pages/runs.css", "run.css")
_SCRIPTS = ("pages/plots.js", "pages/players.js", "run.js")
_PARTS = {
    "training": "Training",
    "samples": "Samples",
    "timesteps": "Noise levels",
    "speed": "Speed and memory",
    "events": "Events",
    "log": "Log",
}
"""Ids and headings of the parts of the screen."""


def add(page: Page) -> None:
    """Register the screen and the routes of its scripts."""
    feeds = Feeds(page.roots, lambda: page.watch.machine.now)
    app.include_router(run_routes.router(feeds))

    @ui.page("/run/{name}")
    async def screen(name: str) -> None:
        try:
            folder = await asyncio.to_thread(page.roots.run, name)
        except OnewanError as error:
            raise HTTPException(404, error.message) from None
        # The events of a long run are read while the browser runs the page's scripts.
        background_tasks.create(feeds.read_ahead(name))
        others = await asyncio.to_thread(find_runs, page.runs)
        with frame(name, "/", styles=_STYLES, scripts=_SCRIPTS):
            _elements(page, name, [other.name for other in others if other != folder])


def _elements(page: Page, name: str, others: list[str]) -> None:
    with box("run", id="run", data_run=name, data_others=json.dumps(others)):
        with box("head"):
            text("span", "", "badge plain", id="run-state")
            text("p", "", "facts", id="run-facts")
        # Its value is the script's: one that is given here Vue would set with each change.
        box(tag="progress", id="run-progress", max=1, aria_label="steps done")
        with box("run-controls ow-row", id="run-controls"):
            controls(page, name)
        text("p", "", "box bad", id="run-told", role="status", hidden=True)
        box(id="run-problem", role="status")
        box("tiles", "ul", id="run-tiles")
        with box("run-parts", "nav", aria_label="parts of this page"):
            for part, heading in _PARTS.items():
                ui.link(heading, f"#{part}")
        for part, heading in _PARTS.items():
            with box(tag="section", id=part):
                text("h2", heading)
                if part == "speed":
                    box(id="run-machine", role="group", aria_label="Machine")
                if part == "training":
                    box(id="run-compare")
                has_plots = part in ("training", "timesteps", "speed")
                box("plots" if has_plots else "", id=f"run-{part}")
