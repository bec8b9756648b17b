"""Key paths into a run file, and what the schema declares at a key path.

Hides how annotations are taken apart: sections in lists, optional sections, and unions that a key
such as `method.kind` discriminates. Where a union's member matters, the data is passed along, and
its key selects the member.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeGuard, Union, get_args, get_origin

from onewan.config.schema import RunConfig
from onewan.config.section import Keyed, Section

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

Node: TypeAlias = Any
"""Parsed YAML: a mapping, a list or a scalar."""
KeyPath: TypeAlias = tuple[str | int, ...]
"""Field names and list indices that lead to a value of the run file."""
Problem: TypeAlias = tuple[str, str]
"""Dotted key path and message."""


def is_mapping(node: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(node, dict)


def is_list(node: object) -> TypeGuard[list[Any]]:
    return isinstance(node, list)


def is_tuple(node: object) -> TypeGuard[tuple[object, ...]]:
    return isinstance(node, tuple)


def dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def format_value(value: object) -> str:
    """`value` as it is written in a run file, shortened to fit into a message."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if is_tuple(value):
        value = _as_lists(value)
    text = repr(str(value)) if isinstance(value, (str, Path)) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _as_lists(value: object) -> object:
    return [_as_lists(item) for item in value] if is_tuple(value) else value


def set_path(node: Node, path: KeyPath, value: Node) -> Node:
    """A copy of `node` with `value` at `path`; mappings and lists missing on the way are made.

    A copy, since YAML's aliases let one mapping lie in several places. ValueError where `path`
    leads through something that has no such part.
    """
    if not path:
        return value
    part, rest = path[0], path[1:]
    if isinstance(part, int):
        items: Node = [] if node is None else node
        if not is_list(items):
            raise ValueError(f"has no item {part}, got {format_value(node)}; name a field")
        if part > len(items):
            raise ValueError(f"the list has {len(items)} items; the next one is {len(items)}")
        item = items[part] if part < len(items) else None
        return [*items[:part], set_path(item, rest, value), *items[part + 1 :]]
    fields: Node = {} if node is None else node
    if not is_mapping(fields):
        raise ValueError(f"has no field '{part}', got {format_value(node)}; set that instead")
    return {**fields, part: set_path(fields.get(part), rest, value)}


def has_key(node: Node, part: str | int) -> bool:
    """Whether a mapping has this field, or a list this index."""
    if is_list(node):
        return isinstance(part, int) and part < len(node)
    return is_mapping(node) and part in node


def get_path(node: Node, path: KeyPath) -> Node:
    """The value at `path` of `node`, or None."""
    for part in path:
        if not has_key(node, part):
            return None
        node = node[part]
    return node


# ----------------------------------------------------------------------- walking through the schema


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """A union of sections: which section each value of its key stands for."""

    keyed: Keyed
    sections: Mapping[str, type[Section]]

    @property
    def default(self) -> type[Section]:
        return self.sections[self.keyed.default]

    def chosen(self, node: Node) -> tuple[str, type[Section]] | None:
        """Key and section that `node`, what the file has here, asks for; None if none of these."""
        whole = self.keyed.complete(node)
        key = whole.get(self.keyed.key) if is_mapping(whole) else self.keyed.default
        return (key, self.sections[key]) if isinstance(key, str) and key in self.sections else None


def leaves() -> list[str]:
    """Dotted names of all fields that hold a value; `*` is any item of a list."""

    def walk(section: type[Section], prefix: str) -> Iterator[str]:
        for name, field in section.model_fields.items():
            inner = sections_of(field.annotation)
            if not inner:
                yield prefix + name
            item = "*." if get_origin(field.annotation) is tuple else ""
            for member in inner:
                yield from walk(member, f"{prefix}{name}.{item}")

    return list(dict.fromkeys(walk(RunConfig, "")))


def fields_at(path: KeyPath, data: Node = None) -> dict[str, FieldInfo]:
    """The fields known at `path`; none if it is a value.

    Where a union is on the way, those of the member that `data` asks for, of all its members if
    there is no data or it asks for none of them.
    """
    here: list[type[Section]] = [RunConfig]
    for length, part in enumerate(path, start=1):
        if isinstance(part, int):  # leads from a list to the same sections
            continue
        found = [section.model_fields[part] for section in here if part in section.model_fields]
        here = [s for field in found for s in sections_of(field.annotation)]
        for members in filter(None, map(members_of, found)):
            chosen = members.chosen(get_path(data, path[:length])) if data is not None else None
            if chosen:
                here = [chosen[1]]
    known: dict[str, FieldInfo] = {}
    for section in here:
        for name, field in section.model_fields.items():
            known.setdefault(name, field)
    return known


def field_at(path: KeyPath, data: Node = None) -> FieldInfo | None:
    if not path or not isinstance(path[-1], str):
        return None
    return fields_at(path[:-1], data).get(path[-1])


def members_at(path: KeyPath, data: Node = None) -> Members | None:
    """The union at `path`, None if there is none."""
    field = field_at(path, data)
    return members_of(field) if field is not None else None


def members_of(field: FieldInfo) -> Members | None:
    for keyed in field.metadata:
        if isinstance(keyed, Keyed):
            sections = sections_of(field.annotation)
            named = {section.model_fields[keyed.key].default: section for section in sections}
            return Members(keyed=keyed, sections=named)
    return None


def alternatives(annotation: Any) -> set[Any]:
    """The members of a union, or the one type that it is."""
    if get_origin(annotation) in (Union, UnionType):
        return {a for member in get_args(annotation) for a in alternatives(member)}
    return {annotation}


def may_be_null(field: FieldInfo) -> bool:
    return NoneType in alternatives(field.annotation)


def holds_path(path: KeyPath) -> bool:
    """Whether the value at `path` is a path, or one of a list of paths."""
    field = field_at(path[:-1] if path and isinstance(path[-1], int) else path)
    if field is None:
        return False
    kinds = alternatives(field.annotation)
    return any(kind is Path or Path in get_args(kind) for kind in kinds)


def value_if_null(path: KeyPath) -> Node:
    """What nothing at `path` means: a section with all its defaults, no sections, or nothing."""
    field = field_at(path)
    if field is None or not sections_of(field.annotation) or may_be_null(field):
        return None
    return [] if get_origin(field.annotation) is tuple else {}


def sections_of(annotation: Any) -> list[type[Section]]:
    """The sections that a field may hold: itself, the members of a union, the items of a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_of(part)]


def literals(annotation: Any) -> list[object]:
    """The values that a field's literal types allow, in lists and unions too."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for part in get_args(annotation) for value in literals(part)]
