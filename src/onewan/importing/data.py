"""OneTrainer's concepts and data settings -> `wan_config`, `video_data`, `validation.sources`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from onewan.documents import format_value
from onewan.importing.table import (
    OMIT,
    Context,
    Row,
    convert,
    copied,
    enabled_items,
    mapped,
    path,
    setting,
)
from onewan.media import IMAGE_SUFFIXES, extension
from onewan.onetrainer import settings


def _resolution(value: Any, context: Context) -> tuple[int | str, ...]:
    buckets = context["aspect_ratio_bucketing"]
    return settings.resolutions_of(value, buckets, context.variant.size_multiple)


_STRATEGY = setting(settings.frame_strategy_of, "uniform")

ROWS = (
    Row("frames", "wan_config.max_frames", "25", setting(settings.frames_of)),
    Row("wan_frame_strategy", "wan_config.frame_sample_strategy", "uniform", _STRATEGY),
    Row(
        "wan_temporal_consistency_weight",
        "wan_config.temporal_consistency_weight",
        1.0,
        copied(1.0),
    ),
    Row("wan_layers", "wan_config.transformer_layers_to_train", "", setting(settings.layers_of)),
    Row("wan_use_temporal_attention", "wan_config.use_temporal_attention", True, copied(True)),
    Row("wan_target_fps", "video_data.target_fps", None, copied()),
    Row("wan_max_duration", "video_data.max_duration", 10.0, copied(10.0)),
    Row("wan_supported_formats", "video_data.supported_formats", "", setting(settings.formats_of)),
    Row("wan_min_resolution", "video_data.min_resolution", "", setting(settings.min_resolution_of)),
    Row("wan_max_resolution", "video_data.max_resolution", "", setting(settings.max_resolution_of)),
    Row("masked_training", "video_data.masks", False, copied(False)),
    Row("latent_caching", "video_data.cache", True, copied(True)),
    Row("cache_dir", "video_data.cache_dir", "workspace-cache/run", path),
    Row("resolution", "video_data.resolution", "512", _resolution),
    Row("aspect_ratio_bucketing", "video_data.resolution", True),
)

# ----------------------------------------------------------------------------------------- concepts


def _path(value: Any, item: Context) -> str:
    folder = item.resolve(value)
    if not folder.is_dir():
        item.notice(f"{folder} does not exist, so its clips are not counted")
    return str(folder)


def _recursive(value: Any, item: Context) -> Any:
    """False where subfolders with clips are left out, which onewan reads by default."""
    inside = _count_clips(item.resolve(item["path"]), True)
    return OMIT if value or inside == item.clips else False


def _repeats(value: Any, item: Context) -> Any:
    exact = balancing = float(value)
    strategy = item["balancing_strategy"]
    if strategy == "SAMPLES":
        # The concept's clips per epoch, instead of repeats of each.
        exact = balancing / item.clips if item.clips else 1.0
    repeats = max(1, round(exact))
    if repeats != exact:
        item.notice(
            f"{balancing:g} ({strategy}) repeats each clip {exact:g} times; onewan repeats clips a "
            f"whole number of times, so {repeats} is used"
        )
    return OMIT if repeats == 1 else repeats


CONCEPT_ROWS = (
    Row("enabled", "path", True),
    Row("path", "path", "", _path),
    Row("include_subdirectories", "recursive", False, _recursive),
    Row("type", "target", "STANDARD", mapped(PRIOR_PREDICTION="base")),
    Row("loss_weight", "loss_weight", 1.0, lambda value, _: OMIT if value == 1 else value),
    Row("balancing", "repeats", 1.0, _repeats),
    Row("balancing_strategy", "repeats", "REPEATS"),
)


def sources(
    concepts: list[dict[str, Any]], context: Context
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """The enabled concepts as `video_data.sources` and `validation.sources`, and the clips of the
    former with their repeats. Augmentations and captions from elsewhere get a notice."""
    training: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
    clips = 0
    for item in enabled_items(concepts, CONCEPT_ROWS, "concepts", context):
        count = _count_clips(item.resolve(item["path"]), bool(item["include_subdirectories"]))
        item = replace(item, clips=count)
        if item["type"] == "VALIDATION":
            held_out.append(convert(CONCEPT_ROWS, item, within="validation.sources"))
        else:
            training.append(convert(CONCEPT_ROWS, item, within="video_data.sources"))
            clips += count * training[-1].get("repeats", 1)
        image, text = _object(item, "image"), _object(item, "text")
        for switch, value in {**image, **text}.items():
            # Cropping off center is on by default and changes little, so it gets no notice.
            if switch.startswith("enable_") and value is True and switch != "enable_crop_jitter":
                item.notices.append(f"{item.prefix[:-1]}: {switch} is on, which onewan does not do")
        if (source := text.get("prompt_source", "sample")) != "sample":
            caption = (
                f"is {format_value(source)}; onewan reads the caption beside each file, NAME.txt"
            )
            item.notice(caption, "text.prompt_source")
    return training, held_out, clips


def _object(item: Context, key: str) -> dict[str, Any]:
    found = item.given.get(key) or {}
    if isinstance(found, dict):
        return found
    item.problem(key, f"is {format_value(found)}; give an object")
    return {}


def _count_clips(folder: Path, recursive: bool) -> int:
    """Media files that OneTrainer would take; 0 if there is no such folder."""
    kinds = {*settings.VIDEO_FORMATS, *IMAGE_SUFFIXES}
    return sum(
        path.is_file() and extension(path) in kinds and not settings.is_companion_file(str(path))
        for path in folder.glob("**/*" if recursive else "*")
    )
