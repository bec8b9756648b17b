"""What a form needs to know of the orders that a running trainer takes: a video of a prompt, and
changed settings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from onewan.config.changes import CHANGEABLE, fixed_reason
from onewan.config.inputs import Input, inputs, section_at
from onewan.config.schema import ResolvedRun
from onewan.documents import get_path

_GROUPS = {
    "Learning": ("optimizer.", "per_expert.", "train.max_grad_norm", "train.ema."),
    "Saved and exported": ("train.save_", "train.keep_", "output."),
    "Validation": ("validation.",),
    "Sample videos": ("sample.",),
}
"""Headings, and what the names of the settings below them begin with."""
_PROMPTS = "sample.prompts"
_SAMPLE_NUMBERS = {
    "seed": "Seed",
    "width": "Width in pixels",
    "height": "Height in pixels",
    "frames": "Frames (4n+1)",
    "steps": "Denoising steps",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderInput:
    """A field of the form."""

    name: str
    """As the order and the messages of its errors have it."""
    label: str
    kind: Literal["line", "lines", "switch"] = "line"
    text: str = ""
    """What is entered before the user has changed it."""
    hint: str = ""
    placeholder: str = ""


# ----------------------------------------------------------------------------- a video of a prompt


def sample_inputs(config: ResolvedRun) -> list[OrderInput]:
    """Those of one video by the settings `config`, which are in force."""
    sample = config.sample
    present = {name: getattr(sample, name) for name in _SAMPLE_NUMBERS}
    if sample.distilled is not None:
        present["steps"] = sample.distilled.steps
    found = [
        OrderInput(name="prompt", label="Prompt", kind="lines"),
        OrderInput(
            name="negative_prompt",
            label="Negative prompt",
            kind="lines",
            hint="Empty: that of the run",
        ),
        *(
            OrderInput(name=name, label=label, placeholder=str(present[name]))
            for name, label in _SAMPLE_NUMBERS.items()
        ),
    ]
    if config.model.facts().takes_image:
        label = "First frame (path of an image on the server)"
        found.append(OrderInput(name="image", label=label))
    return found


def sample_entered(texts: Mapping[str, str]) -> dict[str, Any]:
    """The order of a video for what was entered; a number that is none is refused by the schema."""
    wanted: dict[str, Any] = {name: text for name, text in texts.items() if text}
    for name in _SAMPLE_NUMBERS.keys() & wanted:
        with suppress(ValueError):
            wanted[name] = int(wanted[name])
    return wanted


# -------------------------------------------------------------------------------- changed settings


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingInput(OrderInput):
    """The field of a setting, whose name is its dotted name."""

    input: Input
    present: Any = field(repr=False)
    """Its value, as JSON data."""

    def override(self, text: str) -> str:
        """The setting with the value that was entered, such as ``train.save_every=100``."""
        return f"{self.name}={json.dumps(self._value(text), ensure_ascii=False)}"

    def _value(self, text: str) -> object:
        if self.name != _PROMPTS:
            return self.input.value(text)
        # What a prompt of the same text has besides, such as its seed or image, is kept.
        known = {_one_line(prompt["prompt"]): prompt for prompt in self.present}
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return [known.get(line) or {"prompt": line} for line in lines]


def setting_inputs(config: ResolvedRun) -> dict[str, list[SettingInput]]:
    """By heading, those of the settings that can change in a run in which `config` is in force."""
    data = config.model_dump(mode="json")
    is_alone = len(config.model.facts().experts) == 1
    names = [
        name
        for name in CHANGEABLE
        if fixed_reason(config, name) is None and not (is_alone and name.startswith("per_expert."))
    ]
    groups = {
        heading: [_setting_input(name, data) for name in names if name.startswith(starts)]
        for heading, starts in _GROUPS.items()
    }
    return {heading: found for heading, found in groups.items() if found}


def overrides(settings: Iterable[SettingInput], texts: Mapping[str, str]) -> list[str]:
    """Those of the settings whose texts, which are given by their names, are not as before."""
    return [each.override(texts[each.name]) for each in settings if texts[each.name] != each.text]


def _setting_input(name: str, data: Mapping[str, Any]) -> SettingInput:
    entry = _input_of(name, data)
    present = get_path(data, entry.path)
    label, text = f"{CHANGEABLE[name][0].upper()}{CHANGEABLE[name][1:]}", entry.shown(present)
    if name == _PROMPTS:
        label += ", one in each line"
        text = "\n".join(_one_line(prompt["prompt"]) for prompt in present)
    empty = ""
    if entry.nullable and entry.kind == "number":
        empty = "empty: that of optimizer.lr" if entry.name == "lr" else "empty: none"
    is_long = name == _PROMPTS or entry.kind == "long_text"
    return SettingInput(
        name=name,
        label=label,
        kind="lines" if is_long else "switch" if entry.kind == "switch" else "line",
        text=text,
        hint=", ".join(filter(None, (name, entry.bounds, empty))),
        input=entry,
        present=present,
    )


def _input_of(name: str, data: Mapping[str, Any]) -> Input:
    """How the field `name` of the run file is entered."""
    *above, last = name.split(".")

    def kind_of(at: Any, union: Any) -> Any:
        return get_path(data, (*at, union.keyed.key))

    section = section_at(tuple(above), kind_of)
    assert section is not None
    return next(each for each in inputs(section, tuple(above)) if each.name == last)


def _one_line(prompt: str) -> str:
    return " ".join(prompt.split())
