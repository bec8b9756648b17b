"""The dialogs of a run's screen that order something from its trainer: a video of a prompt, and
changed settings."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

from nicegui import ui
from nicegui.elements.mixins.text_element import TextElement

from onewan.config.changes import CHANGEABLE, fixed_reason, in_force
from onewan.config.inputs import Input, inputs, section_at
from onewan.config.load import load_run
from onewan.config.schema import PromptSection, ResolvedRun
from onewan.documents import get_path
from onewan.errors import ConfigError, OnewanError
from onewan.runs import steering
from onewan.runs.layout import RunLayout
from onewan.runs.status import read_status
from onewan.web.elements import attempt, dialog, tell, text
from onewan.web.page import Page

_Field = ui.input | ui.textarea | ui.select
_PROMPTS = "sample.prompts"
_GROUPS = {
    "Learning": ("optimizer.", "per_expert.", "train.max_grad_norm", "train.ema."),
    "Saved and exported": ("train.save_", "train.keep_", "output."),
    "Validation": ("validation.",),
    "Sample videos": ("sample.",),
}
"""Headings, and what the names of the fields below them begin with."""


async def ask_for_sample(page: Page, layout: RunLayout) -> None:
    """Ask for a prompt, and order its video; or order those of the run file."""
    config = await attempt(lambda: steering.present_settings(layout))
    if config is None:
        return
    sample, takes_image = config.sample, config.model.facts().takes_image
    numbers = {"seed": sample.seed, "width": sample.width, "height": sample.height}
    steps = sample.steps if sample.distilled is None else sample.distilled.steps
    numbers |= {"frames": sample.frames, "steps": steps}
    with dialog(f"Sample {layout.name} now", "run-dialog") as box:
        fields: dict[str, _Field] = {"prompt": ui.textarea("Prompt").props("autogrow")}
        negative = ui.textarea("Negative prompt").props("autogrow")
        negative.props["hint"] = "Empty: that of the run"
        fields["negative_prompt"] = negative
        with ui.element("div").classes("ow-grid"):
            for name, value in numbers.items():
                field = ui.input(_SAMPLE_LABELS[name], placeholder=str(value))
                fields[name] = field.props("stack-label")
        if takes_image:
            fields["image"] = ui.input("First frame (path of an image on the server)")
        problem = text("p", "").classes("ow-bad").props('role="alert"')

        def send() -> str:
            wanted = {name: _given(name, f.value) for name, f in fields.items() if f.value}
            if image := fields["image"].value if takes_image else None:
                wanted["image"] = str(page.roots.inside(image))
            return steering.order_sample(layout, wanted)

        async def order() -> None:
            if await _ordered(send, fields, problem):
                box.close()

        async def order_own() -> None:
            if await page.jobs.do(lambda: steering.ask(layout, "sample")):
                box.close()

        with ui.element("div").classes("ow-row"):
            ui.button("Make the video", on_click=order).props("no-caps")
            own = ui.button("Make the videos of the run file", on_click=order_own)
            own.props("outline no-caps")
            ui.button("Cancel", on_click=box.close).props("flat no-caps")
    box.open()


_SAMPLE_LABELS = {
    "seed": "Seed",
    "width": "Width in pixels",
    "height": "Height in pixels",
    "frames": "Frames (4n+1)",
    "steps": "Denoising steps",
}


def _given(name: str, value: str) -> object:
    """What was entered, as JSON data; a number that is none is refused by the schema."""
    if name not in _SAMPLE_LABELS:
        return value
    try:
        return int(value)
    except ValueError:
        return value


async def change_settings(layout: RunLayout) -> None:
    """Show the settings that can change and those that did, and order changes."""
    found = await attempt(lambda: (load_run(layout.root), read_status(layout.root).step))
    if found is None:
        return
    recorded, step = found
    config = in_force(recorded, step)
    with dialog(f"Change settings of {layout.name}", "run-dialog") as box:
        text("p", "A change is in force from the next step on, and recorded with it.")
        fields = _setting_fields(config)
        problem = text("p", "").classes("ow-bad").props('role="alert"')
        before = {name: field.value for name, (_, field) in fields.items()}

        async def order() -> None:
            values = {
                name: _entered(config, entry, field.value or "")
                for name, (entry, field) in fields.items()
                if field.value != before[name]
            }
            changes = [f"{n}={json.dumps(v, ensure_ascii=False)}" for n, v in values.items()]
            shown = {name: field for name, (_, field) in fields.items()}
            if not changes:
                problem.text = "Nothing is changed yet."
            elif await _ordered(lambda: steering.order_settings(layout, changes), shown, problem):
                box.close()

        with ui.element("div").classes("ow-row"):
            ui.button("Change", on_click=order).props("no-caps")
            ui.button("Cancel", on_click=box.close).props("flat no-caps")
        _history(recorded)
    box.open()


def _setting_fields(config: ResolvedRun) -> dict[str, tuple[Input, _Field]]:
    """A field for each setting that can change in this run, by its dotted name."""
    data = config.model_dump(mode="json")
    fields: dict[str, tuple[Input, _Field]] = {}
    for heading, starts in _GROUPS.items():
        names = [n for n in CHANGEABLE if n.startswith(starts) and not _is_fixed(config, n)]
        if not names:
            continue
        text("h3", heading)
        with ui.element("div").classes("ow-grid"):
            for name in names:
                entry = _input_of(name, data)
                value = get_path(data, entry.path)
                label = f"{CHANGEABLE[name][0].upper()}{CHANGEABLE[name][1:]}"
                if name == _PROMPTS:
                    label += ", one in each line"
                    value = "\n".join(_one_line(prompt["prompt"]) for prompt in value)
                    field = ui.textarea(label, value=value).props("autogrow")
                elif entry.kind == "long_text":
                    field = ui.textarea(label, value=entry.shown(value)).props("autogrow")
                elif entry.kind == "switch":
                    field = ui.select(["true", "false"], label=label, value=entry.shown(value))
                else:
                    field = ui.input(label, value=entry.shown(value))
                empty = "empty: that of optimizer.lr" if entry.name == "lr" else "empty: none"
                if not entry.nullable or entry.kind != "number":
                    empty = ""
                field.props["hint"] = ", ".join(filter(None, (name, entry.bounds, empty)))
                fields[name] = entry, field
    return fields


def _is_fixed(config: ResolvedRun, name: str) -> bool:
    alone = len(config.model.facts().experts) == 1
    return fixed_reason(config, name) is not None or (alone and name.startswith("per_expert."))


def _input_of(name: str, data: Mapping[str, Any]) -> Input:
    """How the field `name` is entered."""
    *above, last = name.split(".")

    def kind_of(at: Any, union: Any) -> Any:
        return get_path(data, (*at, union.keyed.key))

    section = section_at(tuple(above), kind_of)
    assert section is not None
    return next(each for each in inputs(section, tuple(above)) if each.name == last)


def _entered(config: ResolvedRun, entry: Input, value: str) -> object:
    """What was entered, as JSON data."""
    if entry.path != tuple(_PROMPTS.split(".")):
        return entry.value(value)
    # What a prompt of the same text has besides, such as its seed or image, is kept.
    known = {_one_line(prompt.prompt): prompt for prompt in config.sample.prompts}
    lines = [line.strip() for line in value.splitlines() if line.strip()]
    prompts = [known.get(line) or PromptSection(prompt=line) for line in lines]
    return [prompt.model_dump(mode="json") for prompt in prompts]


def _one_line(prompt: str) -> str:
    return " ".join(prompt.split())


async def _ordered(
    action: Callable[[], str], fields: Mapping[str, _Field], problem: TextElement
) -> bool:
    """Run `action`, which blocks; what is wrong is said at its field, or as `problem`."""
    problem.text = ""
    for field in fields.values():
        field.error = None
    try:
        message = await asyncio.to_thread(action)
    except ConfigError as error:
        rest = list[str]()
        for line in error.problems:
            name, _, reason = line.partition(": ")
            owner = next((n for n in fields if f"{name}.".startswith(f"{n}.")), None)
            if owner is None:
                rest.append(line)
            else:
                fields[owner].error = reason
        problem.text = "; ".join(rest)
        return False
    except (OnewanError, OSError) as error:
        problem.text = str(error)
        return False
    tell(message)
    return True


def _history(recorded: ResolvedRun) -> None:
    """The changes that the run has recorded."""
    if not recorded.changes:
        return
    text("h3", "Changes so far")
    with (
        ui.element("div").classes("ow-scroll").props('tabindex="0"'),
        text("table", "").classes("ow-table"),
    ):
        with text("tr", ""):
            for heading in ("After step", "Setting", "Value from then on"):
                text("th", heading).props('scope="col"')
        for change in recorded.changes:
            for name, value in change.settings.items():
                with text("tr", ""):
                    shown = value if isinstance(value, str) else json.dumps(value)
                    for cell in (f"{change.step:,}", name, shown):
                        text("td", cell)
