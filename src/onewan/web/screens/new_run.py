"""The screen New run: a run file as form and as text, its plan beside it, and its start."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Query
from nicegui import background_tasks, ui

from onewan import documents
from onewan.config.edits import Checked, RunText
from onewan.config.load import changed_fields, load_run
from onewan.config.schema import COMPONENTS, ResolvedRun
from onewan.document_edits import inline
from onewan.documents import KeyPath, get_path
from onewan.errors import OnewanError
from onewan.files import replacing
from onewan.presets.drafts import Drafts
from onewan.presets.earlier import with_absolute_paths
from onewan.web.elements import tell, text
from onewan.web.form import Form, problem_lines
from onewan.web.frame import frame
from onewan.web.plan_view import PlanView
from onewan.web.start_from import StartFrom, known_starts

if TYPE_CHECKING:
    from onewan.serving.roots import Roots
    from onewan.web.page import Page

_TYPING_SECONDS = 0.4
"""For which no key is pressed before what was typed is read."""
_PLAN_SECONDS = 0.8


def add(page: Page) -> None:
    """Register the screen."""
    drafts = Drafts(page.runs / ".drafts")

    @ui.page("/new", response_timeout=30)
    async def screen(
        draft: Annotated[str, Query(max_length=40)] = "",
        resume: Annotated[str, Query(max_length=300)] = "",
    ) -> None:
        def opened() -> tuple[RunText, Path | None] | None:
            found = drafts.read(draft)
            if found is None:
                return None
            return RunText(found), page.roots.run(resume) if resume else None

        client = ui.context.client
        problem = "This draft was started or deleted; choose what to begin with." if draft else ""
        try:
            found = await asyncio.to_thread(opened)
        except OnewanError as error:
            found, problem = None, error.message
        known = None if found else await asyncio.to_thread(known_starts, page.runs, drafts)
        scripts = ["new_run.js"] if found else []
        with client, frame("New run", "/new", styles=["new_run.css"], scripts=scripts):
            if found is not None:
                _Editor(page, drafts, draft, *found).build()
            elif known is not None:
                StartFrom(page, drafts).build(known)
                if problem:
                    tell(problem)


class _Later:
    """Runs the newest of several calls, when none came for `seconds`."""

    def __init__(self, seconds: float, do: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._seconds, self._do = seconds, do
        self._task: asyncio.Task[None] | None = None

    def call(self) -> None:
        self.cancel()
        self._task = background_tasks.create(self._wait(), name="later")

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _wait(self) -> None:
        await asyncio.sleep(self._seconds)
        await self._do()


class _Editor:
    """One draft, as form and as text."""

    def __init__(
        self, page: Page, drafts: Drafts, draft: str, run: RunText, resumed: Path | None
    ) -> None:
        self._page, self._drafts, self._draft, self._run = page, drafts, draft, run
        self._resumed = resumed
        """Folder of the run that is continued."""
        self._saved = run.text
        self._file = Path.cwd() / "run.yaml"
        """Where the run file would be: relative paths are those of this folder."""
        self._read = _Later(_TYPING_SECONDS, self._read_text)
        self._check = _Later(_PLAN_SECONDS, self._check_run)
        self._keep = _Later(_TYPING_SECONDS, self._save)
        self._starts: list[ui.button] = []
        self._form = Form(self._run, self._before, self._changed)
        self._plan = PlanView(page.commands, self._apply)

    def build(self) -> None:
        """Make the elements, in the present element."""
        self._head()
        with ui.element("div").classes("ow-editor"):
            with ui.element("div").classes("ow-form") as self._area:
                self._form.build()
            with ui.element("div").classes("ow-beside"):
                self._plan.build()
                with ui.element("section").classes("ow-card").props('aria-label="Run file"'):
                    text("h2", "Run file")
                    self._malformed = ui.label().classes("ow-bad").props('role="alert"')
                    self._text = ui.codemirror(
                        self._run.text, language="YAML", on_change=lambda: self._read.call()
                    ).classes("ow-yaml")
                    ui.label(
                        "The same settings as text. Comments and the order are kept; "
                        f"relative paths begin at {self._file.parent}."
                    ).classes("ow-muted")
        self._mark_malformed()
        self._check.call()
        ui.context.client.on_delete(self._end)

    def _head(self) -> None:
        with ui.element("div").classes("ow-row ow-actions"):
            if self._resumed is None:
                labels = {"Start now": True, "Add to queue": False}
            else:
                labels = {f"Continue {self._resumed.name}": True}
            for label, first in labels.items():
                start = ui.button(label, on_click=partial(self._start, first=first))
                self._starts.append(start.props("no-caps" if first else "outline no-caps"))
            ui.switch("All settings", on_change=lambda e: self._form.show_all(bool(e.value)))
            self._state = ui.label("Kept as a draft").classes("ow-muted ow-grow")
            self._state.props('aria-live="polite"')
            ui.button("Delete draft", on_click=self._delete).props("flat no-caps")

    # ---------------------------------------------------------------------------- form and text

    def _before(self) -> bool:
        """Read what was typed as text before a field is changed; whether the field may be."""
        if self._text.value != self._run.text:
            self._read.cancel()
            self._run.replace(self._text.value)
            self._mark_malformed()
        return self._run.malformed is None

    def _changed(self) -> None:
        self._text.set_value(self._run.text)
        self._note_change()

    async def _read_text(self) -> None:
        if self._text.value == self._run.text:
            return
        self._run.replace(self._text.value)
        self._mark_malformed()
        if self._run.malformed is None:
            self._form.refresh()
        self._note_change()

    def _mark_malformed(self) -> None:
        problem = self._run.malformed
        self._malformed.set_text(
            "" if problem is None else f"{problem}. The form goes on when this is corrected."
        )
        self._area.props["inert"] = problem is not None
        self._area.update()

    def _note_change(self) -> None:
        self._state.set_text("Not kept yet")
        self._keep.call()
        self._check.call()

    def _apply(self, overrides: list[str]) -> None:
        """Make changes that the plan advises."""
        if not self._before():
            return
        for override in overrides:
            name, _, value = override.partition("=")
            path = tuple(int(p) if p.isdecimal() else p for p in name.split("."))
            self._run.set(path, RunText(f"value: {value}").value(("value",)))
        self._form.refresh()
        self._changed()

    async def _save(self) -> None:
        text_now = self._run.text
        if await asyncio.to_thread(self._drafts.read, self._draft) not in (self._saved, text_now):
            self._state.set_text("Not kept: this draft was changed or deleted in another tab")
            return
        await asyncio.to_thread(self._drafts.write, self._draft, text_now)
        self._saved = text_now
        self._state.set_text("Kept as a draft")

    def _end(self) -> None:
        for later in (self._read, self._check, self._keep):
            later.cancel()
        self._plan.stop()
        if self._text.value != self._saved == self._drafts.read(self._draft):
            self._drafts.write(self._draft, self._text.value)

    # ------------------------------------------------------------------------- problems and plan

    async def _check_run(self) -> None:
        checked = await asyncio.to_thread(self._checked_run)
        self._show_problems(checked)
        if checked.config is None:
            count = len(checked.by_field) + len(checked.others)
            many = f"these {count} problems are" if count > 1 else "this problem is"
            self._plan.clear(f"The plan is made when {many} solved:")
        else:
            self._plan.make(checked.config)

    def _checked_run(self) -> Checked:
        checked = self._run.checked(self._file)
        if checked.config is None:
            return checked
        wrong = _outside(checked.config, self._page.roots)
        output = checked.config.output
        if output.dir.resolve() != self._page.runs:
            wrong["output", "dir"] = (
                f"Is {output.dir}, and only runs in {self._page.runs} are shown on this page; "
                "change it to that"
            )
        if self._resumed is None and self._is_taken(output.name):
            wrong["output", "name"] = f"There is a run called {output.name} already"
        return Checked(None if wrong else checked.config, wrong, [])

    def _show_problems(self, checked: Checked) -> None:
        self._form.show(checked)
        self._plan.problems.clear()
        with self._plan.problems:
            for path, line in problem_lines(checked):
                with ui.element("div").classes("ow-row ow-bad"):
                    ui.label(line).classes("ow-grow")
                    if path is not None:
                        go = ui.button("Show", on_click=partial(self._form.reveal, path))
                        go.props(f'flat dense no-caps aria-label="Show {path[-1]}"')
                    if path == ("output", "name") and "already" in line:
                        self._offer_free_name()

    def _offer_free_name(self) -> None:
        name = str(self._run.value(("output", "name")))
        free = next(n for i in itertools.count(2) if not self._is_taken(n := f"{name}-{i}"))
        use = ui.button(f"Call it {free}", on_click=lambda: self._apply([f"output.name={free}"]))
        use.props("flat dense no-caps")

    def _is_taken(self, name: str) -> bool:
        """Whether there is a run of this name, or one that waits."""
        waiting = {entry.run for entry in self._page.jobs.jobs.queue.entries()}
        return name in waiting or (self._page.runs / name).exists()

    # ------------------------------------------------------------------------------------ start

    async def _start(self, *, first: bool) -> None:
        self._before()
        for button in self._starts:
            button.disable()
        try:
            await self._check_and_start(first)
        except (OnewanError, OSError) as error:
            tell(str(error), error=True)
        finally:
            for button in self._starts:
                button.enable()

    async def _check_and_start(self, first: bool) -> None:
        checked = await asyncio.to_thread(self._checked_run)
        self._show_problems(checked)
        config = checked.config
        if config is None:
            raise OnewanError("This can't be started before its problems are solved.")
        words = await asyncio.to_thread(self._arguments, config)
        self._state.set_text("Clips and model are being checked, which takes some seconds")
        rehearsal = await self._page.commands.json_of(
            ["train", *words, "--dry-run", "--json"], status=(0, 1)
        )
        self._state.set_text("Kept as a draft")
        if problems := rehearsal["problems"]:
            self._show_problems(Checked(config, {}, problems))
            raise OnewanError(f"It was not started: {problems[0]}")
        if await self._page.jobs.do(lambda: self._enqueue(words, config, first)):
            self._drafts.delete(self._draft)
            ui.navigate.to("/")

    def _arguments(self, config: ResolvedRun) -> list[str]:
        """What ``onewan train`` is called with, once the run file is written."""
        if self._resumed is None:
            # With the draft's id, so that it is not the file of a run that waits.
            name = f"{config.output.name}_{self._draft}.yaml"
            file = self._page.runs / ".run_files" / name
            moved = with_absolute_paths(self._run.text, self._file)
            with replacing(file) as temporary:
                temporary.write_text(moved, encoding="utf-8", newline="\n")
            return [str(file)]
        return ["--resume", str(self._resumed), *_overrides(load_run(self._resumed), config)]

    def _enqueue(self, words: list[str], config: ResolvedRun, first: bool) -> str:
        options = [word for word in words if word.startswith("--")]
        place, *overrides = [word for word in words if not word.startswith("--")]
        queue = self._page.jobs.jobs.queue
        entry = queue.add(Path(place), options, overrides)
        if first:
            queue.start_first(entry.id)
            return f"{config.output.name}: starts as soon as its device is free"
        return f"{config.output.name}: was added to the queue"

    def _delete(self) -> None:
        self._saved = self._text.value
        self._drafts.delete(self._draft)
        ui.navigate.to("/new")


def _overrides(old: ResolvedRun, new: ResolvedRun) -> list[str]:
    """The changes from one to the other; a list is given as a whole."""
    values = new.model_dump(mode="json")
    found: dict[str, str] = {}
    for name, _, _ in changed_fields(old, new):
        parts = name.split(".")
        whole = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
        at = parts[:whole]
        found[".".join(at)] = inline(get_path(values, tuple(at)))
    return [f"{name}={value}" for name, value in found.items()]


def _outside(config: ResolvedRun, roots: Roots) -> dict[KeyPath, str]:
    """A message for each path of the run that is in none of the page's folders."""
    found: dict[KeyPath, str] = {}
    for name, value in documents.leaf_values(config.model_dump()):
        path: KeyPath = tuple(int(p) if p.isdecimal() else p for p in name.split("."))
        is_model = path[0] == "model" and path[1] in ("path", *COMPONENTS)
        for each in value if documents.is_tuple(value) else (value,):
            if isinstance(each, Path) or (is_model and os.path.isabs(str(each))):
                try:
                    roots.inside(str(each))
                except OnewanError as error:
                    found[path] = error.message
    return found
