"""The screen Runs: all runs with where they stand, the queue of each device, and the machine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from urllib.parse import quote

from nicegui import app, ui

from onewan.runs.actions import Action, actions_of_entry, actions_of_run
from onewan.runs.jobs import QueuedRun, Snapshot
from onewan.runs.machine import Readings, gauges_of
from onewan.runs.status_text import kind_text, losses_text, progress_text
from onewan.runs.statuses import KnownRun
from onewan.serving.commands import command_line
from onewan.web.elements import box, button, text, view
from onewan.web.frame import frame
from onewan.web.page import Page

SHOWN_AT_ONCE = 25
"""Runs that are listed before more are asked for."""

_COLORS = {"running": "ow-good", "failed": "ow-bad", "killed": "ow-bad", "silent": "ow-warn"}


def add(page: Page) -> None:
    """Register the screen, and begin to look at the runs."""
    app.on_startup(page.watch.start)
    app.on_shutdown(page.watch.stop)

    @ui.page("/")
    def screen() -> None:
        with frame("Runs", "/", styles=("runs.css",)):
            gauges = view(box("ow-gauges", role="group", aria_label="Machine"), _gauges)
            problem = text("p", "", "ow-bad", role="alert")
            text("h2", "Queue")
            queues = view(box("ow-queues"), partial(_queues, page))
            text("h2", "All runs")
            runs = _Runs(page)

        def machine_changed() -> None:
            gauges(page.watch.machine.now)

        def jobs_changed() -> None:
            now = page.watch.jobs.now
            problem.text = now.problem
            problem.set_visibility(bool(now.problem))
            queues(now.queue, now.paused)
            runs.show(now)

        page.machine_changed.subscribe(machine_changed)
        page.jobs_changed.subscribe(jobs_changed)
        machine_changed()
        jobs_changed()


def _gauges(now: Readings) -> None:
    for name, value, share in gauges_of(now):
        with box("ow-card ow-gauge"):
            text("span", name, "ow-muted")
            text("span", value)
            if share is not None:
                _bar(share)


def _bar(share: float) -> None:
    """A bar that repeats a number beside it."""
    with box("ow-bar", aria_hidden="true"):
        box().style(f"width: {min(1.0, max(0.0, share)):.1%}")


def _buttons(page: Page, run: str, actions: Sequence[Action]) -> None:
    for action in actions:
        button(action.label, partial(page.act, action), about=run, small=True)


# ------------------------------------------------------------------------------------------ queue


def _queues(page: Page, queue: Sequence[QueuedRun], paused: Sequence[str]) -> None:
    """The queue of each device."""
    devices = dict.fromkeys([*(each.device for each in queue), *paused])
    if not devices:
        text(
            "p",
            "Nothing waits. Runs that are started on this page are trained one after the other on "
            "each device.",
            "ow-muted",
        )
    for device in devices:
        is_paused = device in paused
        with box("ow-card", "section", aria_label=f"Queue of {device}"):
            with box("ow-row"):
                text("h3", f"Device {device}{', paused' if is_paused else ''}", "ow-grow")
                label = "Start the queue" if is_paused else "Pause the queue"
                pause = partial(page.watch.jobs.pause, device, not is_paused)
                button(label, partial(page.do, pause), about=f"on {device}", small=True)
            with box("ow-list", "ol"):
                for each in queue:
                    if each.device == device:
                        _entry(page, each, queue)


def _entry(page: Page, each: QueuedRun, queue: Sequence[QueuedRun]) -> None:
    entry = each.entry
    with box("ow-entry", "li"):
        text("strong", entry.run)
        text("span", each.text, f"ow-grow {'ow-bad' if entry.state == 'failed' else ''}")
        with box("ow-row ow-buttons"):
            _buttons(page, entry.run, actions_of_entry(page.watch.jobs, each, queue))
        with box(tag="details"):
            text("summary", "Command", aria_label=f"Command of {entry.run}")
            text("code", command_line(("train", *entry.arguments)), "ow-mono")
        if each.output:
            text("pre", each.output, "ow-mono ow-output", tabindex="0")


# ------------------------------------------------------------------------------------------- runs


class _Runs:
    """The list of runs, of which those that match the search are shown, the first ones at once."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._rows: dict[str, _Row] = {}
        self._most = SHOWN_AT_ONCE
        self._search = ui.input(
            "Search by name, state, model or method",
            on_change=lambda: self._show_at_most(SHOWN_AT_ONCE),
        )
        self._search.classes("ow-search").props('clearable debounce="200" type="search"')
        self._count = text("p", "", "ow-muted", role="status")
        self._box = box("ow-list", "ul")

        def show_more() -> None:
            self._show_at_most(self._most + 4 * SHOWN_AT_ONCE)

        self._more = button("Show more", show_more, about="runs", small=True)

    def show(self, now: Snapshot) -> None:
        found = [run for run in now.runs if run.matches(self._search.value or "")]
        shown = found[: self._most]
        for name in self._rows.keys() - {run.name for run in shown}:
            self._rows.pop(name).box.delete()
        for place, run in enumerate(shown):
            if run.name not in self._rows:
                with self._box:
                    self._rows[run.name] = _Row(self._page, run.name)
            row = self._rows[run.name]
            row.show(run, now)
            if self._box.default_slot.children[place] is not row.box:
                row.box.move(target_index=place)
        self._count.text = _count_text(len(found), now)
        self._more.set_visibility(len(found) > len(shown))

    def _show_at_most(self, most: int) -> None:
        self._most = most
        self.show(self._page.watch.jobs.now)


def _count_text(found: int, now: Snapshot) -> str:
    count = f"{found} run{'s'[: found != 1]}" if found else "No runs yet; set one up on New run"
    if found < len(now.runs):
        count = f"{found} of {len(now.runs)} runs"
    return count if now.complete else f"{count}; more are being read"


class _Row:
    """A run in the list. Of its parts, those are made anew whose content has changed."""

    def __init__(self, page: Page, name: str) -> None:
        self._page = page
        self.box = box("ow-card ow-run", "li")
        with self.box:
            self._picture = view(box("ow-picture"), partial(_picture, page, name))
            with box("ow-facts"):
                with text("h3"):
                    ui.link(name, f"/run/{quote(name)}")
                self._facts = view(box(), _facts)
            self._actions = view(box("ow-row ow-actions"), partial(_buttons, page, name))

    def show(self, run: KnownRun, now: Snapshot) -> None:
        self._picture(run.sample)
        self._facts(run)
        self._actions(actions_of_run(self._page.watch.jobs, run, now))


def _picture(page: Page, name: str, sample: Path | None) -> None:
    if sample is not None:
        address = page.roots.address(sample, "poster")
        about = f"Newest sample of {name}"
        box(tag="img", src=address, alt=about, loading="lazy", width=144, height=81)


def _facts(run: KnownRun) -> None:
    text("p", run.state, _COLORS.get(run.state, ""))
    notes = [run.problem]
    if (status := run.status) is not None:
        if status.steps:
            _bar(status.step / status.steps)
        text("p", progress_text(status))
        if losses := losses_text({name: each.loss for name, each in status.experts.items()}):
            text("p", f"loss: {losses}")
        text("p", kind_text(status), "ow-muted")
        notes = [status.reason, *status.problems]
    text("p", "; ".join(filter(None, notes)), "ow-warn")
