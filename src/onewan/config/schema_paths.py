"""The fields that the schema declares at a key path of the run file."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, TypeAlias, get_origin

from onewan.config.schema import RunConfig
from onewan.config.section import Section, sections_of
from onewan.documents import KeyPath

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

Problem: TypeAlias = tuple[str, str]
"""Dotted key path and message."""


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
