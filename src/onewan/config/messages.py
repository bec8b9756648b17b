"""Messages for invalid fields of a run file, made from pydantic's errors.

Hides how pydantic names the location of an error and which errors belong together in a union. It
has no rules of its own; problems are collected for the caller.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import ValidationError

from onewan.config.fields import field_at, schema_fields
from onewan.config.foreign_terms import (
    TABLE,
    Term,
    foreign_leaves,
    is_foreign_section,
    program_of,
    terms_at,
)
from onewan.config.schema import RunConfig
from onewan.config.section import Members, Section, members_of, sections_of
from onewan.documents import (
    KeyPath,
    Node,
    dotted,
    format_value,
    get_path,
    has_key,
    shortened,
)

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
_SHOWN = 5
"""Number of lines for fields that are wrong in the same way."""
_FORMS: Mapping[str, str] = {
    "output.name": (
        'must be a plain name for a folder, without / \\ : * ? " < > |, control characters '
        "or a dot in front"
    ),
}
"""Descriptions of the patterns of fields."""


class Problems:
    """What is wrong with a run file: a line per field, and for many fields that are wrong in the
    same way lines for the first few and one with the number of the others."""

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}
        self._sections: set[str] = set()
        """Dotted names of all sections and lists that a reported field lies in."""
        self._alike: Counter[str] = Counter()

    def __bool__(self) -> bool:
        return bool(self._lines)

    def add(self, field: str, text: str | Callable[[], str], *, alike: str = "") -> None:
        """Add the problem of a field. `alike` is the same for problems of the same kind; without
        it they are those of one field in the items of a list."""
        alike = alike or re.sub(r"\.[0-9]+(?=\.|$)", ".*", field)
        self._alike[alike] += 1
        self._sections.update(_sections(field))
        if self._alike[alike] <= _SHOWN:
            self._lines[field] = text if isinstance(text, str) else text()

    def report(self, field: str, text: str) -> None:
        """Add a problem, unless it names a field that has one already and so follows from that."""
        for name in (field, *re.findall(r"[a-z_]+(?:\.\w+)+", text)):
            if name in self._sections or any(n in self._lines for n in (name, *_sections(name))):
                return
        self.add(field, text)

    def lines(self) -> list[str]:
        more = {alike: count - _SHOWN for alike, count in self._alike.items() if count > _SHOWN}
        return [
            # A validator's own text has the whole value.
            *(f"{_short_name(f)}: {shortened(text, 1000)}" for f, text in self._lines.items()),
            *(f"{_short_name(alike)}: {count:,} more like these" for alike, count in more.items()),
        ]


def _sections(field: str) -> Iterator[str]:
    """Dotted names of the sections around a field."""
    parts = field.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))


def _short_name(field: str) -> str:
    return ".".join(shortened(part) for part in field.split("."))


def validated(data: dict[str, Node], problems: Problems) -> RunConfig | None:
    """The config, or None with all that pydantic finds wrong added to `problems`."""
    groups: dict[KeyPath, tuple[_Place, list[ErrorDetails]]] = {}
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            place = _place(details, data)
            groups.setdefault(place.path, (place, []))[1].append(details)
    around = {path[:count] for path in groups for count in range(len(path))}
    for path, (place, errors) in groups.items():
        if path in around:
            continue  # where one type of a union matched further, the error within says more
        if errors[0]["type"] == "extra_forbidden":
            _report_unknown(place, errors[0]["input"], problems)
        else:
            problems.add(dotted(path), partial(_wrong_value, place, errors))
    return None


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


def foreign_file(data: Node) -> list[str]:
    """Lines about a file that is another program's configuration; none if it may be a run file."""
    program = program_of(data)
    if program is None:
        return []
    what = f"is a configuration of {program}, not a run file"
    if program == "OneTrainer":
        return [f"{what}; `onewan import-config` makes a run file from it"]
    problems = Problems()
    for path, terms in foreign_leaves(data, ()):
        problems.add(dotted(path), _in_onewan(terms, path, get_path(data, path)))
    remedy = f"`onewan init` writes one, where these settings have other names (see also {TABLE})"
    return [f"{what}; {remedy}", *problems.lines()]


