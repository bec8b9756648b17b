"""The forms that convert and merge weights, by the commands ``onewan convert`` and ``merge``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

from nicegui import ui

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.checkpoint.inspection import Inspection
from onewan.checkpoint.target_formats import LORA_FORMATS, MODEL_FORMATS
from onewan.dtypes import WeightDtype
from onewan.errors import OnewanError
from onewan.serving.commands import Command, command_line
from onewan.serving.files import Entry, find_files, inspection
from onewan.web.command_card import command_card
from onewan.web.elements import tell, text
from onewan.web.page import Page

_UNCHANGED = "unchanged"
_DTYPES = [_UNCHANGED, *get_args(WeightDtype)]
_MOST_CHOICES = 300
"""Files that are looked through for models and adapters."""


class _OutputForm:
    """What both forms share: the name of the output, the question before something is overwritten,
    and the command's line and card."""

    def __init__(self, page: Page, entry: Entry, title: str, arguments: Callable[[], list[str]]):
        self._page, self._entry, self._title, self._arguments = page, entry, title, arguments

    def add(self, output: str) -> None:
        """Make the shared elements."""
        self.dtype = ui.select(_DTYPES, label="Type of the weights", value=_UNCHANGED)
        self.dtype.props("outlined dense").classes("ow-field").on_value_change(self.refresh)
        self.output = ui.input(
            "Output", value=output, on_change=self.refresh, validation=lambda _: self._problem()
        )
        self.output.props('outlined dense hint="A new name beside this file, or a whole path"')
        self.output.classes("ow-field-wide")
        self._line = ui.label().classes("ow-mono ow-muted")
        ui.button(self._title, on_click=self._start).props("no-caps")
        self._cards = ui.element("div")
        self.refresh()

    def destination(self) -> Path:
        """OnewanError if it is outside the folders of the page, or has no name."""
        given = (self.output.value or "").strip()
        if not given:
            raise OnewanError("Give a name.")
        return self._page.roots.inside(self._entry.path.parent / Path(given).expanduser())

    def _problem(self) -> str | None:
        """What is wrong with the name of the output."""
        try:
            self.destination()
        except OnewanError as error:
            return error.message
        return None

    def refresh(self) -> None:
        """Show the line of the command, or what is missing."""
        try:
            self._line.text = "" if self._problem() else command_line(self._whole())
        except OnewanError as error:
            self._line.text = error.message

    def _whole(self) -> list[str]:
        options = [] if self.dtype.value == _UNCHANGED else ["--dtype", self.dtype.value]
        return [*self._arguments(), str(self.destination()), *self._options(), *options]

    def _options(self) -> list[str]:
        return []

    async def _start(self) -> None:
        try:
            destination, arguments = self.destination(), self._whole()
        except OnewanError as error:
            tell(error.message, error=True)
            return
        if await asyncio.to_thread(_occupied, destination):
            if not await _may_overwrite(destination):
                return
            arguments.append("--force")
        command = self._page.commands.start(f"{self._title}: {destination.name}", arguments)
        with self._cards:
            command_card(command, partial(_results, self._page, command, destination))


class _ConvertForm(_OutputForm):
    def __init__(self, page: Page, entry: Entry, found: Inspection) -> None:
        self._formats = LORA_FORMATS if found.kind == "adapter" else MODEL_FORMATS
        super().__init__(page, entry, "Convert", lambda: ["convert", str(entry.path)])
        self._found = found
        options = {name: f"{name}: {what}" for name, what in self._formats.items()}
        first = next(name for name in options if name != found.key_format)
        with ui.element("div").classes("ow-form"):
            self._to = ui.select(options, label="Format", value=first, on_change=self._renamed)
            self._to.props("outlined dense").classes("ow-field-wide")
            self._base = ui.input("Base model", on_change=lambda: self.refresh())
            self._base.props('outlined dense hint="Its path; for DoRA and OFT, or if asked for"')
            self._base.classes("ow-field-wide").set_visibility(found.kind == "adapter")
            self.add(_output_name(entry.path, found.kind, first))

    def _renamed(self) -> None:
        self.output.value = _output_name(self._entry.path, self._found.kind, self._to.value)
        self.refresh()

    def _options(self) -> list[str]:
        base = (self._base.value or "").strip()
        options = ["--base", str(self._page.roots.inside(base))] if base else []
        return ["--to", self._to.value, *options]


