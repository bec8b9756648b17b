"""`PlanView`: what a run needs, beside its form: whether it fits, how long it takes, what helps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from nicegui import ui

from onewan.config.schema import ResolvedRun
from onewan.errors import OnewanError
from onewan.serving.commands import Commands
from onewan.serving.plans import plan_facts, plan_of
from onewan.web.elements import box, button, card, facts, text


class PlanView:
    """The plan of the run file as it was last changed; `apply` makes changes that it advises, given
    as overrides of the command line."""

    def __init__(self, commands: Commands, apply: Callable[[list[str]], None]) -> None:
        self._commands, self._apply = commands, apply

    def build(self) -> None:
        """Make the elements, in the present element."""
        with card("Plan"):
            self._state = text("div", "The plan is being made.", "ow-muted", role="status")
            self.problems = box(role="status", aria_label="Problems")
            """For what is wrong with the run file."""
            self._content = box("ow-plan")

    async def make(self, config: ResolvedRun) -> None:
        """Make the plan of `config` and show it."""
        self._say("The plan is being made.")
        self._content.classes("ow-outdated")
        try:
            plan = await plan_of(config, self._commands)
        except (OnewanError, OSError) as error:
            self.clear(f"There is no plan: {error}")
            return
        self._say("It fits." if plan["fits"] else "It does not fit.", plan["fits"])
        self._content.classes(remove="ow-outdated").clear()
        with self._content:
            self._show(plan)

    def clear(self, why: str) -> None:
        """Show no plan, and `why`."""
        self._content.clear()
        self._say(why)

    def _say(self, line: str, good: bool | None = None) -> None:
        self._state.set_text(line)
        self._state.classes(replace={True: "ow-good", False: "ow-bad", None: "ow-muted"}[good])

    def _show(self, plan: dict[str, Any]) -> None:
        for problem in plan["problems"]:
            text("div", _sentence(problem), "ow-bad")
        facts(plan_facts(plan))
        if plan["suggestions"]:
            text("h3", "What would make it faster" if plan["fits"] else "What would make it fit")
        for suggestion in plan["suggestions"]:
            change = list(suggestion["change"])
            with box("ow-advice"):
                text("div", suggestion["text"])
                do = partial(self._apply, change)
                button("Do this", do, "outline", about=" ".join(change), small=True)
        if plan["notes"]:
            with ui.expansion(f"What was assumed ({len(plan['notes'])})").classes("ow-more"):
                for note in plan["notes"]:
                    text("div", _sentence(note), "ow-muted")


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."
