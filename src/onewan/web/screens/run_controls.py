"""`controls`: the buttons with which a run is steered from its screen.

What a button sends to the trainer is checked and sent by `onewan.runs.steering`; what continues a
run is put into the queue.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from nicegui import ui

from onewan.runs import steering
from onewan.runs.actions import Steering, forced_stop
from onewan.runs.layout import RunLayout
from onewan.web.elements import box, button, tell, text
from onewan.web.page import Page
from onewan.web.screens.run_dialogs import (
    ask_for_sample,
    ask_to_continue,
    ask_to_export,
    change_settings,
)


def controls(page: Page, name: str) -> None:
    """The buttons of the run called `name`."""
    layout, jobs = RunLayout(page.runs / name), page.watch.jobs

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
