"""Messages for invalid fields of a run file, made from pydantic's errors.

Hides how pydantic names the location of an error and which errors belong together in a union. It
has no rules of its own; problems are collected for the caller.
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
    KeyPath,
    Node,
    dotted,
    field_at,
    fields_at,
    format_value,
    get_path,
    has_key,
    leaves,
    literals,
    members_at,
    members_of,
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
"""Descriptions of the patterns of fields."""
_NAMED_LAST = ("missing", "extra_forbidden")
"""Error types whose location ends in a key that is not in the data."""


def validated(data: Node, problems: dict[str, str]) -> RunConfig | None:
    """The config, or None with all that pydantic finds wrong added to `problems`."""
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        for path, text in _to_messages(error.errors(include_url=False), data).items():
            report(problems, dotted(path), text)
    return None


def report(problems: dict[str, str], field: str, text: str) -> None:
    """Adds a problem, unless it names a field that is reported already and so follows from that."""

    def related(one: str, other: str) -> bool:
        return one == other or one.startswith(other + ".") or other.startswith(one + ".")

    named = [field, *re.findall(r"[a-z_]+(?:\.\w+)+", text)]
    if not any(related(name, reported) for name in named for reported in problems):
        problems[field] = text


def _to_messages(errors: Sequence[ErrorDetails], data: Node) -> dict[KeyPath, str]:
    """Messages by key path; the errors of one union become one message."""
    grouped: dict[KeyPath, list[ErrorDetails]] = {}
    for error in errors:
        grouped.setdefault(_key_path(error, data), []).append(error)
    worded: dict[KeyPath, str] = {}
    for path, group in grouped.items():
        if any(other[: len(path)] == path for other in grouped if other != path):
            continue  # errors of a union's other members, if one member matched further
        if not path:  # a validator of the whole file, whose message starts with the field
            field, _, text = group[0]["msg"].removeprefix("Value error, ").partition(": ")
            worded[tuple(field.split("."))] = text
        elif group[0]["type"] == "extra_forbidden":
            worded[path] = _unknown(path, data)
        else:
            worded[path] = _wrong_value(path, group, data)
    return worded


def _key_path(error: ErrorDetails, data: Node) -> KeyPath:
    """The key path of an error in `data`: its location without the tags of union members."""
    path: KeyPath = ()
    node, union = data, None
    for part in error["loc"]:
        if union is not None:  # the next part is the member's tag, which may equal a field's name
            union = None
        elif has_key(node, part):
            path, node = (*path, part), node[part]
            union = members_at(path, data)
    if union is not None and error["type"] == "union_tag_invalid":
        return (*path, union.keyed.key)
    last = error["loc"][-1] if error["loc"] else None
    # A value missing from a pair, such as a resolution, is reported for the pair.
    if error["type"] in _NAMED_LAST and isinstance(last, str) and path[-1:] != (last,):
        path = (*path, last)
    return path


def _unknown(path: KeyPath, data: Node) -> str:
    *around, name = path
    section = tuple(around)
    known, which, has_known = list(fields_at(section, data)), "", "known here:"
    if (union := members_at(section, data)) is not None:
        key, chosen = union.chosen(get_path(data, section)) or (union.keyed.default, union.default)
        known = [field for field in chosen.model_fields if field != union.keyed.key]
        # The text names the key's path, so `report` drops this if the key itself is wrong.
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


def _wrong_value(path: KeyPath, group: Sequence[ErrorDetails], data: Node) -> str:
    """Rule, value and remedy for the errors `group` of the value at `path`."""
    kinds = [error["type"] for error in group]
    value, field = group[0]["input"], field_at(path, data)
    if kinds == ["union_tag_invalid"]:
        value = value[path[-1]]
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
        rules = [_FORMS.get(dotted(path), rules[0])]
    more = [f"or {rule.removeprefix('must be ')}" for rule in dict.fromkeys(rules[1:])]
    if kinds == ["value_error"] and "; " in rules[0]:
        return rules[0]  # a validator that knows a better remedy
    said = "" if kinds == ["value_error"] else f", got {format_value(value)}"
    return f"{', '.join([rules[0], *more])}{said}; {_remedy(field, kinds, value, path)}"


def _remedy(field: FieldInfo | None, kinds: Sequence[str], value: object, path: KeyPath) -> str:
    """The remedy for an invalid value."""
    union = members_of(field) if field is not None else None
    if union is not None and isinstance(value, str) and value in union.sections:
        return f"write {{{union.keyed.key}: {value}}}"
    if (union := members_at(path[:-1])) is not None and path[-1] == union.keyed.key:
        if near := difflib.get_close_matches(str(value), union.sections, n=1):
            return f"did you mean '{near[0]}'?"
        return f"change it, or leave it out for {format_value(union.keyed.default)}"
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
    return f"change it, or leave it out for {format_value(default)}"
