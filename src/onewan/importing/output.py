"""OneTrainer's validation, samples, saving and output -> `validation`, `sample` and `output`."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

from onewan.documents import format_value
from onewan.importing.table import (
    OMIT,
    Condition,
    Context,
    Converter,
    Row,
    convert,
    copied,
    enabled_items,
    mapped,
    path,
)
from onewan.onetrainer import settings
from onewan.onetrainer.settings import SettingError

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
_MINUTES = {"SECOND": 1 / 60, "MINUTE": 1.0, "HOUR": 60.0}


def _steps(value: Any, context: Context) -> Any:
    """Optimizer steps of an interval, which is a number with a unit; OMIT for never and times."""
    match str(context[f"{context.row.key}_unit"]):
        case "EPOCH":
            return max(1, round(value * context.steps_per_epoch))
        case "STEP":
            # OneTrainer counts micro-batches.
            return max(1, round(value / context["gradient_accumulation_steps"]))
        case "ALWAYS":
            return 1
        case "NEVER" | "SECOND" | "MINUTE" | "HOUR":
            return OMIT
        case unit:
            raise SettingError(f"has the unit {unit}, which is not known; select another unit")


def _every(value: Any, context: Context) -> Any:
    """The steps of an interval that the run file has in steps only; 0 means never."""
    row, unit = context.row, str(context[f"{context.row.key}_unit"])
    if unit in _MINUTES and context.is_given():
        number = f"{float(value):g} {unit.lower()}s"
        context.notice(f"is {number}; onewan counts steps, so set {row.field}")
    if unit == "NEVER" and row.field != "train.save_every":
        return 0
    return _steps(value, context) if value else OMIT


def _backup_minutes(unit: Any, context: Context) -> Any:
    factor = _MINUTES.get(str(unit))
    return OMIT if factor is None else float(context["backup_after"]) * factor


def _name(value: Any, _: Context) -> Any:
    # The run file accepts names that are valid file names on every system.
    name = re.sub(r'[/\\:*?"<>|]', "_", PurePath(str(value)).stem).lstrip(".")
    return name or OMIT


def _formats(value: Any, context: Context) -> list[str]:
    if str(value) not in _FORMATS:
        context.notice(f"is {format_value(value)}; comfyui is used")
    return [_FORMATS.get(str(value), "comfyui")]


def _dtype(value: Any, context: Context) -> Any:
    return _DTYPES.get(str(value), OMIT) if context.is_given() else OMIT


_VALIDATES = Condition(lambda c: bool(c["validation"]), "validation is off")

ROWS = (
    Row("backup_after", "train.save_every", 30, _steps),
    Row("backup_after_unit", "train.save_every_minutes", "MINUTE", _backup_minutes),
    Row("rolling_backup_count", "train.keep_last", 3, copied(2)),
    Row("validation", "validation.clips", False, lambda value, _: OMIT if value else 0),
    Row("validate_after", "validation.every", 1, _every, _VALIDATES),
    Row("validate_after_unit", "validation.every", "EPOCH", None, _VALIDATES),
    Row("wan_validation_levels", "validation.timesteps", 4, copied(4)),
    Row("sample_after", "sample.every", 10, _every),
    Row("sample_after_unit", "sample.every", "MINUTE"),
    Row("workspace_dir", "output.dir", "workspace/run", lambda v, c: str(c.resolve(v))),
    Row("output_model_destination", "output.name", "models/model.safetensors", _name),
    Row("output_model_format", "output.formats", "SAFETENSORS", _formats),
    Row("output_dtype", "output.dtype", "FLOAT_32", _dtype),
    Row("save_every", "train.save_every", 0, _every),
    Row("save_every_unit", "train.save_every", "NEVER"),
)

# ------------------------------------------------------------------------------------------ samples


def _size(of_wan: int) -> Converter:
    """A side in pixels; the default of a sample of Wan is `of_wan`."""
    return lambda value, item: settings.rounded_size(
        value if item.is_given() else of_wan, item.variant
    )


def _frames(value: Any, item: Context) -> Any:
    if value is None or not item.is_given():
        return OMIT
    return settings.rounded_frames(value, item.variant)


def _sampling_steps(value: Any, item: Context) -> Any:
    return value if value is not None and item.is_given() else OMIT


def _guidance(value: Any, item: Context) -> Any:
    low, high = item["wan_low_cfg_scale"], value if item.is_given() else None
    if high is None and low is None:
        return OMIT
    return settings.guidance_of(high, low, item.variant)


_HAS_SEED = Condition(lambda item: not item["random_seed"], "random_seed is on")

PROMPT_ROWS = (
    Row("enabled", "prompt", True),
    Row("prompt", "prompt", "", lambda value, _: value),
    Row("negative_prompt", "negative_prompt", "", lambda value, _: value or ""),
    Row("base_image_path", "image", "", path),
    Row("wan_last_image_path", "last_image", "", path),
    Row("random_seed", "seed", False),
    Row("seed", "seed", 42, copied(), _HAS_SEED),
)
"""Fields of one prompt."""

SAMPLING_ROWS = (
    Row("width", "width", 512, _size(settings.SAMPLE_SIZE[0])),
    Row("height", "height", 512, _size(settings.SAMPLE_SIZE[1])),
    Row("frames", "frames", 1, _frames),
    Row("diffusion_steps", "steps", 30, _sampling_steps),
    Row("cfg_scale", "guidance", 7.0, _guidance),
    Row("wan_low_cfg_scale", "guidance", None),
    Row("wan_fps", "fps", None, lambda value, _: value or OMIT),
    Row("wan_format", "format", "mp4", mapped(webm="webm")),
)
"""Fields of `sample`, which a run file has once for all prompts."""


def samples(listed: list[dict[str, Any]], context: Context) -> dict[str, Any]:
    """The fields of `sample` but for its interval."""
    prompts: list[dict[str, Any]] = []
    common: dict[str, dict[str, Any]] = {}  # field -> its different values, by their text
    for item in enabled_items(listed, (*PROMPT_ROWS, *SAMPLING_ROWS), "samples", context):
        prompts.append(convert(PROMPT_ROWS, item, within="sample.prompts"))
        for field, value in convert(SAMPLING_ROWS, item, within="sample").items():
            common.setdefault(field, {})[str(value)] = value
    found: dict[str, Any] = {"prompts": prompts}
    for field, values in common.items():
        first = min(values)
        if len(values) > 1:
            context.notices.append(
                f"samples: {field} differs between them ({', '.join(sorted(values))}); a run file "
                f"has one for all prompts, and {first} is used"
            )
        found[field] = values[first]
    return found