class _MergeForm(_OutputForm):
    def __init__(self, page: Page, entry: Entry, found: Inspection) -> None:
        super().__init__(page, entry, "Merge", self._sources)
        self._is_adapter = found.kind == "adapter"
        own = str(entry.path)
        self._models: dict[str, str] = {} if self._is_adapter else {own: entry.shown}
        self._adapters: dict[str, str] = {own: entry.shown} if self._is_adapter else {}
        with ui.element("div").classes("ow-form"):
            self._base = ui.select(
                self._models,
                label="Model",
                value=None if self._is_adapter else own,
                on_change=lambda: self.refresh(),
            )
            self._base.props("outlined dense").classes("ow-field-wide")
            self._base.set_visibility(self._is_adapter)
            self._loras: list[tuple[ui.select, ui.number]] = []
            self._rows = ui.element("div").classes("ow-form")
            self._add_lora(own if self._is_adapter else None)
            ui.button("One more adapter", icon="add", on_click=lambda: self._add_lora(None)).props(
                "flat no-caps"
            )
            suffix = entry.path.suffix if entry.path.is_file() else ""
            self.add(f"{entry.path.name.removesuffix(suffix)}_merged{suffix}")
        ui.timer(0, self._find, once=True)

    def _add_lora(self, path: str | None) -> None:
        with self._rows, ui.element("div").classes("ow-field-row"):
            lora = ui.select(self._adapters, label="Adapter", value=path)
            lora.props("outlined dense clearable").classes("ow-field-wide")
            weight = ui.number("Weight", value=1.0, step=0.05, format="%.2f")
            weight.props("outlined dense").classes("ow-field-number")
        lora.on_value_change(lambda: self.refresh())
        weight.on_value_change(lambda: self.refresh())
        self._loras.append((lora, weight))

    async def _find(self) -> None:
        """Look for models and adapters to choose from."""
        found = await asyncio.to_thread(_choices, self._page)
        if self._base.is_deleted:
            return
        self._models |= found[0]
        self._adapters |= found[1]
        self._base.set_options(self._models, value=self._base.value)
        for lora, _ in self._loras:
            lora.set_options(self._adapters, value=lora.value)

    def _sources(self) -> list[str]:
        if not self._base.value:
            raise OnewanError("Choose a model to merge into.")
        loras = [
            f"{lora.value}:{weight.value or 0:g}" for lora, weight in self._loras if lora.value
        ]
        if not loras:
            raise OnewanError("Choose an adapter to merge.")
        return ["merge", self._base.value, *loras]


def convert_form(page: Page, entry: Entry, found: Inspection) -> None:
    """The form that converts a model, a component or an adapter."""
    text("h2", "Convert")
    with ui.element("section").classes("ow-card"):
        _ConvertForm(page, entry, found)


def merge_form(page: Page, entry: Entry, found: Inspection) -> None:
    """The form that merges adapters into a model."""
    text("h2", "Merge into a model" if found.kind == "adapter" else "Merge adapters into it")
    with ui.element("section").classes("ow-card"):
        _MergeForm(page, entry, found)


def _output_name(source: Path, kind: str, to: str) -> str:
    """A name for the output, of the kind that the format has."""
    stem = source.stem if source.is_file() else source.name
    if kind == "model" or (to == "diffusers" and kind != "adapter"):
        return f"{stem}_{to}"
    if to == "official":
        return f"{stem}_{to}" if kind == "transformer" else f"{stem}_{to}.pth"
    return f"{stem}_{to}.safetensors"


def _occupied(destination: Path) -> bool:
    return destination.is_file() or (destination.is_dir() and any(destination.iterdir()))


async def _may_overwrite(destination: Path) -> bool:
    """Ask whether an existing file or folder may be replaced."""
    with ui.dialog() as dialog, ui.card():
        text("h2", "Replace it?")
        ui.label(f"{destination} exists. It is replaced when the new one is complete.")
        with ui.row().classes("ow-row"):
            ui.button("Keep it", on_click=lambda: dialog.submit(False)).props("no-caps")
            replace = ui.button("Replace it", on_click=lambda: dialog.submit(True))
            replace.props("outline no-caps color=negative")
    answer = await dialog
    dialog.delete()
    return bool(answer)


def _choices(page: Page) -> tuple[dict[str, str], dict[str, str]]:
    """(models and transformers, adapters) of the page's folders: names by path."""
    models: dict[str, str] = {}
    adapters: dict[str, str] = {}
    weights = [each for each in find_files(page.roots).entries if each.kind == "weights"]
    for each in weights[:_MOST_CHOICES]:
        kind = inspection(each).kind
        if kind in ("model", "transformer"):
            models[str(each.path)] = each.shown
        elif kind == "adapter":
            adapters[str(each.path)] = each.shown
    return models, adapters


def _results(page: Page, command: Command, destination: Path) -> None:
    """Links to what a command has written, which its lines name."""
    names = [line.rpartition(": ")[0] for line in command.output]
    files: Sequence[Path] = [destination] if destination.is_dir() else [Path(n) for n in names if n]
    for file in files:
        if not file.exists():
            continue
        try:
            address = page.roots.address(page.roots.inside(file))
        except OnewanError:
            continue
        with ui.row().classes("ow-row"):
            ui.link(file.name, f"/files/{address.removeprefix('/media/')}")
            if file.is_file():
                ui.label(format_bytes(file.stat().st_size)).classes("ow-muted")
                save = partial(ui.navigate.to, f"{address}?save=1")
                ui.button("Download", icon="download", on_click=save).props("flat no-caps")
