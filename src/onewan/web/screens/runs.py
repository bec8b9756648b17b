"""The screen Runs: all runs with where they stand, the queue of each device, and the machine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from urllib.parse import quote

from nicegui import app, ui
from nicegui.element import Element

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.arithmetic.durations import format_duration
from onewan.runs.jobs import QueuedRun, Snapshot
from onewan.runs.machine import gauges_of
from onewan.runs.status_text import kind_text, losses_text, steps_text
from onewan.runs.statuses import KnownRun
from onewan.serving.commands import command_line
from onewan.web.elements import asked, text
from onewan.web.frame import frame
from onewan.web.page import Page

SHOWN_AT_ONCE = 25
"""Runs that are listed before more are asked for."""

_COLORS = {"running": "ow-good", "failed": "ow-bad", "killed": "ow-bad", "silent": "ow-warn"}

Action = Callable[[], object]


def add(page: Page) -> None:
    """Register the screen, and begin to look at the runs."""
    app.on_startup(page.jobs.start)
    app.on_shutdown(page.jobs.stop)

    @ui.page("/")
    def screen() -> None:
        with frame("Runs", "/", styles=("runs.css",)):
            gauges = text("div", "").classes("ow-gauges").props('role="group" aria-label="Machine"')
            problem = text("p", "").classes("ow-bad").props('role="alert"')
            text("h2", "Queue")
            queue = _Queue(page)
            text("h2", "All runs")
            runs = _Runs(page)

        def machine_changed() -> None:
            gauges.clear()
            with gauges:
                for name, value, share in gauges_of(page.jobs.machine.now):
                    _gauge(name, value, share)

        def jobs_changed() -> None:
            now = page.jobs.jobs.now
            problem.text = now.problem
            problem.set_visibility(bool(now.problem))
            queue.show(now)
            runs.show(now)

        page.jobs.machine_changed.subscribe(machine_changed)
        page.jobs.jobs_changed.subscribe(jobs_changed)
        machine_changed()
        jobs_changed()


# ---------------------------------------------------------------------------------------- machine


def _gauge(name: str, value: str, share: float | None) -> None:
    with ui.element("div").classes("ow-card ow-gauge"):
        text("span", name).classes("ow-muted")
        text("span", value)
        if share is not None:
            _bar(share)


def _bar(share: float) -> Element:
    """A bar that repeats a number beside it."""
    bar = ui.element("div").classes("ow-bar").props('aria-hidden="true"')
    with bar:
        ui.element("div").style(f"width: {min(1.0, max(0.0, share)):.1%}")
    return bar


# ------------------------------------------------------------------------------------------ queue


class _Queue:
    """The queue of each device."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._shown: object = None
        self._box = ui.element("div").classes("ow-queues")

    def show(self, now: Snapshot) -> None:
        shown = (now.queue, now.paused)
        if shown == self._shown:
            return
        self._shown = shown
        self._box.clear()
        devices = dict.fromkeys([each.device for each in now.queue] + list(now.paused))
        with self._box:
            if not devices:
                text(
                    "p",
                    "Nothing waits. Runs that are started on this page are trained one after the "
                    "other on each device.",
                ).classes("ow-muted")
            for device in devices:
                entries = [each for each in now.queue if each.device == device]
                self._device(device, entries, device in now.paused)

    def _device(self, device: str, entries: Sequence[QueuedRun], paused: bool) -> None:
        with ui.element("section").classes("ow-card").props(f'aria-label="Queue of {device}"'):
            with ui.element("div").classes("ow-row"):
                text("h3", f"Device {device}{', paused' if paused else ''}").classes("ow-grow")
                _button(
                    "Start the queue" if paused else "Pause the queue",
                    f"on {device}",
                    partial(
                        _do, self._page, partial(self._page.jobs.jobs.pause, device, not paused)
                    ),
                )
            waiting = [each.entry.id for each in entries if each.entry.state == "waiting"]
            with ui.element("ol").classes("ow-list"):
                for each in entries:
                    self._entry(each, waiting)

    def _entry(self, each: QueuedRun, waiting: Sequence[str]) -> None:
        jobs, entry = self._page.jobs.jobs, each.entry
        words = {
            "waiting": each.reason,
            "starting": "is being started",
            "started": "is being trained",
            "failed": "ended before it began",
        }[entry.state]
        if entry.returns:
            words += "; waits again when it has stopped"
        with ui.element("li").classes("ow-entry"):
            text("strong", entry.run)
            text("span", words).classes("ow-grow" + (" ow-bad" if entry.state == "failed" else ""))
            with ui.element("div").classes("ow-row ow-buttons"):
                if entry.state == "waiting":
                    place, last = waiting.index(entry.id), len(waiting) - 1
                    self._action(entry.run, "Start next", partial(jobs.queue.start_first, entry.id))
                    if place > 0:
                        self._action(entry.run, "Up", partial(jobs.queue.move, entry.id, -1))
                    if place < last:
                        self._action(entry.run, "Down", partial(jobs.queue.move, entry.id, 1))
                if entry.state == "failed":
                    again = partial(jobs.queue.return_to_queue, entry.id)
                    self._action(entry.run, "Return to queue", again)
                if entry.state in ("waiting", "failed"):
                    self._action(entry.run, "Remove", partial(jobs.queue.remove, entry.id))
                else:
                    self._action(entry.run, "Stop", partial(jobs.stop, entry.run))
            with ui.element("details"):
                text("summary", "Command").props["aria-label"] = f"Command of {entry.run}"
                text("code", command_line(("train", *entry.arguments))).classes("ow-mono")
            if each.output:
                text("pre", each.output).classes("ow-mono ow-output").props('tabindex="0"')

    def _action(self, run: str, name: str, action: Action) -> None:
        _button(name, run, partial(_do, self._page, action))


