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
from onewan.serving.feed import Feed, Feeds
from onewan.web.elements import text
from onewan.web.frame import frame
from onewan.web.page import Page
from onewan.web.screens.run_controls import controls

_STYLES = ("pages/plots.css", "pages/players.css", "pages/runs.css", "run.css")
_SCRIPTS = ("pages/plots.js", "pages/players.js", "run.js")
_PARTS = (
    ("training", "Training"),
    ("samples", "Samples"),
    ("timesteps", "Noise levels"),
    ("speed", "Speed and memory"),
    ("events", "Events"),
    ("log", "Log"),
)
"""Ids and headings of the parts of the screen."""
_LOADING_SECONDS = 0.3
"""In which a browser loads the scripts, which it would wait for if events were read meanwhile."""


def add(page: Page) -> None:
    """Register the screen and the routes of its scripts."""
    feeds = Feeds(page.roots, lambda: page.jobs.machine.now)
    app.include_router(run_routes.router(feeds))

    @ui.page("/run/{name}")
    async def screen(name: str) -> None:
        try:
            folder = await asyncio.to_thread(page.roots.run, name)
        except OnewanError as error:
            raise HTTPException(404, error.message) from None
        # The events of a long run are read while the browser runs the page's scripts.
        background_tasks.create(_read(feeds, name))
        others = await asyncio.to_thread(find_runs, page.runs)
        with frame(name, "/", styles=_STYLES, scripts=_SCRIPTS):
            _elements(page, name, [other.name for other in others if other != folder])


async def _read(feeds: Feeds, name: str) -> None:
    await asyncio.sleep(_LOADING_SECONDS)
    try:
        await feeds.ask(name, Feed.summary)
    except (OnewanError, OSError):
        return  # the script asks for the same, and tells the user


def _elements(page: Page, name: str, others: list[str]) -> None:
    with ui.element("div").classes("run").props('id="run"') as view:
        view.props["data-run"] = name
        view.props["data-others"] = json.dumps(others)
        with ui.element("div").classes("head"):
            text("span", "").props('id="run-state"').classes("badge plain")
            text("p", "").props('id="run-facts"').classes("facts")
        # Its value is the script's: one that is given here Vue would set with each change.
        ui.element("progress").props('id="run-progress" max="1" aria-label="steps done"')
        with ui.element("div").classes("run-controls ow-row").props('id="run-controls"'):
            controls(page, name)
        text("p", "").props('id="run-told" role="status" hidden').classes("box bad")
        ui.element("div").props('id="run-problem" role="status"')
        ui.element("ul").classes("tiles").props('id="run-tiles"')
        with ui.element("nav").classes("run-parts").props('aria-label="parts of this page"'):
            for part, heading in _PARTS:
                ui.link(heading, f"#{part}")
        for part, heading in _PARTS:
            _part(part, heading)


def _part(part: str, heading: str) -> None:
    with ui.element("section").props(f'id="{part}"'):
        text("h2", heading)
        if part == "speed":
            ui.element("div").props('id="run-machine" role="group" aria-label="Machine"')
        if part == "training":
            ui.element("div").props('id="run-compare"')
        place = ui.element("div").props(f'id="run-{part}"')
        if part in ("training", "timesteps", "speed"):
            place.classes("plots")
