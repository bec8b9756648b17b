"""What is wrong with the content of a run file, in words for the person who wrote it.

Hides pydantic's errors: how they name a place, which of them belong together in a union, how they
put it. All that pydantic can see is found in one go, by taking out what is wrong and trying again.
Never reads or writes a file, never raises `ConfigError` (problems are collected for the caller),
knows no rule of its own.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import TYPE_CHECKING

from pydantic import ValidationError

from onewan.config.schema import RunConfig
from onewan.config.schema_paths import (
    Members,
    Node,
    Place,
    at,
    dotted,
    field_at,
    fields_at,
    has,
    leaves,
    literals,
    members_at,
    members_of,
    put,
    show,
)
from onewan.config.section import Section

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

_RULES: Mapping[str, str] = {
    "missing": "is required",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "path_type": "must be a path",
    "tuple_type": "must be a list",
    "model_type": "must be a section with fields",
    "model_attributes_type": "must be a section with fields",
    "union_tag_invalid": "must be {expected_tags}",
    "literal_error": "must be {expected}",
    "greater_than": "must be more than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "too_short": "must be a list of at least {min_length}",
    "too_long": "must be a list of at most {max_length}",
    "string_pattern_mismatch": "must have the form {pattern}",
    "value_error": "{error}",
}
_FORMS: Mapping[str, str] = {
    "model.device": "must be auto, cpu, cuda, mps, xpu, or a numbered one such as cuda:1",
    "output.name": (
        'must be a plain name for a folder, without / \\ : * ? " < > | or a dot in front'
    ),
}
"""What the pattern of a field asks for."""
_STAND_INS: Mapping[str, Node] = {
    "model.variant": "t2v-a14b",
    "method.per_module.modules": ["all_linears"],
    "optimizer.class_path": "torch.optim.AdamW",
    "train.timesteps.weights": [1],
    "train.loss.weighting.points": [[0, 1], [1, 1]],
}
"""What takes the place of a wrong required value while the rest is looked at."""
_NAMED_LAST = ("missing", "extra_forbidden")
"""Kinds of error whose location ends in a name that need not be in the data."""


def validated(data: Node, problems: dict[str, str], rounds: int = 8) -> RunConfig | None:
    """The config, with what pydantic finds added to `problems`.

    What is wrong is reported, then taken out, and the rest is tried again, so that there is a
    config on which the other rules can be checked: one slip does not hide the next. None if even
    that leads nowhere.
    """
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        found = _worded(error.errors(include_url=False), data)
    for place, text in found.items():
        report(problems, dotted(place), text)
    for place in found:
        data = _mended(data, place)
    return validated(data, problems, rounds - 1) if rounds > 1 else None


def report(problems: dict[str, str], field: str, text: str) -> None:
    """Adds a problem, unless it speaks of a field that is wrong already and so follows from it."""

    def related(one: str, other: str) -> bool:
        return one == other or one.startswith(other + ".") or other.startswith(one + ".")

    named = [field, *re.findall(r"[a-z_]+(?:\.\w+)+", text)]
    if not any(related(name, reported) for name in named for reported in problems):
        problems[field] = text


def _mended(data: Node, place: Place) -> Node:
    """A copy of `data` in which nothing is wrong at `place` any more, whatever it then says."""
    last, field, union = place[-1], field_at(place, data), members_at(place[:-1], data)
    if union is not None and last == union.keyed.key:
        return put(data, place, _meant(union, at(data, place[:-1])))
    if isinstance(last, int) and not fields_at(place, data):
        return _mended(data, place[:-1])  # a list of values goes as a whole
    if isinstance(last, int) or (field is not None and field.is_required()):
        name = dotted(tuple(part for part in place if isinstance(part, str)))
        stand_in: Node = {} if fields_at(place, data) else _STAND_INS.get(name, "stand-in")
        return put(data, place, stand_in)
    around = at(data, place[:-1])
    return put(data, place[:-1], {k: value for k, value in around.items() if k != last})


def _meant(union: Members, node: dict[str, Node]) -> str:
    """The member that whoever wrote `node` most likely wanted: the one spelled most alike, else
    the one with the most of its fields."""
    if near := difflib.get_close_matches(str(node[union.keyed.key]), union.sections, n=1):
        return near[0]
    known = {key: len(node.keys() & s.model_fields.keys()) for key, s in union.sections.items()}
    return max([union.keyed.default, *known], key=lambda key: known[key])


def _worded(errors: Sequence[ErrorDetails], data: Node) -> dict[Place, str]:
    """pydantic's errors in plain words, those of one union in one sentence."""
    grouped: dict[Place, list[ErrorDetails]] = {}
    for error in errors:
        grouped.setdefault(_place(error, data), []).append(error)
    worded: dict[Place, str] = {}
    for place, group in grouped.items():
        if any(other[: len(place)] == place for other in grouped if other != place):
            continue  # a union's other members, where one of its members got further
        if not place:  # a validator of the whole file, whose message starts with the field
            field, _, text = group[0]["msg"].removeprefix("Value error, ").partition(": ")
            worded[tuple(field.split("."))] = text
        elif group[0]["type"] == "extra_forbidden":
            worded[place] = _unknown(place, data)
        else:
            worded[place] = _wrong_value(place, group, data)
    return worded


