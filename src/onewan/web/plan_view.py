"""`PlanView`: what a run needs, beside its form: whether it fits, how long it takes, what helps."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from nicegui import background_tasks, ui

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.arithmetic.durations import format_duration
from onewan.config.load import dump_run
from onewan.config.schema import ResolvedRun
from onewan.errors import OnewanError
from onewan.serving.commands import Commands
from onewan.web.elements import text


class PlanView:
    """The plan of the run file as it was last changed; `apply` makes changes that it advises, given
    as overrides of the command line."""

    def __init__(self, commands: Commands, apply: Callable[[list[str]], None]) -> None:
        self._commands, self._apply = commands, apply
        self._task: asyncio.Task[None] | None = None

    def build(self) -> None:
        """Make the elements, in the present element."""
        with ui.element("section").classes("ow-card").props('aria-label="Plan"'):
            text("h2", "Plan")
            self._state = ui.label("The plan is being made.").props('role="status"')
            self.problems = ui.element("div").props('role="status" aria-label="Problems"')
            """For what is wrong with the run file."""
            self._content = ui.element("div").classes("ow-plan")

    def make(self, config: ResolvedRun) -> None:
        """Make the plan of `config`; one that is being made is stopped."""
        self.stop()
        self._say("The plan is being made.")
        self._content.classes("ow-outdated")
        self._task = background_tasks.create(self._make(config), name="plan")

    def clear(self, why: str) -> None:
        """Show no plan, and `why`."""
        self.stop()
        self._content.clear()
        self._say(why)

    def stop(self) -> None:
        """Stop the plan that is being made."""
        if self._task is not None:
            self._task.cancel()

    async def _make(self, config: ResolvedRun) -> None:
        try:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "run.yaml"
                file.write_text(dump_run(config), encoding="utf-8")
                # The exit status is 1 for a run that does not fit.
                plan = await self._commands.json_of(["plan", str(file), "--json"], status=(0, 1))
        except (OnewanError, OSError) as error:
            self.clear(f"There is no plan: {error}")
            return
        self._content.clear()
        self._content.classes(remove="ow-outdated")
        self._say("It fits." if plan["fits"] else "It does not fit.", plan["fits"])
        with self._content:
            self._show(plan)

    def _say(self, line: str, good: bool | None = None) -> None:
        self._state.set_text(line)
        self._state.classes(remove="ow-good ow-bad ow-muted")
        self._state.classes({True: "ow-good", False: "ow-bad", None: "ow-muted"}[good])

    def _show(self, plan: dict[str, Any]) -> None:
        for problem in plan["problems"]:
            ui.label(f"{problem[0].upper()}{problem[1:]}.").classes("ow-bad")
        with ui.element("dl").classes("ow-facts"):
            for name, value in _facts(plan):
                text("dt", name)
                text("dd", value)
        if plan["suggestions"]:
            text("h3", "What would make it faster" if plan["fits"] else "What would make it fit")
        for suggestion in plan["suggestions"]:
            with ui.element("div").classes("ow-advice"):
                ui.label(suggestion["text"])
                change = list(suggestion["change"])
                ui.button("Do this", on_click=partial(self._apply, change)).props(
                    f'outline dense no-caps aria-label="Do this: {" ".join(change)}"'
                )
        if plan["notes"]:
            with ui.expansion(f"What was assumed ({len(plan['notes'])})").classes("ow-more"):
                for note in plan["notes"]:
                    ui.label(f"{note[0].upper()}{note[1:]}.").classes("ow-muted")


def _facts(plan: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values of what matters most in a plan."""
    machine, time = plan["machine"], plan["run_time"]
    name, size = machine["name"], format_bytes(machine["vram"])
    yield "Device", name if size in name else f"{name}, {size}"  # one by its size has no other name
    budget = format_bytes(machine["device_budget"])
    yield "Device memory", f"{format_bytes(plan['device_peak'])} of {budget}"
    budget = format_bytes(machine["host_budget"])
    yield "Host memory", f"{format_bytes(plan['host_peak'])} of {budget}"
    yield "One step", format_duration(time["step"])
    yield "Whole run", f"about {format_duration(time['total'])}"
    experts = ", ".join(f"{name} {count:,}" for name, count in time["expert_steps"].items())
    yield "Steps", f"{time['steps']:,} ({experts})"
    yield "Clips", f"{plan['clips']:,}" if plan["clips"] else "none yet"
    yield "Disk", format_bytes(sum(plan["disk"].values()))
