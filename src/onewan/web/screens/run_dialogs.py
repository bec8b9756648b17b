"""The dialogs of a run: how far it continues, and what is exported, sampled and changed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from nicegui import ui

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.config.load import load_run
from onewan.config.order_inputs import (
    OrderInput,
    overrides,
    sample_entered,
    sample_inputs,
    setting_inputs,
)
from onewan.errors import ConfigError, OnewanError
from onewan.runs import steering
from onewan.runs.export_choices import NOW, ExportChoices, export_arguments
from onewan.runs.layout import RunLayout
from onewan.web.elements import box, button, dialog, styled, table, tell, text, view
from onewan.web.page import Page

_Field = ui.input | ui.textarea | ui.select


async def ask_to_continue(page: Page, layout: RunLayout) -> None:
    """Ask to which step, and put the run into the queue."""
    standing = await asyncio.to_thread(steering.Standing.of, layout)
    with dialog(f"Continue {layout.name}", "run-dialog") as made:
        number = ui.number("Continue to step", value=standing.proposed, min=1, precision=0)
        number.without_auto_validation()  # which would take the error away again
        explain = view(box(role="status"), _paragraphs)
        changed = ui.checkbox("Clips or captions have changed: train on them as they are now")
        with box("ow-row"):
            start = button("Continue", lambda: made.submit(True), "filled")
            button("Cancel", made.close)

        def show() -> None:
            number.error = None
            try:
                explain(standing.words(int(number.value or 0)))
            except OnewanError as error:
                number.error = error.message
                explain([])
            start.set_enabled(number.error is None)

        number.on_value_change(show)
        show()

    def queue() -> str:
        arguments = standing.arguments(int(number.value or 0), changed=bool(changed.value))
        page.watch.jobs.queue.add(layout.root, *arguments)
        return f"{layout.name}: is in the queue, and continues as soon as its device is free"

    if await made:
        await page.do(queue)


def _paragraphs(sentences: Sequence[str]) -> None:
    for sentence in sentences:
        text("p", sentence)


# --------------------------------------------------------------------------------------- exporting


async def ask_to_export(page: Page, layout: RunLayout) -> None:
    """Ask which weights to export, and offer the files that are exported."""
    found = await asyncio.to_thread(ExportChoices.of, layout)
    with dialog(f"Export {layout.name}", "run-dialog") as made:
        weights = ui.select(
            dict(found.weights), label="Weights", value=next(iter(found.weights), None)
        )
        label = "Format, and the programs that read it"
        key_format = ui.select(dict(found.formats), label=label, value=found.own_format)
        key_format.bind_enabled_from(weights, "value", lambda value: value != NOW)
        told = text("p", "", role="status")

        async def export() -> None:
            if weights.value == NOW:
                await page.do(lambda: steering.ask(layout, "export"))
                return
            start.disable()
            told.text = "Exporting ..."
            arguments = export_arguments(layout, weights.value, key_format.value)
            command = page.commands.start(f"Export {layout.name}", arguments)
            failed = await command.wait()
            told.text = "\n".join(command.output)
            told.classes(replace="ow-bad" if failed else "ow-mono")
            start.enable()
            show_files((await asyncio.to_thread(ExportChoices.of, layout)).files)

        with box("ow-row"):
            start = button("Export", export, "filled")
            button("Close", made.close)
        show_files = view(box(), partial(_downloads, page))
        show_files(found.files)
    made.open()


def _downloads(page: Page, files: Sequence[tuple[Path, int]]) -> None:
    text("h3", "Exported files")
    if not files:
        text("p", "There are none yet.", "ow-muted")
    with box("ow-list", "ul"):
        for path, size in files:
            with box(tag="li"):
                if path.is_file():
                    ui.link(path.name, f"{page.roots.address(path)}?save=1")
                    text("span", f" {format_bytes(size)}", "ow-muted")
                else:  # a transformer in diffusers' layout
                    text("span", f"{path}, a folder, {format_bytes(size)}")


# ---------------------------------------------------------------------- orders that have a content


async def ask_for_sample(page: Page, layout: RunLayout) -> None:
    """Ask for a prompt, and order its video; or order those of the run file."""
    config = await asyncio.to_thread(steering.present_settings, layout)

    def order(entered: Mapping[str, str]) -> str:
        wanted = sample_entered(entered)
        if "image" in wanted:
            wanted["image"] = page.roots.inside(wanted["image"])
        return steering.order_sample(layout, wanted)

    async def order_own() -> None:
        if await page.do(lambda: steering.ask(layout, "sample")):
            made.close()

    with dialog(f"Sample {layout.name} now", "run-dialog") as made:
        others = {"Make the videos of the run file": order_own}
        _order_form(made, {"": sample_inputs(config)}, "Make the video", order, others)
    made.open()


async def change_settings(layout: RunLayout) -> None:
    """Show the settings that can change and those that did, and order changes."""
    recorded = await asyncio.to_thread(load_run, layout.root)
    groups = setting_inputs(await asyncio.to_thread(steering.present_settings, layout))

    def order(entered: Mapping[str, str]) -> str:
        changes = overrides(chain(*groups.values()), entered)
        if not changes:
            raise OnewanError("Nothing is changed yet.")
        return steering.order_settings(layout, changes)

    with dialog(f"Change settings of {layout.name}", "run-dialog") as made:
        text("p", "A change is in force from the next step on, and recorded with it.")
        _order_form(made, groups, "Change", order, {})
        if recorded.changes:
            text("h3", "Changes so far")
            rows = [
                (f"{change.step:,}", name, value if isinstance(value, str) else json.dumps(value))
                for change in recorded.changes
                for name, value in change.settings.items()
            ]
            table(("After step", "Setting", "Value from then on"), rows)
    made.open()


def _order_form(
    made: ui.dialog,
    groups: Mapping[str, Sequence[OrderInput]],
    label: str,
    order: Callable[[Mapping[str, str]], str],
    others: Mapping[str, Callable[[], object]],
) -> None:
    """Fields by headings, and a button that calls `order` with what was entered, which blocks and
    returns what to tell the user. What is wrong is said at its field, or above the buttons."""
    fields = dict[str, _Field]()
    for heading, entries in groups.items():
        if heading:
            text("h3", heading)
        with box("ow-grid"):
            fields |= {entry.name: _field(entry) for entry in entries}
    problem = text("p", "", "ow-bad", role="alert")

    async def send() -> None:
        problem.text = ""
        for field in fields.values():
            field.error = None
        entered = {name: field.value or "" for name, field in fields.items()}
        try:
            line = await asyncio.to_thread(order, entered)
        except ConfigError as error:
            by_field, rest = error.by_field(fields)
            for name, reason in by_field.items():
                fields[name].error = reason
            problem.text = "; ".join(rest)
        except (OnewanError, OSError) as error:
            problem.text = str(error)
        else:
            tell(line)
            made.close()

    with box("ow-row"):
        button(label, send, "filled")
        for other, action in others.items():
            button(other, action, "outline")
        button("Cancel", made.close)


def _field(entry: OrderInput) -> _Field:
    if entry.kind == "switch":
        field = ui.select(["true", "false"], label=entry.label, value=entry.text)
    elif entry.kind == "lines":
        field = ui.textarea(entry.label, value=entry.text).props("autogrow")
    else:
        field = ui.input(entry.label, value=entry.text, placeholder=entry.placeholder)
    return styled(field, hint=entry.hint)
