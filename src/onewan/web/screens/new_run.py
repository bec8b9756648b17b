"""The screen New run: a run file as form and as text, its plan beside it, and its start."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from fastapi import Query
from nicegui import background_tasks, ui

from onewan.config.edits import Checked
from onewan.config.schema import ResolvedRun
from onewan.errors import OnewanError
from onewan.runs.status import find_runs
from onewan.serving.commands import Commands
from onewan.serving.new_runs import NewRun, NewRuns
from onewan.serving.plans import plan_facts, plan_of
from onewan.web.elements import box, button, card, facts, styled, tell, text
from onewan.web.form import Form
from onewan.web.frame import frame
from onewan.web.page import Page
from onewan.web.start_from import StartFrom

_PAUSE_SECONDS = 0.4
"""For which nothing is changed before the draft is kept; the plan is made after another such."""


def add(page: Page) -> None:
    """Register the screen."""
    new_runs = NewRuns(page.roots, page.watch.jobs.queue, page.commands)

    @ui.page("/new", response_timeout=30)
    async def screen(
        draft: Annotated[str, Query(max_length=40)] = "",
        resume: Annotated[str, Query(max_length=300)] = "",
    ) -> None:
        client = ui.context.client
        opened, problem = None, ""
        if draft:
            try:
                opened = await asyncio.to_thread(new_runs.open, draft, resume)
            except OnewanError as error:
                problem = error.message
        drafts = [] if opened else await asyncio.to_thread(new_runs.drafts.all)
        runs = [] if opened else await asyncio.to_thread(find_runs, page.roots.runs)
        scripts = ["new_run.js"] if opened else []
        with client, frame("New run", "/new", styles=["new_run.css"], scripts=scripts):
            if opened is not None:
                _Editor(page, opened)
                return
            StartFrom(new_runs, drafts, [folder.name for folder in runs])
            if problem:
                tell(problem)


class _Editor:
    """One draft, as form and as text."""

    def __init__(self, page: Page, draft: NewRun) -> None:
        self._page, self._draft, self._run = page, draft, draft.run
        self._following: asyncio.Task[None] | None = None
        self._head()
        with box("ow-editor"):
            with box("ow-form") as self._area:
                self._form = Form(self._run, self._take_text, self._put_text)
            with box("ow-beside"):
                self._plan = _Plan(page.commands, self._apply)
                with card("Run file"):
                    self._malformed = text("div", classes="ow-bad", role="alert")
                    self._text = ui.codemirror(
                        self._run.text, language="YAML", on_change=self._text_changed
                    ).classes("ow-yaml")
                    about = "The same settings as text. Comments and the order are kept;"
                    place = f"relative paths begin at {self._draft.file.parent}."
                    text("div", f"{about} {place}", "ow-muted")
        self._mark_malformed()
        self._follow()
        ui.context.client.on_delete(self._end)

    def _head(self) -> None:
        resumed = self._draft.resumed
        with box("ow-row ow-actions"):
            with box("ow-row") as self._starts:
                if resumed is None:
                    button("Start now", partial(self._start, first=True), "filled")
                    button("Add to queue", partial(self._start, first=False), "outline")
                else:
                    button(f"Continue {resumed.name}", partial(self._start, first=True), "filled")
            self._starting = text("div", classes="ow-told", role="status")
            ui.switch("All settings", on_change=lambda e: self._form.show_all(bool(e.value)))
            self._state = text("div", "Kept as a draft", "ow-muted ow-grow", aria_live="polite")
            button("Delete draft", self._delete)

    # ---------------------------------------------------------------------------- form and text

    def _take_text(self) -> bool:
        """Read what was typed as text; returns whether fields may be changed."""
        if self._text.value != self._run.text:
            self._run.replace(self._text.value)
            self._mark_malformed()
        return self._run.malformed is None

    def _put_text(self) -> None:
        self._text.set_value(self._run.text)

    def _text_changed(self) -> None:
        self._state.set_text("Not kept yet")
        self._follow()

    def _mark_malformed(self) -> None:
        problem = self._run.malformed
        told = f"{problem}. Correct it to use the form again." if problem else ""
        self._malformed.set_text(told)
        styled(self._area, inert=problem is not None)

    def _apply(self, overrides: list[str]) -> None:
        """Make changes that the plan advises."""
        self._form.change(partial(self._run.override, overrides))

    def _follow(self) -> None:
        """Bring form, draft and plan up to the text, once it is not changed any more."""
        if self._following is not None:
            self._following.cancel()
        self._following = background_tasks.create(self._bring_up(), name="new run")

    async def _bring_up(self) -> None:
        await asyncio.sleep(_PAUSE_SECONDS)
        if self._take_text():
            self._form.refresh()
        is_kept = await asyncio.to_thread(self._draft.keep)
        lost = "Not kept: this draft was changed or deleted in another tab"
        self._state.set_text("Kept as a draft" if is_kept else lost)
        await asyncio.sleep(_PAUSE_SECONDS)
        checked = await self._check()
        if checked.config is not None:
            await self._plan.make(checked.config)
            return
        count = len(checked.problems())
        which = f"these {count} problems are" if count > 1 else "this problem is"
        self._plan.clear(f"The plan is made when {which} solved:")

    def _end(self) -> None:
        if self._following is not None:
            self._following.cancel()
        self._run.replace(self._text.value)
        self._draft.keep()

    # ----------------------------------------------------------------------- problems and start

    async def _check(self) -> Checked:
        """What is wrong with the run file, which is shown."""
        checked = await asyncio.to_thread(self._draft.checked)
        self._show_problems(checked)
        return checked

    def _show_problems(self, checked: Checked) -> None:
        self._form.show(checked)
        self._plan.problems.clear()
        with self._plan.problems:
            for path, line in checked.problems():
                with box("ow-row ow-bad"):
                    text("div", line, "ow-grow")
                    if path is not None:
                        show = partial(self._form.reveal, path)
                        button("Show", show, about=str(path[-1]), small=True)
                    if path == ("output", "name") and (free := self._draft.other_name()):
                        use = partial(self._apply, [f"output.name={free}"])
                        button(f"Call it {free}", use, small=True)

    async def _start(self, *, first: bool) -> None:
        self._take_text()
        styled(self._starts, inert=True)
        try:
            config = (await self._check()).config
            if config is None:
                raise OnewanError("This can't be started before its problems are solved.")
            self._starting.set_text("Clips and model are being checked, which takes some seconds")
            command = await asyncio.to_thread(self._draft.command, config)
            if problems := await self._draft.rehearse(command):
                self._show_problems(Checked(config, {}, problems))
                raise OnewanError(f"It was not started: {problems[0]}")
            if await self._page.do(lambda: self._draft.enqueue(command, first=first)):
                ui.navigate.to("/")
        finally:
            self._starting.set_text("")
            styled(self._starts, inert=False)

    def _delete(self) -> None:
        self._draft.delete()
        ui.navigate.to("/new")


class _Plan:
    """The plan of the run file as it was last changed; `apply` makes changes that it advises, given
    as overrides of the command line."""

    def __init__(self, commands: Commands, apply: Callable[[list[str]], None]) -> None:
        self._commands, self._apply = commands, apply
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
