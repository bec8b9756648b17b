"""The reference of the run file, as Markdown made from the schema in `onewan.config`.

Each field has a heading with the anchor of its dotted name, so that `configuration.md#train.steps`
is an address; `anchors()` lists them. Fields that the members of a union share, such as
`optimizer.lr`, stand once, with the members that differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, get_origin

from onewan.config.schema import RunConfig
from onewan.config.section import Section, members_of, sections_of

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

INTRODUCTION = """# Run file reference

Every setting of a run file, made from the schema that reads it (`onewan schema` writes the same
as a JSON schema). A setting is named by its path: `train.steps` is the key `steps` in the section
`train`, and on the command line `onewan train run.yaml train.steps=3000`. Only `model.variant` and
the files of the model have to be given; everything else has the default that is shown. Where that
is `null`, the value comes from the variant or the memory plan, or nothing is set, as the text
says. Brackets, as in `video_data.sources[]`, stand for an item of a list.
"""
_FORMS = {
    "video_data.resolution": "a size, or a list of sizes",
    "video_data.sources[].resolution": "a size, or a list of sizes",
    "memory.vram": "an amount such as 24GB or 24GiB",
    "memory.ram": "an amount such as 24GB or 24GiB",
}
"""Types that their JSON schema would only describe by a regular expression."""


class Variant(NamedTuple):
    """What a field is in one member of a union, or in a section that is none (`member` is None)."""

    member: str | None
    type: str
    default: str
    description: str


@cache
def reference() -> str:
    """The page."""
    return "\n".join([INTRODUCTION, *_section("", {None: RunConfig}, 2)])


@cache
def anchors() -> tuple[str, ...]:
    """The dotted names of all fields, which are their anchors, in the order of the page."""
    return tuple(re.findall(r"^#+ .* \{ #(\S+) \}$", reference(), re.MULTILINE))


@cache
def _schema(section: type[Section]) -> dict[str, Any]:
    return section.model_json_schema()


def _section(path: str, members: Mapping[str | None, type[Section]], level: int) -> Iterator[str]:
    """The fields of the section at `path`: values first, then the sections within."""
    names = dict.fromkeys(name for member in members.values() for name in member.model_fields)
    inner: list[tuple[str, FieldInfo]] = []
    for name in names:
        holders = {key: s for key, s in members.items() if name in s.model_fields}
        field = next(iter(holders.values())).model_fields[name]
        if sections_of(field.annotation):
            inner.append((name, field))
        elif not _is_key(name, members):
            yield from _field(path + name, holders, name)
    for name, field in inner:
        yield from _inner_section(path + name, field, level)


def _is_key(name: str, members: Mapping[str | None, type[Section]]) -> bool:
    """Whether `name` is the key that says which member of the union a section is."""
    return None not in members and all(
        name in member.model_fields and member.model_fields[name].default == key
        for key, member in members.items()
    )


def _inner_section(path: str, field: FieldInfo, level: int) -> Iterator[str]:
    is_list = get_origin(field.annotation) is tuple
    shown = f"{path}[]" if is_list else path
    yield from (_heading(min(level, 3), shown, path), "", _description(field), "")
    sections = sections_of(field.annotation)
    union = members_of(field)
    if union is None:
        (section,) = sections
        if section.shorthand:
            yield from (f"A text alone stands for its `{section.shorthand}`.", "")
        yield from _section(f"{shown}.", {None: section}, level + 1)
        return
    key = f"{shown}.{union.keyed.key}"
    yield from (_heading(4, key, _anchor(key)), "")
    short = " The name alone is enough where nothing else is set." if union.keyed.text else ""
    yield from (f"One of these; default `{union.keyed.default}`.{short}", "")
    for name, section in union.sections.items():
        yield f"- `{name}`: {_description(section.model_fields[union.keyed.key])}"
    yield ""
    yield from _section(f"{shown}.", dict(union.sections), level + 1)


def _field(path: str, holders: Mapping[str | None, type[Section]], name: str) -> Iterator[str]:
    variants = [_variant(path, member, section, name) for member, section in holders.items()]
    yield from (_heading(4, path, _anchor(path)), "")
    groups: dict[tuple[str, str, str], list[str]] = {}
    for variant in variants:
        groups.setdefault(variant[1:], []).append(f"`{variant.member}`")
    for (form, default, description), of in groups.items():
        of_members = "" if variants[0].member is None else f"{', '.join(of)}: "
        yield from (f"{of_members}*{form}; {default}*  ", description, "")


def _variant(path: str, member: str | None, section: type[Section], name: str) -> Variant:
    field = section.model_fields[name]
    schema = _schema(section)
    part = schema["properties"][name]
    default = "required"
    if not field.is_required():
        default = f"default `{_default(part['default'])}`" if "default" in part else "optional"
    form = _FORMS.get(path) or _form(part, schema.get("$defs", {}))
    return Variant(member, form, default, _description(field))


def _form(part: dict[str, Any], sections: Mapping[str, Any]) -> str:
    """A JSON schema in words."""
    for key in ("anyOf", "oneOf"):
        if key in part:
            return " or ".join(dict.fromkeys(_form(one, sections) for one in part[key]))
    if "$ref" in part:
        return "a section"
    if "enum" in part or "const" in part:
        names = [f"`{name}`" for name in part.get("enum", [part.get("const")])]
        return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    kind = part.get("type")
    if kind == "array":
        return _list_form(part, sections)
    if kind == "object":
        return "a mapping"
    words = {
        "integer": "whole number",
        "number": "number",
        "null": "null",
        "boolean": "true or false",
    }
    word = words.get(str(kind)) or ("path" if part.get("format") == "path" else "text")
    bounds = _bounds(part)
    return f"{word} ({bounds})" if bounds else word


def _list_form(part: dict[str, Any], sections: Mapping[str, Any]) -> str:
    if "prefixItems" in part:
        forms = dict.fromkeys(_form(item, sections) for item in part["prefixItems"])
        return f"list of {len(part['prefixItems'])}: {', '.join(forms)}"
    return f"list (each item: {_form(part.get('items', {}), sections)})"


def _bounds(part: Mapping[str, Any]) -> str:
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "more than",
        "maximum": "at most",
        "exclusiveMaximum": "less than",
        "multipleOf": "a multiple of",
    }
    if "minimum" in part and part["minimum"] == part.get("maximum"):
        return f"{part['minimum']:g}"
    given = [f"{word} {part[key]:g}" for key, word in words.items() if key in part]
    return ", ".join(given)


def _default(value: object) -> str:
    """A default as it is written in a run file."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _description(field: FieldInfo) -> str:
    """The field's documentation, with what HTML would take for a tag escaped outside of code."""
    text = " ".join((field.description or "").split())
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts)


def _anchor(path: str) -> str:
    return path.replace("[]", "")


def _heading(level: int, shown: str, anchor: str) -> str:
    return f"{'#' * level} `{shown}` {{ #{_anchor(anchor)} }}"
