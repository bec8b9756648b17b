"""Key paths into a run file, the values there, and the fields that the schema declares there."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, get_origin

from onewan.config.schema import RunConfig
from onewan.config.section import Section, sections_of

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


def format_value(value: object) -> str:
    """`value` as it is written in a run file, shortened to fit into a message."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(str(value)) if isinstance(value, (str, Path)) else repr(_as_lists(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _as_lists(value: object) -> object:
    return [_as_lists(item) for item in value] if is_tuple(value) else value


@cache
def schema_fields() -> dict[str, FieldInfo]:
    """Every field of the run file by its dotted name, in which `*` is any item of a list.

    Of a union, the fields of all members; a name that several have stands for the first one's.
    """

    def walk(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
        for name, field in section.model_fields.items():
            yield prefix + name, field
            item = "*." if get_origin(field.annotation) is tuple else ""
            for inner in sections_of(field.annotation):
                yield from walk(inner, f"{prefix}{name}.{item}")

    fields: dict[str, FieldInfo] = {}
    for name, field in walk(RunConfig, ""):
        fields.setdefault(name, field)
    return fields


def field_at(path: KeyPath) -> FieldInfo | None:
    """The field at `path`, for an item of a list that of the list."""
    name = ".".join("*" if isinstance(part, int) else part for part in path)
    return schema_fields().get(name.removesuffix(".*"))


def leaves() -> list[str]:
    """Dotted names of all fields that hold a value; `*` is any item of a list."""
    return [name for name, field in schema_fields().items() if not sections_of(field.annotation)]
