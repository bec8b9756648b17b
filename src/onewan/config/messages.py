"""Messages for invalid fields of a run file, made from pydantic's errors.

Hides how pydantic names the location of an error and which errors belong together in a union. It
has no rules of its own; problems are collected for the caller.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import ValidationError

from onewan.config.fields import leaves
from onewan.config.schema import RunConfig
from onewan.config.section import Members, Section, members_of, sections_of
from onewan.documents import KeyPath, Node, dotted, format_value, get_path, has_key

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


def validated(data: dict[str, Node], problems: dict[str, str]) -> RunConfig | None:
    """The config, or None with all that pydantic finds wrong added to `problems`."""
    groups: dict[KeyPath, tuple[_Place, list[ErrorDetails]]] = {}
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            place = _place(details, data)
            groups.setdefault(place.path, (place, []))[1].append(details)
    for path, (place, errors) in groups.items():
        # Where one type of a union matched further, the error within the value says more.
        if not any(other[: len(path)] == path for other in groups if other != path):
            unknown = errors[0]["type"] == "extra_forbidden"
            text = _unknown(place) if unknown else _wrong_value(place, errors)
            report(problems, dotted(path), text)
    return None


def report(problems: dict[str, str], field: str, text: str) -> None:
    """Adds a problem, unless it names a field that is reported already and so follows from that."""

    def related(one: str, other: str) -> bool:
        return one == other or one.startswith(other + ".") or other.startswith(one + ".")

    named = [field, *re.findall(r"[a-z_]+(?:\.\w+)+", text)]
    if not any(related(name, reported) for name in named for reported in problems):
        problems[field] = text


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in the run file an error is."""

    path: KeyPath
    field: FieldInfo | None
    """None at an item of a list, and where there is no such field."""
    section: type[Section]
    union: Members | None
    """The union that the section belongs to, or whose key is wrong."""
    kind: str
    """The value of the union's key for the section."""


def _place(error: ErrorDetails, data: Node) -> _Place:
    """The place of an error, whose location names the chosen members of unions too."""
    path: KeyPath = ()
    place = _Place((), None, RunConfig, None, "")
    section: type[Section] | None = RunConfig  # of which the next part is a field
    union, kind, entered = None, "", None
    for part in error["loc"]:
        if entered is not None:  # the part is the value of this union's key
            section, union, kind, entered = entered.sections[str(part)], entered, str(part), None
        elif section is None or isinstance(part, int):
            # An item, a key of a mapping, or (not in the data) a type in a union of scalars. A
            # value missing from a pair, such as a resolution, is reported for the pair.
            if has_key(get_path(data, path), part):
                path, place = (*path, part), replace(place, field=None)
        else:
            path, field = (*path, part), section.model_fields.get(part)
            place = _Place(path, field, section, union, kind)
            inner = sections_of(field.annotation) if field is not None else []
            entered = members_of(field)
            section, union = (inner[0] if inner and not entered else None), None
    if error["type"] == "union_tag_invalid" and entered is not None:
        return replace(place, path=(*path, entered.keyed.key), field=None, union=entered)
    return replace(place, path=path)


def _unknown(place: _Place) -> str:
    """What is wrong with a field that the section does not have, and which one may be meant."""
    *around, name = place.path
    known, which, having, owner = list(place.section.model_fields), "", [], "known here:"
    if place.union is not None:
        key = place.union.keyed.key
        known.remove(key)
        which, owner = f" of {dotted((*around, key))} {place.kind}", f"{place.kind} has"
        having = [kind for kind, s in place.union.sections.items() if name in s.model_fields]
    if having:
        which += f", but one of {', '.join(having[:4])}{', ...' if len(having) > 4 else ''}"
    elif near := _nearest(name, known):
        return f"unknown field; {near}"
    elif elsewhere := [leaf for leaf in leaves() if leaf.rpartition(".")[2] == name]:
        highest = min(leaf.count(".") for leaf in elsewhere)
        likely = [leaf for leaf in elsewhere if leaf.count(".") == highest]
        return f"unknown field; did you mean {' or '.join(likely)}?"
    return f"unknown field{which}; {owner} {', '.join(known) or 'no fields'}"


def _wrong_value(place: _Place, errors: Sequence[ErrorDetails]) -> str:
    """Rule, value and remedy for the errors of one value."""
    types, value, field = [error["type"] for error in errors], errors[0]["input"], place.field
    rules = [_RULES.get(e["type"], e["msg"]).format(**e.get("ctx", {})) for e in errors]
    if types == ["union_tag_invalid"] and place.union is not None:
        value, default = value[place.path[-1]], format_value(place.union.keyed.default)
        rule = " or ".join(rules[0].rsplit(", ", 1))
        remedy = _nearest(value, place.union.sections)
        remedy = remedy or f"change it, or leave it out for {default}"
        return f"{rule}, got {format_value(value)}; {remedy}"
    if types == ["value_error"]:
        # A validator's own text has the value, and where it knows a better remedy that too.
        return rules[0] if "; " in rules[0] else f"{rules[0]}; {_remedy(field, types, value)}"
    if types == ["missing"]:
        if field is not None and field.is_required():
            choices = [repr(choice) for choice in _literals(field.annotation)]
            about = " ".join((field.description or "a value").split()).split(". ")[0].rstrip(".")
            return f"is required, got nothing; add it: {' or '.join(choices) or about}"
        rules = ["has too few values"]
    if types == ["string_pattern_mismatch"]:
        rules = [_FORMS.get(dotted(place.path), rules[0])]
    more = [f"or {rule.removeprefix('must be ')}" for rule in dict.fromkeys(rules[1:])]
    said = f"{', '.join([rules[0], *more])}, got {format_value(value)}"
    return f"{said}; {_remedy(field, types, value)}"


def _remedy(field: FieldInfo | None, types: Sequence[str], value: Node) -> str:
    """The remedy for an invalid value."""
    union = members_of(field)
    if union is not None and isinstance(value, str) and value in union.sections:
        return f"write {{{union.keyed.key}: {value}}}"
    choices = _literals(field.annotation) if field is not None else []
    if "literal_error" in types and (near := _nearest(value, choices)):
        return near
    if types == ["string_type"] and not isinstance(value, (dict, list, NoneType)):
        return "put it in quotes"
    if field is None or field.is_required():
        return "change it"
    default = field.get_default(call_default_factory=True)
    if default is None or isinstance(default, Section):
        return "change it, or leave it out"
    return f"change it, or leave it out for {format_value(default)}"


def _nearest(value: object, choices: Iterable[object]) -> str | None:
    texts = [choice for choice in choices if isinstance(choice, str)]
    near = difflib.get_close_matches(str(value), texts, n=1)
    return f"did you mean '{near[0]}'?" if near else None


def _literals(annotation: Any) -> list[object]:
    """The values that a field's literal types allow, in lists and unions too."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for part in get_args(annotation) for value in _literals(part)]
