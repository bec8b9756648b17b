"""What a run file must keep to beyond its schema, and what its nulls stand for.

Hides every rule that spans sections or depends on the variant, and where the variant's own values
go. Never parses, never changes a value that was given, never looks at anything on the disk but
whether a prompt's image is there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TypeAlias, TypeVar

from onewan.config.schema import COMPONENTS, RunConfig, Section
from onewan.config.wording import show
from onewan.variants import NEGATIVE_PROMPT, VARIANTS, Variant

Problem: TypeAlias = tuple[str, str]
"""Dotted place, and what is wrong there."""

_S = TypeVar("_S", bound=Section)


def broken_rules(config: RunConfig, variant: Variant | None) -> Iterator[Problem]:
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
        yield from _share_rules(config, variant)
        yield from _condition_rules(config, variant)
        yield from _size_rules(config, variant)
    yield from _warmup_rules(config, variant)


def _list_rules(config: RunConfig) -> Iterator[Problem]:
    layers = config.wan_config.transformer_layers_to_train
    lists: dict[str, tuple[object, ...]] = {
        "wan_config.transformer_layers_to_train": layers or (),
        "method.modules": config.method.modules,
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
    if guidance is not None and len(guidance) != experts:
        form = "[high, low]" if experts == 2 else "[scale]"
        yield (
            "sample.guidance",
            f"must have one number for each expert of {variant.name}, {form}, got "
            f"{show(guidance)}; give {experts}, or leave it out for the official "
            f"{show([e.guidance_scale for e in variant.experts])}",
        )


def _share_rules(config: RunConfig, variant: Variant) -> Iterator[Problem]:
    choice, share = config.model.experts, config.train.high_share
    experts = len(variant.experts)
    if isinstance(share, str):
        return
    if experts == 1 or choice != "both":
        alone = "has one expert" if experts == 1 else f"trains only its {choice} expert"
        yield (
            "train.high_share",
            f"divides the steps between two experts, but {variant.name} {alone}, got {share}; "
            "leave it out",
        )
    elif share in (0, 1):
        idle, other = ("high", "low") if share == 0 else ("low", "high")
        yield (
            "train.high_share",
            f"leaves the {idle} expert no steps, got {share:g}; leave it out, and set "
            f"model.experts={other} to train the {other} expert alone",
        )


def _warmup_rules(config: RunConfig, variant: Variant | None) -> Iterator[Problem]:
    """The warm-up counts each expert's own steps, so the expert with the fewest is the limit.

    Without a variant, as with one expert, only the steps as a whole are known.
    """
    train = config.train
    steps, warmup, share = train.steps, train.warmup_steps, train.high_share
    both = variant is not None and len(variant.experts) == 2 and config.model.experts == "both"
    if not both or share == "mass":
        # The mass follows from the density of noise levels, which only training computes. So the
        # whole is the limit here, and a warm-up that outlasts an expert's steps goes unseen.
        if warmup >= steps:
            yield (
                "train.warmup_steps",
                f"must be less than train.steps ({steps}), got {warmup}; lower it",
            )
        return
    high = 0.5 if share == "equal" else share
    # About this many: train.expert_block deals them out in whole blocks.
    parts = {"high": max(1, round(steps * high)), "low": max(1, round(steps * (1 - high)))}
    expert, fewest = min(parts.items(), key=lambda part: part[1])
    if warmup >= fewest:
        alone = " or train one expert alone (model.experts)" if warmup < steps else ""
        yield (
            "train.warmup_steps",
            f"must be less than the {fewest} steps of the {expert} expert, its part of train.steps "
            f"({steps}) by train.high_share ({share}), got {warmup}; lower it{alone}",
        )


def _condition_rules(config: RunConfig, variant: Variant) -> Iterator[Problem]:
    """What the variant's condition allows: images beside prompts, clean first frames."""
    for index, prompt in enumerate(config.sample.prompts):
        field = f"sample.prompts.{index}.image"
        if variant.condition == "first_frame_channels" and prompt.image is None:
            yield field, f"{variant.name} starts from an image, got nothing; give a picture's file"
        if variant.condition == "text" and prompt.image is not None:
            yield (
                field,
                f"{variant.name} takes no image, got {show(prompt.image)}; leave it out, or use "
                "i2v-a14b or ti2v-5b",
            )
    given = "first_frame_probability" in config.train.model_fields_set
    if given and variant.condition != "first_frame_clean":
        yield (
            "train.first_frame_probability",
            f"is for ti2v-5b alone and does nothing for {variant.name}, got "
            f"{config.train.first_frame_probability:g}; leave it out",
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


# --------------------------------------------------------------------------------------- filling in


def resolved(config: RunConfig) -> RunConfig:
    """`config` with every null that stands for the variant's own value replaced by it."""
    variant = VARIANTS[config.model.variant]
    width, height = variant.sample_size
    ratios = {
        "spatial_compression_ratio": variant.spatial_compression,
        "temporal_compression_ratio": variant.temporal_compression,
    }
    timesteps = _filled(config.train.timesteps, shift=variant.flow_shift)
    return config.model_copy(
        update={
            "wan_config": config.wan_config.model_copy(update=ratios),
            "video_data": _filled(
                config.video_data,
                target_fps=float(variant.fps),
                resolution=(variant.training_area,),
            ),
            "method": _filled(config.method, alpha=float(config.method.rank)),
            "train": config.train.model_copy(update={"timesteps": timesteps}),
            "sample": _filled(
                config.sample,
                width=width,
                height=height,
                frames=variant.frames,
                fps=float(variant.fps),
                steps=variant.sampling_steps,
                shift=variant.flow_shift,
                guidance=tuple(expert.guidance_scale for expert in variant.experts),
                negative_prompt=NEGATIVE_PROMPT,
            ),
        }
    )


def _filled(section: _S, **values: object) -> _S:
    """A copy of `section` with `values` where it has None."""
    missing = {name: v for name, v in values.items() if getattr(section, name) is None}
    return section.model_copy(update=missing)
