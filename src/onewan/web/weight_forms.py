"""The forms that convert and merge weights, by the commands ``onewan convert`` and ``merge``."""

from __future__ import annotations

import asyncio

from nicegui import ui

from onewan.checkpoint.inspection import Inspection
from onewan.serving.files import Entry
from onewan.serving.weight_commands import DTYPES, Conversion, Merge, WeightCommand
from onewan.web.command_card import command_card
from onewan.web.elements import asked, box, button, card, styled, text
from onewan.web.page import Page


class _Output:
    """What both forms end with: the type and the name of the output, the command's line, and the
    button that starts it."""

    def __init__(self, page: Page, title: str, command: WeightCommand) -> None:
        self._page, self._title, self._command = page, title, command
        dtype = ui.select(list(DTYPES), label="Type of the weights", value=command.dtype)
        dtype.classes("ow-field").bind_value_to(command, "dtype").on_value_change(self.refresh)
        self.name = ui.input("Output", value=command.name, validation=lambda _: command.problem())
        self.name.bind_value_to(command, "name").on_value_change(self.refresh)
        styled(self.name, "ow-field-wide", hint="A new name beside this file, or a whole path")
        self._line = text("div", command.line(), "ow-mono ow-muted")
        button(title, self._start, "filled")
        self._cards = box()

    def refresh(self) -> None:
        """Show the line of the command as it is now."""
        self._line.text = self._command.line()

    async def _start(self) -> None:
        output, arguments = self._command.output(), self._command.arguments()
        if await asyncio.to_thread(self._command.is_occupied):
            question = f"{output} exists. It is replaced when the new one is complete."
            if not await asked("Replace it?", question, "Replace it", "Keep it"):
                return
            arguments.append("--force")
        title = f"{self._title}: {output.name}"
        with self._cards:
            command_card(self._page.roots, self._page.commands.start(title, arguments, output))


def convert_form(page: Page, entry: Entry, found: Inspection) -> None:
    """The form that converts a model, a component or an adapter."""
    conversion = Conversion.of(page.roots, entry.path, found)

    def rename() -> None:
        output.name.value = conversion.usual_name
        output.refresh()

    with card("Convert", "ow-form"):
        to = ui.select(conversion.formats, label="Format", value=conversion.to)
        to.classes("ow-field-wide").bind_value_to(conversion, "to").on_value_change(rename)
        base = ui.input("Base model").bind_value_to(conversion, "base")
        base.on_value_change(lambda: output.refresh()).set_visibility(found.kind == "adapter")
        styled(base, "ow-field-wide", hint="Its path; for DoRA and OFT, or if asked for")
        output = _Output(page, "Convert", conversion)


def merge_form(page: Page, entry: Entry, found: Inspection) -> None:
    """The form that merges adapters into a model; `entry` is one or the other."""
    merge = Merge.of(page.roots, entry, found)
    is_adapter = found.kind == "adapter"

    def add_adapter(path: str | None = None) -> None:
        adapter = merge.choose(path)
        with rows, box("ow-field-row"):
            field = ui.select(merge.adapters, label="Adapter", value=path, clearable=True)
            weight = ui.number("Weight", value=adapter.weight, step=0.05, format="%.2f")
        field.classes("ow-field-wide").bind_value_to(adapter, "path")
        weight.classes("ow-field-number").bind_value_to(adapter, "weight")
        for each in (field, weight):
            each.on_value_change(lambda: output.refresh())
        fields.append(field)

    async def offer() -> None:
        await asyncio.to_thread(merge.find_choices)
        for field in fields:
            field.update()

    with card("Merge into a model" if is_adapter else "Merge adapters into it", "ow-form"):
        model = ui.select(merge.models, label="Model", value=merge.model)
        model.classes("ow-field-wide").bind_value_to(merge, "model")
        model.on_value_change(lambda: output.refresh()).set_visibility(is_adapter)
        fields = [model]
        rows = box("ow-form")
        add_adapter(str(entry.path) if is_adapter else None)
        button("One more adapter", add_adapter, icon="add")
        output = _Output(page, "Merge", merge)
    ui.timer(0, offer, once=True)