def _place(error: ErrorDetails, data: Node) -> Place:
    """Where in `data` an error lies: its location without the names of a union's members."""
    place: Place = ()
    node, union = data, None
    for part in error["loc"]:
        if union is not None:  # what follows is the member's key, which may be a field's name too
            union = None
        elif has(node, part):
            place, node = (*place, part), node[part]
            union = members_at(place, data)
    if union is not None and error["type"] == "union_tag_invalid":
        return (*place, union.keyed.key)
    last = error["loc"][-1] if error["loc"] else None
    # A value missing from a pair, such as a resolution, is the fault of the pair.
    if error["type"] in _NAMED_LAST and isinstance(last, str) and place[-1:] != (last,):
        place = (*place, last)
    return place


def _unknown(place: Place, data: Node) -> str:
    *around, name = place
    section = tuple(around)
    known, which, has_known = list(fields_at(section, data)), "", "known here:"
    if (union := members_at(section, data)) is not None:
        key, chosen = union.chosen(at(data, section)) or (union.keyed.default, union.default)
        known = [field for field in chosen.model_fields if field != union.keyed.key]
        # The key's place in the text: if that is wrong itself, this is no problem of its own.
        which, has_known = f" of {dotted(section)}.{union.keyed.key} {key}", f"{key} has"
        having = [other for other, s in union.sections.items() if name in s.model_fields]
        if having:
            some = ", ".join(having[:4]) + (", ..." if len(having) > 4 else "")
            which = f"{which}, but one of {some}"
            return f"unknown field{which}; {has_known} {', '.join(known) or 'no fields'}"
    if near := difflib.get_close_matches(str(name), known, n=1):
        return f"unknown field; did you mean '{near[0]}'?"
    elsewhere = [leaf for leaf in leaves() if leaf.rpartition(".")[2] == name]
    if elsewhere:
        highest = min(leaf.count(".") for leaf in elsewhere)
        likely = [leaf for leaf in elsewhere if leaf.count(".") == highest]
        return f"unknown field; did you mean {' or '.join(likely)}?"
    return f"unknown field{which}; {has_known} {', '.join(known) or 'no fields'}"


def _wrong_value(place: Place, group: Sequence[ErrorDetails], data: Node) -> str:
    """Rule, value and remedy for what `group` says of the value at `place`."""
    kinds = [error["type"] for error in group]
    value, field = group[0]["input"], field_at(place, data)
    if kinds == ["union_tag_invalid"]:
        value = value[place[-1]]
    if kinds == ["missing"] and field is not None and field.is_required():
        choices = [repr(choice) for choice in literals(field.annotation)]
        about = " ".join((field.description or "a value").split()).split(". ")[0].rstrip(".")
        return f"is required, got nothing; add it: {' or '.join(choices) or about}"
    rules = [_RULES.get(e["type"], e["msg"]).format(**e.get("ctx", {})) for e in group]
    if kinds == ["union_tag_invalid"]:
        rules = [" or ".join(rules[0].rsplit(", ", 1))]
    if kinds == ["missing"]:
        rules = ["has too few values"]
    if kinds == ["string_pattern_mismatch"]:
        rules = [_FORMS.get(dotted(place), rules[0])]
    more = [f"or {rule.removeprefix('must be ')}" for rule in dict.fromkeys(rules[1:])]
    said = "" if kinds == ["value_error"] else f", got {show(value)}"
    return f"{', '.join([rules[0], *more])}{said}; {_remedy(field, kinds, value, place)}"


def _remedy(field: FieldInfo | None, kinds: Sequence[str], value: object, place: Place) -> str:
    """What to do about a wrong value."""
    union = members_of(field) if field is not None else None
    if union is not None and isinstance(value, str) and value in union.sections:
        return f"write {{{union.keyed.key}: {value}}}"
    if (union := members_at(place[:-1])) is not None and place[-1] == union.keyed.key:
        if near := difflib.get_close_matches(str(value), union.sections, n=1):
            return f"did you mean '{near[0]}'?"
        return f"change it, or leave it out for {show(union.keyed.default)}"
    if "literal_error" in kinds and field is not None:
        choices = [c for c in literals(field.annotation) if isinstance(c, str)]
        if near := difflib.get_close_matches(str(value), choices, n=1):
            return f"did you mean '{near[0]}'?"
    if kinds == ["string_type"] and not isinstance(value, (dict, list, NoneType)):
        return "put it in quotes"
    if field is None or field.is_required():
        return "change it"
    default = field.get_default(call_default_factory=True)
    if default is None or isinstance(default, Section):
        return "change it, or leave it out"
    return f"change it, or leave it out for {show(default)}"
