"""What a run file must keep to beyond its schema: all rules that span sections or need facts.

Here are those of the model, the data and the samples; what trains and how has its own two modules.
Never parses, never changes a value, never looks at anything on the disk but whether a file that was
named is there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from onewan.config.method_rules import method_rules
from onewan.config.schema import COMPONENTS, RunConfig
from onewan.config.schema_paths import Problem, show
from onewan.config.train_rules import train_rules
from onewan.variants import Variant


def rule_violations(config: RunConfig, variant: Variant | None) -> Iterator[Problem]:
    """Every rule that spans sections or needs facts; those that need facts only with `variant`."""
    yield from _list_rules(config)
    yield from _model_rules(config, variant)
    video, sample = config.video_data, config.sample
    if any(
        low > high for low, high in zip(video.min_resolution, video.max_resolution, strict=True)
    ):
        yield (
            "video_data.min_resolution",
            f"must not be above video_data.max_resolution {show(video.max_resolution)}, got "
            f"{show(video.min_resolution)}; lower it, or raise the other",
        )
    if sample.frames is not None and sample.frames % 4 != 1:
        below = (sample.frames - 1) // 4 * 4 + 1
        yield (
            "sample.frames",
            f"must be 4n+1, got {sample.frames}; the nearest are {below} and {below + 4}",
        )
    for index, prompt in enumerate(sample.prompts):
        if prompt.image is not None and not os.path.isfile(prompt.image):
            yield f"sample.prompts.{index}.image", f"there is no file {prompt.image}; correct it"
    if variant is not None:
        yield from _expert_rules(config, variant)
        yield from _condition_rules(config, variant)
        yield from _size_rules(config, variant)
    yield from method_rules(config, variant)
    yield from train_rules(config, variant)


def _list_rules(config: RunConfig) -> Iterator[Problem]:
    layers = config.wan_config.transformer_layers_to_train
    lists: dict[str, tuple[object, ...]] = {
        "wan_config.transformer_layers_to_train": layers or (),
        "output.formats": config.output.formats,
    }
    for name, values in lists.items():
        twice = sorted({str(v) for v in values if values.count(v) > 1})
        if twice:
            yield name, f"has {', '.join(twice)} twice, got {show(values)}; give each once"
    if layers == ():
        yield (
            "wan_config.transformer_layers_to_train",
            "must name at least one block, got []; leave it out to train all",
        )


def _model_rules(config: RunConfig, variant: Variant | None) -> Iterator[Problem]:
    """A whole model, or every component that the run needs; none that it has no use for."""
    given = config.model.sources()
    if not given:
        yield (
            "model.path",
            "is required, got nothing; give the folder or hub name of a whole model, or a path "
            f"for each component ({', '.join(COMPONENTS)})",
        )
    if variant is None:
        return
    if "transformer_2" in given and len(variant.experts) == 1:
        yield (
            "model.transformer_2",
            f"{variant.name} has one transformer, got {show(given['transformer_2'])}; leave it out",
        )
    choice = "both" if config.sample.prompts or len(variant.experts) == 1 else config.model.experts
    needed = {expert.component for expert in variant.selected(choice)} | {"vae", "text_encoder"}
    lacking = [name for name in COMPONENTS if name in needed and name not in given]
    if given and "path" not in given and lacking:
        yield (
            f"model.{lacking[0]}",
            f"is needed where model.path is not given, got nothing; give {' and '.join(lacking)}, "
            "or a whole model as the path",
        )


def _expert_rules(config: RunConfig, variant: Variant) -> Iterator[Problem]:
    choice, guidance = config.model.experts, config.sample.guidance
    experts = len(variant.experts)
    if experts == 1 and choice != "both":
        yield (
            "model.experts",
            f"{variant.name} has one expert, got {choice!r}; leave it out",
        )
    if experts == 1 and config.model.boundary is not None:
        yield (
            "model.boundary",
            f"{variant.name} has one expert, got {config.model.boundary:g}; leave it out",
        )
    if guidance is not None and len(guidance) != experts:
        form = "[high, low]" if experts == 2 else "[scale]"
        yield (
            "sample.guidance",
            f"must have one number for each expert of {variant.name}, {form}, got "
            f"{show(guidance)}; give {experts}, or leave it out for the official "
            f"{show([e.guidance_scale for e in variant.experts])}",
        )


def _condition_rules(config: RunConfig, variant: Variant) -> Iterator[Problem]:
    """What the variant's condition allows: images beside prompts, clean first frames."""
    for index, prompt in enumerate(config.sample.prompts):
        field = f"sample.prompts.{index}.image"
        if variant.needs_image and prompt.image is None:
            yield field, f"{variant.name} starts from an image, got nothing; give a picture's file"
        if not variant.takes_image and prompt.image is not None:
            yield (
                field,
                f"{variant.name} takes no image, got {show(prompt.image)}; leave it out, or use "
                "i2v-a14b or ti2v-5b",
            )
    for name in ("first_frame_probability", "first_frame_noise"):
        value = getattr(config.train, name)
        given = name in config.train.model_fields_set and value is not None
        if given and not variant.has_clean_first_frame:
            yield (
                f"train.{name}",
                f"is for ti2v-5b alone and does nothing for {variant.name}, got {show(value)}; "
                "leave it out",
            )


def _size_rules(config: RunConfig, variant: Variant) -> Iterator[Problem]:
    wan, video, sample = config.wan_config, config.video_data, config.sample
    facts = {
        "spatial_compression_ratio": (wan.spatial_compression_ratio, variant.spatial_compression),
        "temporal_compression_ratio": (
            wan.temporal_compression_ratio,
            variant.temporal_compression,
        ),
    }
    for name, (value, fact) in facts.items():
        if name in wan.model_fields_set and value != fact:
            yield f"wan_config.{name}", f"is {fact} for {variant.name}, got {value}; leave it out"

    multiple = variant.size_multiple
    for name, side in (("width", sample.width), ("height", sample.height)):
        if side is not None and side % multiple:
            yield (
                f"sample.{name}",
                f"must be a multiple of {multiple} for {variant.name}, got {side}; the nearest is "
                f"{_nearest(side, multiple)}",
            )
    sizes = video.resolution if isinstance(video.resolution, tuple) else ()
    for index, size in enumerate(sizes):
        field = "video_data.resolution" + (f".{index}" if len(sizes) > 1 else "")
        text = (
            _wrong_area(size, multiple)
            if isinstance(size, int)
            else _wrong_size(size, multiple, video.max_resolution)
        )
        if text:
            yield field, text


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
            f"must fit into video_data.max_resolution {show(largest)}, got {size!r}; "
            "raise that, or choose a smaller size"
        )
    return None


def _nearest(side: int, multiple: int) -> int:
    return max(multiple, round(side / multiple) * multiple)