# ------------------------------------------------------------------------------------------- runs


class _Runs:
    """The list of runs, of which those that match the search are shown, the first ones at once."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._rows: dict[str, _Row] = {}
        self._most = SHOWN_AT_ONCE
        search = ui.input("Search by name, state, model or method", on_change=self._show_again)
        self._search = search.classes("ow-search").props(
            'outlined dense clearable debounce="200" type="search"'
        )
        self._count = text("p", "").classes("ow-muted").props('role="status"')
        self._box = ui.element("ul").classes("ow-list")
        self._more = _button("Show more", "runs", self._show_more)

    def show(self, now: Snapshot) -> None:
        found = [run for run in now.runs if run.matches(self._search.value or "")]
        shown = found[: self._most]
        names = {run.name for run in shown}
        for name in [name for name in self._rows if name not in names]:
            self._rows.pop(name).box.delete()
        queued = {each.entry.run for each in now.queue if each.entry.state != "failed"}
        can_wait = bool(now.paused) or any(each.entry.state == "waiting" for each in now.queue)
        for place, run in enumerate(shown):
            known = _Shown(run, run.name in queued, can_wait)
            if (row := self._rows.get(run.name)) is not None:
                row.show(known)
            else:
                with self._box:
                    row = self._rows[run.name] = _Row(self._page, known)
            if self._box.default_slot.children[place] is not row.box:
                row.box.move(target_index=place)
        reading = "" if now.complete else "; more are being read"
        few = f"{len(found)} of {len(now.runs)} runs" if len(found) < len(now.runs) else ""
        self._count.text = (few or _count(len(found))) + reading
        self._more.set_visibility(len(found) > len(shown))

    def _show_again(self) -> None:
        self._most = SHOWN_AT_ONCE
        self.show(self._page.jobs.jobs.now)

    def _show_more(self) -> None:
        self._most += 4 * SHOWN_AT_ONCE
        self.show(self._page.jobs.jobs.now)


def _count(runs: int) -> str:
    return "No runs yet; set one up on New run" if not runs else f"{runs} run{'s'[: runs != 1]}"


@dataclass(frozen=True)
class _Shown:
    """What a row shows."""

    run: KnownRun
    is_queued: bool
    can_wait: bool
    """Whether something waits for a device, or a queue is paused."""

    @property
    def actions(self) -> tuple[str, ...]:
        """The names of what can be done with the run."""
        if self.run.is_trained:
            return ("Stop", *(("Return to queue",) if self.can_wait else ()), "Force stop")
        if self.is_queued:
            return ()
        return ("Continue", "Delete") if self.run.can_continue else ("Delete",)


class _Row:
    """A run in the list. Its elements are changed only where what they show has changed."""

    def __init__(self, page: Page, shown: _Shown) -> None:
        self._page, self._shown, self._name = page, shown, shown.run.name
        self.box = ui.element("li").classes("ow-card ow-run")
        with self.box:
            self._picture = ui.element("div").classes("ow-picture")
            with ui.element("div").classes("ow-facts"):
                with text("h3", ""):
                    ui.link(self._name, f"/run/{quote(self._name)}")
                self._state = text("p", "")
                self._bar = ui.element("div").classes("ow-progress")
                self._steps = text("p", "")
                self._loss = text("p", "")
                self._kind = text("p", "").classes("ow-muted")
                self._note = text("p", "").classes("ow-warn")
            self._actions = ui.element("div").classes("ow-row ow-actions")
        self._show_picture()
        self._show_actions()
        self._show_facts()

    def show(self, shown: _Shown) -> None:
        """Show what is known now."""
        before, self._shown = self._shown, shown
        if before.run.sample != shown.run.sample:
            self._show_picture()
        if before.actions != shown.actions:
            self._show_actions()
        if before.run != shown.run:
            self._show_facts()

    def _show_facts(self) -> None:
        run, state = self._shown.run, self._shown.run.state
        self._state.text = state
        self._state.classes(replace=_COLORS.get(state, ""))
        self._note.text = run.problem
        self._bar.clear()
        if (status := run.status) is None:
            return
        left = status.seconds_left
        self._steps.text = steps_text(status) + (
            "" if left is None else f", about {format_duration(left)} left"
        )
        losses = losses_text({name: expert.loss for name, expert in status.experts.items()})
        self._loss.text = losses and f"loss: {losses}"
        self._kind.text = kind_text(status)
        self._note.text = "; ".join(filter(None, (status.reason, *status.problems)))
        if status.steps:
            with self._bar:
                _bar(status.step / status.steps)

    def _show_picture(self) -> None:
        sample = self._shown.run.sample
        self._picture.clear()
        if sample is not None:
            with self._picture:
                picture = ui.element("img").props('loading="lazy" width="144" height="81"')
                picture.props["src"] = self._page.roots.address(sample, "poster")
                picture.props["alt"] = f"Newest sample of {self._name}"

    def _show_actions(self) -> None:
        jobs, name = self._page.jobs.jobs, self._name
        actions: dict[str, Action] = {
            "Continue": partial(_do, self._page, partial(jobs.go_on, name)),
            "Stop": partial(_do, self._page, partial(jobs.stop, name)),
            "Return to queue": partial(_do, self._page, partial(jobs.give_back, name)),
            "Force stop": self._ask_to_force,
            "Delete": self._ask_to_delete,
        }
        self._actions.clear()
        with self._actions:
            for each in self._shown.actions:
                _button(each, name, actions[each])

    async def _ask_to_force(self) -> None:
        status = self._shown.run.status
        saved = None if status is None else status.saved_step
        kept = f"the state of step {saved:,} is kept" if saved else "no state was saved yet"
        question = (
            f"The trainer of {self._name} is ended at once, whatever it is doing, and saves "
            f"nothing: {kept}. Stop ends it with its state saved."
        )
        if await asked(f"Force {self._name} to stop?", question, "Force stop"):
            await _do(self._page, partial(self._page.jobs.jobs.force_stop, self._name))

    async def _ask_to_delete(self) -> None:
        run = self._shown.run
        size = "" if run.status is None else f" ({format_bytes(run.status.bytes)})"
        question = (
            f"The folder {run.folder}{size} is deleted, with its weights, samples and saved "
            "states. This can't be undone. Clips, captions and the model stay."
        )
        if await asked(f"Delete {self._name}?", question, "Delete"):
            await _do(self._page, partial(self._page.jobs.jobs.delete, self._name))


# ---------------------------------------------------------------------------------- small elements


def _button(name: str, subject: str, action: Action) -> ui.button:
    """A button whose name for screen readers says what it is about."""

    async def pressed() -> None:
        # The button may be replaced before the action has ended, but its tab is still there.
        with ui.context.client:
            result = action()
            if isinstance(result, Awaitable):
                await result

    button = ui.button(name, on_click=pressed).props("flat dense no-caps")
    button.props["aria-label"] = f"{name}: {subject}"
    return button


async def _do(page: Page, action: Action) -> None:
    """Run `action` and tell the user the line that it returns, if it does."""

    def line() -> str | None:
        result = action()
        return result if isinstance(result, str) else None

    await page.jobs.do(line)