def _report_unknown(place: _Place, value: Node, problems: Problems) -> None:
    """Report a field that its section does not have, and what it has if it is a section of another
    program's file."""
    path = place.path
    inner = list(foreign_leaves(value, path)) if is_foreign_section(path) else []
    terms = terms_at(path) if not _members_with(place) else []
    if terms or inner:
        elsewhere = "onewan has its settings in other sections"
        text = _in_onewan(terms, path, value) if terms else elsewhere
        problems.add(dotted(path), f"unknown field; {text}")
    else:
        alike = f"{dotted(path[:-1]) or 'the file'}: unknown fields"
        problems.add(dotted(path), partial(_unknown, place), alike=alike)
    for at, found in inner:
        problems.add(dotted(at), _in_onewan(found, at, get_path(value, at[len(path) :])))


def _in_onewan(terms: Sequence[Term], path: KeyPath, value: Node) -> str:
    """What the setting that another program has at `path` is in a run file."""
    if taking := [term for term in terms if _takes(term.field, value)]:
        terms = taking
    described = [
        f"{_in_place(term.field, path)}{f' ({term.remark})' if term.remark else ''}"
        for term in terms
        if term.field
    ]
    if described:
        return f"in onewan that is {' or '.join(described)}"
    return f"there is no counterpart in onewan: {terms[0].remark}"


def _takes(name: str, value: Node) -> bool:
    """Whether `value` is one of the texts that the field of this name takes."""
    section, _, last = name.rpartition(".")
    union = members_of(field_at(tuple(section.split("."))))
    if union is not None and last == union.keyed.key:
        return isinstance(value, str) and value in union.sections
    field = field_at(tuple(name.split(".")))
    return isinstance(value, str) and field is not None and value in _literals(field.annotation)


def _in_place(name: str, path: KeyPath) -> str:
    """The name of a field, for the same item of a list as `path` if that is in the same list."""
    before, star, after = name.partition(".*.")
    if star and dotted(path[:-2]) == before and isinstance(path[-2], int):
        return f"{before}.{path[-2]}.{after}"
    return name.replace(".*", "[]")


def _unknown(place: _Place) -> str:
    """What is wrong with a field that the section does not have, and which one may be meant."""
    *around, name = place.path
    known, which, having, owner = list(place.section.model_fields), "", [], "known here:"
    if place.union is not None:
        key = place.union.keyed.key
        known.remove(key)
        which, owner = f" of {dotted((*around, key))} {place.kind}", f"{place.kind} has"
        having = _members_with(place)
    if having:
        which += f", but one of {', '.join(having[:4])}{', ...' if len(having) > 4 else ''}"
    elif near := _nearest(name, known):
        return f"unknown field; {near}"
    elif elsewhere := [full for full in schema_fields() if full.rpartition(".")[2] == name]:
        highest = min(full.count(".") for full in elsewhere)
        likely = [full.replace(".*", "[]") for full in elsewhere if full.count(".") == highest]
        return f"unknown field; did you mean {' or '.join(likely)}?"
    return f"unknown field{which}; {owner} {', '.join(known) or 'no fields'}"


def _members_with(place: _Place) -> list[str]:
    """The kinds of the union around an unknown field that have such a field."""
    if place.union is None:
        return []
    return [kind for kind, s in place.union.sections.items() if place.path[-1] in s.model_fields]


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
    near = difflib.get_close_matches(shortened(str(value)), texts, n=1)
    return f"did you mean '{near[0]}'?" if near else None


def _literals(annotation: Any) -> list[object]:
    """The values that a field's literal types allow, in lists and unions too."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for part in get_args(annotation) for value in _literals(part)]
