"""What is wrong with the content of a run file, in words for the person who wrote it.

Hides pydantic's errors (how they name a place, which of them belong together in a union, how they
put it) and how the schema is walked to learn what is known at a place. All that pydantic can see is
found in one go, by taking out what is wrong and trying again. Never reads or writes a file, never
raises `ConfigError` (problems are collected for the caller), knows no rule of its own.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, Union, get_args, get_origin

from pydantic import ValidationError

from onewan.config.schema import RunConfig, Section

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

Node: TypeAlias = Any
"""What the parser yields: a mapping, a list or a single value."""
Place: TypeAlias = tuple[str | int, ...]
"""Where something is in a run file: names of fields and indices into lists."""


def is_mapping(node: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(node, dict)


def is_list(node: object) -> TypeGuard[list[Any]]:
    return isinstance(node, list)


def is_tuple(node: object) -> TypeGuard[tuple[object, ...]]:
    return isinstance(node, tuple)


def put(node: Node, place: Place, value: Node) -> Node:
    """A copy of `node` with `value` at `place`; mappings and lists missing on the way are made.

    A copy, since YAML's aliases let one mapping lie in several places. ValueError where `place`
    leads through something that has no such part.
    """
    if not place:
        return value
    part, rest = place[0], place[1:]
    if isinstance(part, int):
        items: Node = [] if node is None else node
        if not is_list(items):
            raise ValueError(f"has no item {part}, since here is {show(node)}; name a field")
        if part > len(items):
            raise ValueError(f"the list has {len(items)} items; the next one is {len(items)}")
        item = items[part] if part < len(items) else None
        return [*items[:part], put(item, rest, value), *items[part + 1 :]]
    fields: Node = {} if node is None else node
    if not is_mapping(fields):
        raise ValueError(f"has no field '{part}', since here is {show(node)}; set that instead")
    return {**fields, part: put(fields.get(part), rest, value)}


def dotted(place: Place) -> str:
    return ".".join(map(str, place))


def show(value: object) -> str:
    """`value` as a run file has it, cut to a length that fits a message."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if is_tuple(value):
        value = list(value)
    text = repr(str(value)) if isinstance(value, (str, Path)) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ----------------------------------------------------------------------- walking through the schema


def leaves() -> list[str]:
    """Dotted names of all fields that hold a value; `*` is any item of a list."""

    def walk(section: type[Section], prefix: str) -> Iterator[str]:
        for name, field in section.model_fields.items():
            inner = _sections(field.annotation)
            if not inner:
                yield prefix + name
            item = "*." if get_origin(field.annotation) is tuple else ""
            for member in inner:
                yield from walk(member, f"{prefix}{name}.{item}")

    return list(dict.fromkeys(walk(RunConfig, "")))


def fields_at(place: Place) -> dict[str, FieldInfo]:
    """The fields known at `place`, of all members where it is a union; none if it is a value."""
    here: list[type[Section]] = [RunConfig]
    for part in place:
        if isinstance(part, str):  # an index leads from a list to the same sections
            found = [section.model_fields[part] for section in here if part in section.model_fields]
            here = [section for field in found for section in _sections(field.annotation)]
    return {name: field for section in here for name, field in section.model_fields.items()}


def field_at(place: Place) -> FieldInfo | None:
    return fields_at(place[:-1]).get(place[-1]) if place and isinstance(place[-1], str) else None


def alternatives(annotation: Any) -> set[Any]:
    """The members of a union, or the one type that it is."""
    if get_origin(annotation) in (Union, UnionType):
        return {a for member in get_args(annotation) for a in alternatives(member)}
    return {annotation}


def _sections(annotation: Any) -> list[type[Section]]:
    """The sections that a field may hold: itself, the members of a union, the items of a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _literals(annotation: Any) -> list[object]:
    """The values that a field's literal types allow, in lists and unions too."""
    return [
        value
        for part in get_args(annotation)
        for value in ([part] if not get_args(part) else _literals(part))
    ]


# ------------------------------------------------------------------- problems that pydantic can see

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
_STAND_INS: Mapping[str, str] = {"model.variant": "t2v-a14b"}
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
    last, field = place[-1], field_at(place)
    if isinstance(last, int) and not fields_at(place):
        return _mended(data, place[:-1])  # a list of values goes as a whole
    if isinstance(last, int) or (field is not None and field.is_required()):
        stand_in: Node = {} if fields_at(place) else _STAND_INS.get(dotted(place), "stand-in")
        return put(data, place, stand_in)
    around: Node = data
    for part in place[:-1]:
        around = around[part]
    return put(data, place[:-1], {k: value for k, value in around.items() if k != last})


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
            worded[place] = _unknown(place)
        else:
            worded[place] = _wrong_value(place, group)
    return worded


def _place(error: ErrorDetails, data: Node) -> Place:
    """Where in `data` an error lies: its location without the names of a union's members."""
    place: list[str | int] = []
    for part in error["loc"]:
        if _has(data, part):
            place.append(part)
            data = data[part]
    last = error["loc"][-1] if error["loc"] else None
    # A value missing from a pair, such as a resolution, is the fault of the pair.
    if error["type"] in _NAMED_LAST and isinstance(last, str) and place[-1:] != [last]:
        place.append(last)
    return tuple(place)


def _has(node: Node, part: str | int) -> bool:
    if is_list(node):
        return isinstance(part, int) and part < len(node)
    return is_mapping(node) and part in node


def _unknown(place: Place) -> str:
    *section, name = place
    known = list(fields_at(tuple(section)))
    if near := difflib.get_close_matches(str(name), known, n=1):
        return f"unknown field; did you mean '{near[0]}'?"
    elsewhere = [leaf for leaf in leaves() if leaf.rpartition(".")[2] == name]
    if elsewhere:
        return f"unknown field; did you mean {' or '.join(elsewhere)}?"
    return f"unknown field; known here: {', '.join(known)}"


def _wrong_value(place: Place, group: Sequence[ErrorDetails]) -> str:
    """Rule, value and remedy for what `group` says of the value at `place`."""
    kinds = [error["type"] for error in group]
    value, field = group[0]["input"], field_at(place)
    if kinds == ["missing"] and field is not None and field.is_required():
        choices = [repr(choice) for choice in _literals(field.annotation)]
        about = " ".join((field.description or "a value").split()).split(". ")[0].rstrip(".")
        return f"is required, got nothing; add it: {' or '.join(choices) or about}"
    rules = [_RULES.get(e["type"], e["msg"]).format(**e.get("ctx", {})) for e in group]
    if kinds == ["missing"]:
        rules = ["has too few values"]
    if kinds == ["string_pattern_mismatch"]:
        rules = [_FORMS.get(dotted(place), rules[0])]
    more = [f"or {rule.removeprefix('must be ')}" for rule in dict.fromkeys(rules[1:])]
    said = "" if kinds == ["value_error"] else f", got {show(value)}"
    return f"{', '.join([rules[0], *more])}{said}; {_remedy(field, kinds, value)}"


def _remedy(field: FieldInfo | None, kinds: Sequence[str], value: object) -> str:
    """What to do about a wrong value."""
    if "literal_error" in kinds and field is not None:
        choices = [c for c in _literals(field.annotation) if isinstance(c, str)]
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
