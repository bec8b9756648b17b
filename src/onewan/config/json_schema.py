"""The JSON schema of the run file, which editors use for completion and checks.

pydantic's own schema is extended by the short forms that reading accepts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onewan.config.schema import RunConfig
from onewan.config.section import Section, members_of, sections_of

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo


def json_schema() -> dict[str, Any]:
    """The JSON schema of a run file."""
    schema = RunConfig.model_json_schema()
    # Short forms that pydantic does not know: a prompt may be a plain text, a section may be empty,
    # and the key of a union may be left out for its default, or be all that is given.
    for section in _all_sections(RunConfig):
        here = schema if section is RunConfig else schema["$defs"][section.__name__]
        for name, field in section.model_fields.items():
            if name not in here.get("required", ()):
                _add_short_forms(here["properties"][name], field, schema["$defs"])
    prompts = schema["$defs"]["SampleSection"]["properties"]["prompts"]
    prompts["items"] = {"anyOf": [prompts["items"], {"type": "string"}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _add_short_forms(
    part: dict[str, Any], field: FieldInfo, sections: dict[str, dict[str, Any]]
) -> None:
    """Adds the short forms that reading accepts to `part`, the schema of `field`."""
    union = members_of(field)
    if union is not None:
        short: list[str] = []
        for key, section in union.sections.items():
            member = sections[section.__name__]
            if not member.get("required"):
                short.append(key)
            if key != union.keyed.default:
                # Otherwise a mapping without the key would match several members and fail oneOf.
                member["required"] = [union.keyed.key, *member.get("required", ())]
        part["oneOf"] += [{"enum": short}] if union.keyed.text else []
        part["oneOf"].append({"type": "null"})
    elif "$ref" in part:
        part["anyOf"] = [{"$ref": part.pop("$ref")}, {"type": "null"}]
    elif part.get("type") == "array" and sections_of(field.annotation):
        part["type"] = ["array", "null"]


def _all_sections(section: type[Section]) -> list[type[Section]]:
    """`section` and all sections within it, each once."""
    found = {section: None}
    for field in section.model_fields.values():
        for inner in sections_of(field.annotation):
            found.update(dict.fromkeys(_all_sections(inner)))
    return list(found)
