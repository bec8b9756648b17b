"""`controls`: the buttons with which a run is steered from its screen, and the question of each.

What a button sends to the trainer is checked and sent by `onewan.runs.steering`; what continues a
run is put into the queue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nicegui import ui

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.config.load import load_run
from onewan.config.method import AdapterMethod
from onewan.errors import OnewanError
from onewan.files import total_bytes
from onewan.runs import steering
from onewan.runs.control import Request
from onewan.runs.layout import RunLayout
from onewan.runs.statuses import KnownRun
from onewan.web.elements import asked, attempt, dialog, tell, text
from onewan.web.page import Page
from onewan.web.screens.run_dialogs import ask_for_sample, change_settings

FORMATS = {
    "comfyui": "ComfyUI, diffusers, musubi-tuner, DiffSynth-Studio",
    "no_alpha": "as comfyui, and also ai-toolkit and diffusion-pipe",
    "diffusers": "diffusers",
    "kohya": "ComfyUI, diffusers, musubi-tuner",
}
"""Which programs read the key formats of exported adapters."""
_MODEL_FORMATS = {"comfyui": "ComfyUI: one file", "diffusers": "diffusers: a folder"}
_NEWEST_EXPORTS = 3
"""Steps whose exported files can be downloaded."""


def controls(page: Page, name: str) -> None:
    """The buttons of the run called `name`."""
    _Controls(page, name)


class _Controls:
    def __init__(self, page: Page, name: str) -> None:
        self._page, self._name = page, name
        self._layout = RunLayout(page.runs / name)
        self._running: list[ui.button] = []
        with ui.element("div").classes("ow-row").props('role="group" aria-label="Steer the run"'):
            self._go_on = self._button("Continue", self._ask_to_continue)
            self._while_running("Stop", partial(self._do, lambda: page.jobs.jobs.stop(name)))
            self._while_running("Force stop", self._ask_to_force)
            self._while_running("Save now", partial(self._request, "save"))
            self._while_running("Sample now", partial(ask_for_sample, page, self._layout))
            self._export = self._button("Export", self._ask_to_export)
            self._while_running("Change settings", partial(change_settings, self._layout))
            self._button("Copy path", self._copy_path)
        self._note = text("p", "").props('role="status"')
        page.jobs.jobs_changed.subscribe(self._show)
        self._show()

    def _button(self, label: str, action: Callable[[], object]) -> ui.button:
        button = ui.button(label, on_click=action).props("outline no-caps")
        button.props["aria-label"] = f"{label}: {self._name}"
        return button

    def _while_running(self, label: str, action: Callable[[], object]) -> None:
        self._running.append(self._button(label, action))

    def _show(self) -> None:
        known = self._known()
        status = None if known is None else known.status
        active = known is not None and bool(
            known.is_trained or (status is not None and status.state in ("running", "silent"))
        )
        entry = next((e for e in self._page.jobs.jobs.now.queue if e.entry.run == self._name), None)
        waits = entry is not None and entry.entry.state != "failed" and not active
        for button in self._running:
            button.set_enabled(active)
        goes_on = status is not None and not active and not waits
        self._go_on.set_enabled(goes_on)
        self._go_on.props(
            add="unelevated" if goes_on else "outline",
            remove="outline" if goes_on else "unelevated",
        )
        self._export.set_enabled(status is not None and (active or status.saved_step is not None))
        note = ""
        if waits and entry is not None:
            note = f"In the queue: {entry.reason or 'is being started'}."
        elif entry is not None and not active:
            note = "Its trainer ended before the run began; the screen Runs shows what it said."
        self._note.text = note
        self._note.set_visibility(bool(note))

    def _known(self) -> KnownRun | None:
        return next((r for r in self._page.jobs.jobs.now.runs if r.name == self._name), None)

    async def _do(self, action: Callable[[], str | None]) -> bool:
        return await self._page.jobs.do(action)

    async def _request(self, name: Request) -> None:
        await self._do(lambda: steering.ask(self._layout, name))

    def _copy_path(self) -> None:
        ui.clipboard.write(str(self._layout.root))
        tell(f"Copied: {self._layout.root}")

    async def _ask_to_force(self) -> None:
        known = self._known()
        saved = known.status.saved_step if known is not None and known.status is not None else None
        kept = f"the state of step {saved:,} is kept" if saved else "no state was saved yet"
        question = (
            f"The trainer is ended at once, whatever it is doing, and saves nothing: {kept}. "
            "Stop ends it with its state saved."
        )
        if await asked(f"Force {self._name} to stop?", question, "Force stop"):
            await self._do(lambda: self._page.jobs.jobs.force_stop(self._name))

    # ------------------------------------------------------------------------------- continuing

    async def _ask_to_continue(self) -> None:
        standing = await attempt(lambda: steering.Standing.of(self._layout))
        if standing is None:
            return
        with dialog(f"Continue {self._name}", "run-dialog") as box:
            number = ui.number("Continue to step", value=standing.proposed, min=1, precision=0)
            number.without_auto_validation()  # which would take the error away again
            words = ui.element("div").props('role="status"')
            changed = ui.checkbox("Clips or captions have changed: train on them as they are now")
            with ui.element("div").classes("ow-row"):
                start = ui.button("Continue", on_click=lambda: box.submit(True)).props("no-caps")
                ui.button("Cancel", on_click=box.close).props("flat no-caps")

            def explain() -> None:
                words.clear()
                try:
                    sentences = standing.words(int(number.value or 0))
                except OnewanError as error:
                    sentences, number.error = [], error.message
                else:
                    number.error = None
                with words:
                    for sentence in sentences:
                        text("p", sentence)
                start.set_enabled(number.error is None)

            number.on_value_change(explain)
            explain()
        if await box:
            steps = int(number.value or 0)
            await self._do(partial(self._queue, standing, steps, bool(changed.value)))

    def _queue(self, standing: steering.Standing, steps: int, changed: bool) -> str:
        options, overrides = standing.arguments(steps, changed=changed)
        self._page.jobs.jobs.queue.add(self._layout.root, options, overrides)
        return f"{self._name}: is in the queue, and goes on as soon as its device is free"

    # -------------------------------------------------------------------------------- exporting

    async def _ask_to_export(self) -> None:
        found = await attempt(lambda: _Exports.of(self._layout))
        if found is None:
            return
        with dialog(f"Export {self._name}", "run-dialog") as box:
            which = ui.select(found.choices, label="Weights", value=next(iter(found.choices)))
            key_format = ui.select(found.formats, label="Format, and the programs that read it")
            key_format.set_value(found.own_format)
            key_format.bind_enabled_from(which, "value", lambda value: value != "now")
            told = text("p", "").props('role="status"')
            with ui.element("div").classes("ow-row"):
                start = ui.button("Export").props("no-caps")
                ui.button("Close", on_click=box.close).props("flat no-caps")
            files = ui.element("div")

        def show(exports: _Exports) -> None:
            files.clear()
            with files:
                _downloads(self._page, exports)

        async def export() -> None:
            if which.value == "now":
                await self._request("export")
                return
            start.disable()
            told.text = "Exporting ..."
            options = ["--step", str(which.value), "--format", str(key_format.value), "--force"]
            command = self._page.commands.start(
                f"Export {self._name}", ["export", str(self._layout.root), *options]
            )
            failed = await command.wait()
            told.text = "\n".join(command.output)
            told.classes(replace="ow-bad" if failed else "ow-mono")
            start.enable()
            if (again := await attempt(lambda: _Exports.of(self._layout))) is not None:
                show(again)

        start.on_click(export)
        show(found)
        box.open()


@dataclass(frozen=True, kw_only=True)
class _Exports:
    """What of a run can be exported, and what is."""

    choices: dict[int | str, str]
    """What can be exported: "now", and steps of states."""
    formats: dict[str, str]
    own_format: str
    files: tuple[tuple[Path, int], ...]
    """Newest exported files, and those of the best weights, with their bytes."""

    @classmethod
    def of(cls, layout: RunLayout) -> _Exports:
        config = load_run(layout.root)
        choices: dict[int | str, str] = {}
        if steering.is_running(layout):
            choices["now"] = "of the step that is trained now, in the run's own formats"
        choices |= {s: f"of the state of step {s:,}" for s in reversed(layout.saved_steps())}
        formats = FORMATS if isinstance(config.method, AdapterMethod) else _MODEL_FORMATS
        exported = layout.exported()
        paths = [p for step in [*exported][-_NEWEST_EXPORTS:] for p in exported[step]]
        paths += sorted(layout.weights_dir.glob("*_best_*"))
        return cls(
            choices=choices,
            formats={name: f"{name} ({readers})" for name, readers in formats.items()},
            own_format=config.output.formats[0],
            files=tuple((path, total_bytes(path)) for path in dict.fromkeys(paths)),
        )


def _downloads(page: Page, exports: _Exports) -> None:
    """Links to what is exported."""
    text("h3", "Exported files")
    if not exports.files:
        text("p", "There are none yet.").classes("ow-muted")
    with ui.element("ul").classes("ow-list"):
        for path, size in exports.files:
            with ui.element("li"):
                if path.is_file():
                    ui.link(path.name, f"{page.roots.address(path)}?save=1")
                    text("span", f" {format_bytes(size)}").classes("ow-muted")
                else:  # a transformer in diffusers' layout
                    text("span", f"{path}, a folder, {format_bytes(size)}")
