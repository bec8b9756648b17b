"""OneTrainer's concepts and data settings -> `wan_config`, `video_data`, `validation.sources`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onewan.importing.table import OMIT, Context, Row, convert, copied, enabled_items
from onewan.media import IMAGE_SUFFIXES, extension
from onewan.onetrainer import settings


def _resolution(_: Any, context: Context) -> list[int | str]:
    multiple = context.variant.size_multiple
    sizes = settings.resolutions_of(
        context["resolution"], context["aspect_ratio_bucketing"], multiple
    )
    return list(sizes)


def _layers(_: Any, context: Context) -> Any:
    layers = settings.layers_of(context.settings)
    return OMIT if layers is None else list(layers)


def _strategy(_: Any, context: Context) -> Any:
    chosen = settings.frame_strategy_of(context.settings)
    return OMIT if chosen == "uniform" else chosen


ROWS = (
    Row("frames", "wan_config.max_frames", "25", lambda _, c: settings.frames_of(c.settings)),
    Row("wan_frame_strategy", "wan_config.frame_sample_strategy", "uniform", _strategy),
    Row(
        "wan_temporal_consistency_weight",
        "wan_config.temporal_consistency_weight",
        1.0,
        copied(1.0),
    ),
    Row("wan_layers", "wan_config.transformer_layers_to_train", "", _layers),
    Row("wan_use_temporal_attention", "wan_config.use_temporal_attention", True, copied(True)),
    Row("wan_target_fps", "video_data.target_fps", None, copied()),
    Row("wan_max_duration", "video_data.max_duration", 10.0, copied(10.0)),
    Row("masked_training", "video_data.masks", False, copied(False)),
    Row("latent_caching", "video_data.cache", True, copied(True)),
    Row("cache_dir", "video_data.cache_dir", "workspace-cache/run", lambda v, c: str(c.resolve(v))),
    Row("resolution", "video_data.resolution", "512", _resolution),
    Row("aspect_ratio_bucketing", "video_data.resolution", True),
)

FIXED_FIELDS: Mapping[str, Any] = {
    "video_data.min_resolution": list(settings.MIN_RESOLUTION),
    "video_data.max_resolution": list(settings.MAX_RESOLUTION),
    "video_data.supported_formats": list(settings.VIDEO_FORMATS),
}
"""What OneTrainer always does: it takes clips of every size, and more kinds of files."""


# ----------------------------------------------------------------------------------------- concepts


@dataclass(frozen=True, slots=True)
class Source:
    """A concept as a source of clips."""

    fields: dict[str, Any]
    """Of `video_data.sources` or `validation.sources`."""
    clips: int
    """With their repeats; 0 if the folder is not there."""
    is_validation: bool


def sources(concepts: list[dict[str, Any]], context: Context) -> list[Source]:
    """The enabled concepts."""
    found: list[Source] = []
    for item in enabled_items(concepts, CONCEPT_ROWS, "concepts", context):
        folder = item.resolve(item["path"])
        clips = _count_clips(folder, bool(item["include_subdirectories"]))
        item = replace(item, clips=clips)
        is_validation = item["type"] == "VALIDATION"
        within = "validation.sources" if is_validation else "video_data.sources"
        fields = convert(CONCEPT_ROWS, item, within=within)
        _report_what_is_not_imported(item)
        found.append(Source(fields, clips * fields.get("repeats", 1), is_validation))
    return found


def _path(value: Any, item: Context) -> str:
    folder = item.resolve(value)
    if not folder.is_dir():
        item.notice("path", f"{folder} does not exist, so its clips are not counted")
    elif _count_clips(folder, True) != item.clips:
        # onewan always reads subfolders.
        item.notice(
            "include_subdirectories",
            f"is off, and {folder} has clips in subfolders, which onewan reads too; move them away",
        )
    return str(folder)


def _target(value: Any, _: Context) -> Any:
    return "base" if value == "PRIOR_PREDICTION" else OMIT


def _repeats(value: Any, item: Context) -> Any:
    balancing, strategy = float(value), item["balancing_strategy"]
    exact = balancing
    if strategy == "SAMPLES":
        # The concept's clips per epoch, instead of repeats of each.
        exact = balancing / item.clips if item.clips else 1.0
    repeats = max(1, round(exact))
    if repeats != exact:
        item.notice(
            "balancing",
            f"{balancing:g} ({strategy}) repeats each clip {exact:g} times; onewan repeats clips a "
            f"whole number of times, so {repeats} is used",
        )
    return OMIT if repeats == 1 else repeats


CONCEPT_ROWS = (
    Row("enabled", "path", True),
    Row("path", "path", "", _path),
    Row("include_subdirectories", "path", False),
    Row("type", "target", "STANDARD", _target),
    Row("loss_weight", "loss_weight", 1.0, lambda value, _: OMIT if value == 1 else value),
    Row("balancing", "repeats", 1.0, _repeats),
    Row("balancing_strategy", "repeats", "REPEATS"),
)


def _report_what_is_not_imported(item: Context) -> None:
    """A notice for each augmentation that is on, and for captions from elsewhere."""
    image, text = item.given.get("image") or {}, item.given.get("text") or {}
    for switch, value in {**image, **text}.items():
        # Cropping off center is on by default and changes little, so it gets no notice.
        if switch.startswith("enable_") and value is True and switch != "enable_crop_jitter":
            item.notices.append(f"{item.prefix[:-1]}: {switch} is on, which onewan does not do")
    if (source := text.get("prompt_source", "sample")) != "sample":
        item.notice(
            "text.prompt_source",
            f"is {source!r}; onewan reads the caption beside each file, NAME.txt",
        )


def _count_clips(folder: Path, recursive: bool) -> int:
    """Media files that OneTrainer would take; 0 if there is no such folder."""
    kinds = {*settings.VIDEO_FORMATS, *IMAGE_SUFFIXES}
    return sum(
        path.is_file() and extension(path) in kinds and not settings.is_mask_file(str(path))
        for path in (folder.rglob("*") if recursive else folder.glob("*"))
    )
