"""Rules between the fields of a run file, and between fields and the facts of the variant.

This module has those of the model, the data and the samples; `method_rules`, `train_rules` and
`unused` have the others. They are checked once every field is valid by itself, on the file as
given, before defaults are filled in. No rule changes a value or opens a file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from onewan.arithmetic.sample_request import image_error, request_errors
from onewan.config.method_rules import method_rules
from onewan.config.resolve import trained_experts
from onewan.config.schema import COMPONENTS, RunConfig
from onewan.config.schema_paths import Problem, format_value
from onewan.config.train_rules import train_rules
from onewan.config.unused import unused_field_problems


def rule_violations(config: RunConfig) -> Iterator[Problem]:
    """Every rule between fields, and between fields and the facts of the variant."""
    yield from _model_rules(config)
    yield from _size_rules(config)
    yield from _sample_rules(config)
    yield from method_rules(config)
    yield from train_rules(config)
    yield from unused_field_problems(config)


def _model_rules(config: RunConfig) -> Iterator[Problem]:
    """A whole model, or every component that the run needs."""
    model, variant = config.model, config.model.facts()
    given = model.sources()
    if not given:
        yield (
            "model.path",
            "is required, got nothing; give the folder or hub name of a whole model, or a path "
            f"for each component ({', '.join(COMPONENTS)})",
        )
    # Sampling takes both experts, whichever of them train.
    experts = variant.experts if config.sample.prompts else trained_experts(config)
    needed = {"vae", "text_encoder", *(expert.component for expert in experts)}
    missing = [c for c in COMPONENTS if c in needed and c not in given]
    if given and "path" not in given and missing:
        yield (
            f"model.{missing[0]}",
            f"is needed where model.path is not given, got nothing; give {' and '.join(missing)}, "
            "or a whole model as the path",
        )
    if len(variant.experts) == 1 and model.experts != "both":
        yield (
            "model.experts",
            f"{variant.name} has one expert, got {model.experts!r}; leave it out",
        )


def _size_rules(config: RunConfig) -> Iterator[Problem]:
    variant, wan, video = config.model.facts(), config.wan_config, config.video_data
    facts = {
        "spatial_compression_ratio": variant.spatial_compression,
        "temporal_compression_ratio": variant.temporal_compression,
    }
    for name, fact in facts.items():
        value = getattr(wan, name)
        if name in wan.model_fields_set and value != fact:
            yield f"wan_config.{name}", f"is {fact} for {variant.name}, got {value}; leave it out"
    low, high = video.min_resolution, video.max_resolution
    if low[0] > high[0] or low[1] > high[1]:
        yield (
            "video_data.min_resolution",
            f"must not be above video_data.max_resolution {format_value(high)}, got "
            f"{format_value(low)}; lower it, or raise the other",
        )
    sizes = video.resolution if isinstance(video.resolution, tuple) else ()
    for index, size in enumerate(sizes):
        field = "video_data.resolution" + (f".{index}" if len(sizes) > 1 else "")
        text = (
            _wrong_area(size, variant.size_multiple)
            if isinstance(size, int)
            else _wrong_size(size, variant.size_multiple, video.max_resolution)
        )
        if text:
            yield field, text


def _sample_rules(config: RunConfig) -> Iterator[Problem]:
    variant, sample = config.model.facts(), config.sample
    if sample.every and not sample.prompts:
        yield (
            "sample.every",
            f"is {sample.every}, but sample.prompts is empty; give a prompt, or set it to 0",
        )
    errors = request_errors(
        variant,
        width=sample.width,
        height=sample.height,
        frames=sample.frames,
        steps=sample.steps,
        guidance=sample.guidance,
    )
    yield from ((f"sample.{field}", message) for field, message in errors)
    for index, prompt in enumerate(sample.prompts):
        field = f"sample.prompts.{index}.image"
        if prompt.image is not None and not os.path.isfile(prompt.image):
            yield field, f"there is no file {prompt.image}; correct it"
        if error := image_error(variant, prompt.image):
            yield field, error


def _wrong_area(area: int, multiple: int) -> str | None:
    least = 2 * multiple
    if area >= least**2:
        return None
    return (
        f"is an area in pixels, and {area} is less than {least}x{least}; "
        "for 480p write 399360 or '832x480'"
    )


def _wrong_size(size: str, multiple: int, largest: tuple[int, int]) -> str | None:
    width, height = map(int, size.split("x"))
    if width % multiple or height % multiple:
        nearest = f"{_nearest(width, multiple)}x{_nearest(height, multiple)}"
        return f"sides must be multiples of {multiple}, got {size!r}; the nearest is '{nearest}'"
    if max(width, height) > max(largest) or min(width, height) > min(largest):
        return (
            f"must fit into video_data.max_resolution {format_value(largest)}, got {size!r}; "
            "raise that, or choose a smaller size"
        )
    return None


def _nearest(side: int, multiple: int) -> int:
    return max(multiple, round(side / multiple) * multiple)
