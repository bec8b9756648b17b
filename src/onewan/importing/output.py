"""OneTrainer's validation, samples and output settings -> `validation`, `sample` and `output`."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

from onewan.importing.intervals import report_time, steps
from onewan.importing.table import (
    OMIT,
    Condition,
    Context,
    Converter,
    Row,
    convert,
    copied,
    enabled_items,
)
from onewan.onetrainer import settings

_FORMATS = {
    "DIFFUSERS_LORA": "diffusers",
    "DIFFUSERS": "diffusers",
    "KOHYA_LORA": "kohya",
    "COMFY_LORA": "comfyui",
    "ORIGINAL_LORA": "comfyui",
    "LEGACY_LORA": "comfyui",
    "ORIGINAL_TRANSFORMER": "comfyui",
    "SAFETENSORS": "comfyui",
}
_DTYPES = {"FLOAT_32": "float32", "BFLOAT_16": "bfloat16", "FLOAT_16": "float16"}

_VALIDATES = Condition(lambda c: bool(c["validation"]), "validation is off")


def _interval(key: str, field: str) -> Converter:
    def convert(_: Any, context: Context) -> Any:
        report_time(context, key, field)
        return (context[key] and steps(context, key)) or OMIT

    return convert


def _name(value: Any, _: Context) -> Any:
    # The run file accepts names that are valid file names on every system.
    name = re.sub(r'[/\\:*?"<>|]', "_", PurePath(str(value)).stem).lstrip(".")
    return name or OMIT


def _formats(value: Any, context: Context) -> list[str]:
    if str(value) not in _FORMATS:
        context.notice("output_model_format", f"is {value}; comfyui is used")
    return [_FORMATS.get(str(value), "comfyui")]


def _dtype(value: Any, context: Context) -> Any:
    return _DTYPES.get(str(value), OMIT) if context.is_given("output_dtype") else OMIT


ROWS = (
    Row("validation", "validation.clips", False, lambda value, _: OMIT if value else 0),
    Row(
        "validate_after",
        "validation.every",
        1,
        _interval("validate_after", "validation.every"),
        _VALIDATES,
    ),
    Row("validate_after_unit", "validation.every", "EPOCH", None, _VALIDATES),
    Row("wan_validation_levels", "validation.timesteps", 4, copied(4)),
    Row("sample_after", "sample.every", 10, _interval("sample_after", "sample.every")),
    Row("sample_after_unit", "sample.every", "MINUTE"),
    Row("workspace_dir", "output.dir", "workspace/run", lambda v, c: str(c.resolve(v))),
    Row("output_model_destination", "output.name", "models/model.safetensors", _name),
    Row("output_model_format", "output.formats", "SAFETENSORS", _formats),
    Row("output_dtype", "output.dtype", "FLOAT_32", _dtype),
    Row("save_every", "train.save_every", 0, _interval("save_every", "train.save_every")),
    Row("save_every_unit", "train.save_every", "NEVER"),
)


# ------------------------------------------------------------------------------------------ samples


def _width(value: Any, item: Context) -> int:
    return settings.rounded_size(value, item.variant)


def _frames(value: Any, item: Context) -> int:
    return settings.rounded_frames(value, item.variant)


def _image(value: Any, item: Context) -> Any:
    return str(item.resolve(value)) if value else OMIT


def _guidance(value: Any, item: Context) -> tuple[float, ...]:
    return settings.guidance_of(value, item["wan_low_cfg_scale"], item.variant)


_HAS_SEED = Condition(lambda item: not item["random_seed"], "random_seed is on")

PROMPT_ROWS = (
    Row("enabled", "prompt", True),
    Row("prompt", "prompt", "", lambda value, _: value),
    Row("negative_prompt", "negative_prompt", "", lambda value, _: value or ""),
    Row(
        "base_image_path",
        "image",
        "",
        lambda value, item: str(item.resolve(value)) if value else OMIT,
    ),
    Row("random_seed", "seed", False),
    Row("seed", "seed", 42, copied(), _HAS_SEED),
)
"""Fields of one prompt."""

SAMPLING_ROWS = (
    Row("width", "width", 512, _width),
    Row("height", "height", 512, _width),
    Row("frames", "frames", 1, _frames),
    Row("diffusion_steps", "steps", 30, copied()),
    Row("cfg_scale", "guidance", 7.0, _guidance),
    Row("wan_low_cfg_scale", "guidance", None),
    Row("wan_fps", "fps", None, lambda value, _: value or OMIT),
    Row("wan_format", "format", "mp4", lambda value, _: "webm" if value == "webm" else OMIT),
)
"""Fields of `sample`, which a run file has once for all prompts."""


def samples(listed: list[dict[str, Any]], context: Context) -> dict[str, Any]:
    """The fields of `sample` but for its interval."""
    prompts: list[dict[str, Any]] = []
    common: dict[str, set[Any]] = {}
    for item in enabled_items(listed, (*PROMPT_ROWS, *SAMPLING_ROWS), "samples", context):
        prompts.append(convert(PROMPT_ROWS, item, within="sample.prompts"))
        for field, value in convert(SAMPLING_ROWS, item, within="sample").items():
            common.setdefault(field, set()).add(value)
    found: dict[str, Any] = {"prompts": prompts}
    for field, values in common.items():
        ordered = sorted(values, key=str)
        if len(values) > 1:
            context.notices.append(
                f"samples: {field} differs between them ({', '.join(map(str, ordered))}); a run "
                f"file has one for all prompts, and {ordered[0]} is used"
            )
        found[field] = list(ordered[0]) if isinstance(ordered[0], tuple) else ordered[0]
    return found
