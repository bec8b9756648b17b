"""The screen Run: how a run stands, its curves and samples, its events and log.

The elements are made here; `resources/web/run.js` fills them from the answers of
`onewan.serving.run_routes`, which all who look at a run share.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial

from fastapi import HTTPException
from nicegui import app, background_tasks, ui

from onewan.errors import OnewanError
from onewan.runs import steering
from onewan.runs.actions import Steering, forced_stop
from onewan.runs.layout import RunLayout
from onewan.runs.status import find_runs
from onewan.serving import run_routes
from onewan.serving.feed import Feeds
from onewan.web.elements import box, button, tell, text
from onewan.web.frame import frame
from onewan.web.page import Page
from onewan.web.screens.run_dialogs import (
    ask_for_sample,
    ask_to_continue,
    ask_to_export,
    change_settings,
)

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
        others = await asyncio.to_thread(find_runs, page.roots.runs)
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
            _controls(page, name)
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


def _controls(page: Page, name: str) -> None:
    """The buttons with which the run is steered. What they send to its trainer is checked and sent
    by `onewan.runs.steering`; what continues a run is put into the queue."""
    layout, jobs = RunLayout(page.roots.runs / name), page.watch.jobs

    def steer(label: str, action: Callable[[], object]) -> ui.button:
        return button(label, action, "outline", about=name)

    def copy_path() -> None:
        ui.clipboard.write(str(layout.root))
        tell(f"Copied: {layout.root}")

    with box("ow-row", role="group", aria_label="Steer the run"):
        go_on = steer("Continue", partial(ask_to_continue, page, layout))
        stop = steer("Stop", partial(page.do, partial(jobs.stop, name)))
        force = steer("Force stop", partial(page.act, forced_stop(jobs, name)))
        save = steer("Save now", partial(page.do, partial(steering.ask, layout, "save")))
        sample = steer("Sample now", partial(ask_for_sample, page, layout))
        export = steer("Export", partial(ask_to_export, page, layout))
        change = steer("Change settings", partial(change_settings, layout))
        steer("Copy path", copy_path)
    note = text("p", "", role="status")

    def show() -> None:
        found = Steering.of(jobs.now, name)
        for each in (stop, force, save, sample, change):
            each.set_enabled(found.is_active)
        go_on.set_enabled(found.can_continue)
        looks = ("unelevated", "outline") if found.can_continue else ("outline", "unelevated")
        go_on.props(add=looks[0], remove=looks[1])
        export.set_enabled(found.can_export)
        note.text = found.note
        note.set_visibility(bool(found.note))

    page.jobs_changed.subscribe(show)
    show()
