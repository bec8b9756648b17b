"""What a run file is started from: a short text to edit, and the JSON schema that editors read.

Hides the wording of that text for each variant, and the liberties of reading that pydantic's own
schema does not know of. Never reads or writes a file: `onewan init` and `onewan schema` print.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from onewan.config.schema import RunConfig
from onewan.config.schema_paths import members_of, sections_of
from onewan.config.section import Section
from onewan.variants import VARIANTS, VariantName

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

_STARTER = """\
# yaml-language-server: $schema=onewan.schema.json
# (completion and checks in your editor, after: onewan schema > onewan.schema.json)
#
# A LoRA for {title}. Whatever is left out keeps its default.
# Encode the clips with `onewan cache`, then start with `onewan train`.
schema_version: 1

model:
  path: {repository}  # on the hub; or a folder, diffusers' or official
  # Any component from elsewhere (also vae, text_encoder), such as a file for ComfyUI or GGUF:
{components}  variant: {name}
{experts}
wan_config:
  max_frames: {frames}  # 4n+1; {frames} at {fps} fps are {seconds:.1f} s; fewer need less memory

video_data:
  sources:
    - path: clips  # holds fox.mp4 (or fox.png) and its caption fox.txt, and so on{first_frame}
  supported_formats: [mp4, avi, mov, webm, mkv]
  max_duration: 6.0  # seconds; enough for max_frames
  # Sides are multiples of {multiple}. Left out: each clip's own shape at the area of 480p.
  # resolution: ["832x480"]

method:
  kind: lora  # or dora, loha, lokr, oft; fine_tune; embedding
  rank: 32  # more holds more, and costs memory and disk

optimizer:
  lr: 1e-4

train:
  steps: 2000{steps}
  save_every: 500

# validation: {{share: 0.1, every: 250}}  # holds a tenth of the clips out, to measure on

sample:
  width: 832  # the official {size} takes longer
  height: 480
{samples}

output:
  dir: runs  # the run's folder is runs/NAME, after the name of this file
"""

_COMPONENTS: Mapping[VariantName, tuple[str, ...]] = {
    "t2v-a14b": (
        "transformer: wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
        "transformer_2: wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors",
    ),
    "i2v-a14b": (
        "transformer: wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors",
        "transformer_2: wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors",
    ),
    "ti2v-5b": ("transformer: wan2.2_ti2v_5B_fp16.safetensors",),
}
"""Files for ComfyUI, as they are called on the hub."""

_SAMPLES = """\
  every: 500
  prompts:
    - prompt: a red fox runs through fresh snow, the camera follows
{image}"""


def starter(variant: VariantName) -> str:
    """A short commented run file with values worth starting with, for `onewan init`."""
    facts = VARIANTS[variant]
    two = len(facts.experts) == 2
    samples = _SAMPLES.format(image="      # image: first_frame.png  # starts the video from it")
    if not facts.takes_image:
        samples = _SAMPLES.format(image="").rstrip()
    elif facts.needs_image:
        # Commented out, since a file that names a picture nobody has would not load.
        live = _SAMPLES.format(image="      image: first_frame.png")
        samples = "\n".join(
            ["  # Sample videos start from a picture; put one beside this file, then uncomment."]
            + [f"  #{line[1:]}" for line in live.splitlines()]
        )
    first_frame = (
        "\n      # a clip's own first frame is the picture it starts from"
        if facts.needs_image
        else ""
    )
    return _STARTER.format(
        title=facts.title,
        repository=facts.repository,
        name=facts.name,
        components="".join(f"  # {c}\n" for c in _COMPONENTS[facts.name]),
        experts="  experts: both  # or high (layout and motion), or low (detail)\n" if two else "",
        frames=facts.frames,
        fps=facts.fps,
        seconds=facts.frames / facts.fps,
        first_frame=first_frame,
        multiple=facts.size_multiple,
        steps="  # of both experts together, half each" if two else "",
        size="x".join(map(str, facts.sample_size)),
        samples=samples,
    )


def json_schema() -> dict[str, Any]:
    """The JSON schema of a run file, from which editors complete and forms are made."""
    schema = RunConfig.model_json_schema()
    # Liberties of reading that pydantic can't know of: a prompt may be a mere text, a section may
    # be left empty, and a union's key may be left out for one of its members, or be all there is.
    for section in _all_sections(RunConfig):
        here = schema if section is RunConfig else schema["$defs"][section.__name__]
        for name, field in section.model_fields.items():
            if name not in here.get("required", ()):
                _permit(here["properties"][name], field, schema["$defs"])
    prompts = schema["$defs"]["SampleSection"]["properties"]["prompts"]
    prompts["items"] = {"anyOf": [prompts["items"], {"type": "string"}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _permit(part: dict[str, Any], field: FieldInfo, sections: dict[str, dict[str, Any]]) -> None:
    """Lets `part`, the schema of `field`, allow what reading allows."""
    union = members_of(field)
    if union is not None:
        short: list[str] = []
        for key, section in union.sections.items():
            member = sections[section.__name__]
            if not member.get("required"):
                short.append(key)
            if key != union.keyed.default:
                # Else a mapping without the key would match several members, which is none.
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
