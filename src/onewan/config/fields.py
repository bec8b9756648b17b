"""What the schema declares: the fields by dotted name, those that are essential, their units, and
the JSON schema for editors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias, get_origin

from onewan.config.schema import RunConfig
from onewan.config.section import (
    Section,
    Several,
    is_section,
    members_of,
    sections_of,
    shorthand_of,
)
from onewan.documents import KeyPath, Node, is_list, is_mapping

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

Problem: TypeAlias = tuple[str, str]
"""Dotted key path and message."""

ESSENTIAL = (
    *("model.variant", "model.path", "model.experts", "wan_config.max_frames"),
    *("video_data.sources.*.path", "video_data.sources.*.trigger_word"),
    *("video_data.sources.*.repeats", "video_data.resolution"),
    *("method.kind", "method.rank", "method.block_size", "method.weights"),
    *("optimizer.name", "optimizer.lr"),
    *("train.steps", "train.epochs", "train.batch_size", "train.save_every"),
    *("sample.prompts.*.prompt", "sample.prompts.*.image", "sample.every"),
    *("output.name", "output.formats", "memory.weights", "memory.vram"),
)
"""Fields that every user should look at; the defaults of all others suit most runs."""

UNITS: Mapping[str, str] = {
    "wan_config.max_frames": "frames",
    "wan_config.stride": "s",
    "video_data.max_duration": "s",
    "video_data.target_fps": "frames/s",
    "video_data.min_resolution": "px",
    "video_data.max_resolution": "px",
    "video_data.sources.*.max_frames": "frames",
    "video_data.sources.*.max_duration": "s",
    "video_data.sources.*.target_fps": "frames/s",
    "video_data.sources.*.min_resolution": "px",
    "video_data.sources.*.max_resolution": "px",
    "per_expert.high.steps": "steps",
    "per_expert.low.steps": "steps",
    "optimizer.warmup_steps": "steps",
    "train.steps": "steps",
    "train.epochs": "passes",
    "train.batch_size": "clips",
    "train.warmup_steps": "steps",
    "train.cooldown_steps": "steps",
    "train.switch_expert_every": "steps",
    "train.save_every": "steps",
    "train.save_every_minutes": "min",
    "train.keep_every": "steps",
    "validation.every": "steps",
    "validation.clips": "clips",
    "sample.every": "steps",
    "sample.width": "px",
    "sample.height": "px",
    "sample.frames": "frames",
    "sample.fps": "frames/s",
    "sample.steps": "steps",
    "sample.distilled.steps": "steps",
    "sample.distilled.full_every": "steps",
    "memory.resident_blocks": "blocks",
}
"""Units of fields that are a number or a pair of numbers of something."""


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


def json_schema() -> dict[str, Any]:
    """The JSON schema of a run file."""
    schema = RunConfig.model_json_schema()
    # Short forms that pydantic does not know: a text for a source or a prompt, an empty section,
    # and the key of a union may be left out for its default, or be all that is given.
    inner = [s for field in schema_fields().values() for s in sections_of(field.annotation)]
    for section in dict.fromkeys([RunConfig, *inner]):
        here = schema if section is RunConfig else schema["$defs"][section.__name__]
        for name, field in section.model_fields.items():
            if name not in here.get("required", ()):
                _add_short_forms(here["properties"][name], field, schema["$defs"])
    _keep_standard_keywords(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _keep_standard_keywords(node: Node) -> None:
    """Drops from a schema what is not in JSON Schema, and what strict validators therefore refuse:
    the discriminators of OpenAPI, and pydantic's format of paths."""
    if is_mapping(node):
        if is_mapping(node.get("discriminator")) and "oneOf" in node:
            del node["discriminator"]
        if node.get("format") == "path":
            del node["format"]
    if is_mapping(node) or is_list(node):
        for inner in node.values() if is_mapping(node) else node:
            _keep_standard_keywords(inner)


def _add_short_forms(
    part: dict[str, Any], field: FieldInfo, sections: dict[str, dict[str, Any]]
) -> None:
    """Adds the short forms that reading accepts to `part`, the schema of `field`."""
    union = members_of(field)
    if union is not None:
        short: list[str] = []
        for key, section in union.sections.items():
            member = sections[section.__name__]
            # A section may be a member of several unions.
            others = [name for name in member.get("required", ()) if name != union.keyed.key]
            if not others:
                short.append(key)
            if key != union.keyed.default:
                # Otherwise a mapping without the key would match several members and fail oneOf.
                member["required"] = [union.keyed.key, *others]
        if "anyOf" in part:  # the union, or null
            part["oneOf"] = part.pop("anyOf")[0]["oneOf"]
        part["oneOf"] += [{"enum": short}] if union.keyed.text else []
        part["oneOf"].append({"type": "null"})
    elif "$ref" in part:
        part["anyOf"] = [{"$ref": part.pop("$ref")}, {"type": "null"}]
    elif is_section(field) and {"type": "null"} not in part["anyOf"]:
        part["anyOf"].append({"type": "null"})
    elif part.get("type") == "array" and sections_of(field.annotation):
        part["type"] = ["array", "null"]
        if shorthand_of(field):
            part["type"].append("string")
            part["items"] = {"anyOf": [part["items"], {"type": "string"}]}
    elif Several in field.metadata and part["items"].get("type") == "string":
        part["type"] = ["array", "string"]
