"""OneTrainer's settings -> onewan's: what a `TrainConfig` means for the objective and the clips.

Reads attributes and the names of enum members only, so it needs nothing of OneTrainer. What has no
meaning for Wan 2.2 is refused, all of it at once, before anything is loaded.
"""

from __future__ import annotations

import math
import re
from itertools import pairwise
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from onewan.config.objective import (
    BetaTimesteps,
    CurveWeighting,
    LogitNormalTimesteps,
    LossSection,
    MinSnrWeighting,
    ModeTimesteps,
    NoWeighting,
    TableTimesteps,
    Timesteps,
    UniformTimesteps,
    Weighting,
)
from onewan.config.schema import TrainSection, WanTrainConfig
from onewan.data.masks import is_mask
from onewan.errors import ConfigError
from onewan.arithmetic.timestep_density import density_of
from onewan.variants import Variant

SEED = 42
"""OneTrainer has no seed in its config; this is onewan's default."""

MASK_LABEL = "-masklabel"
"""What OneTrainer puts behind the name of a clip's mask; NAME.mask.ext, as onewan has it, counts
too."""

VIDEO_FORMATS = (
    "mp4",
    "avi",
    "mov",
    "webm",
    "mkv",
    "gif",
    "m4v",
    "mpeg",
    "mpg",
    "wmv",
    "flv",
    "ts",
)
"""Extensions of files that may be clips; OneTrainer names some of them."""

MIN_RESOLUTION, MAX_RESOLUTION = (1, 1), (16384, 16384)
"""OneTrainer has no limits for the size of files and of training samples."""

_BINS = 1000
"""Parts of a density that has no formula here; OneTrainer draws from as many timesteps."""


def check(config: Any, variant: Variant) -> None:
    """ConfigError with every setting that can't be followed for Wan 2.2."""
    if problems := list(setting_errors(config, variant)):
        raise ConfigError("OneTrainer's settings for Wan 2.2", problems)


def setting_errors(config: Any, variant: Variant) -> Iterator[str]:
    """What is wrong with `config`, each beginning with its key."""
    for name in ("mae_strength", "log_cosh_strength"):
        if getattr(config, name):
            yield (
                f"{name}: is {getattr(config, name)}; use mse_strength or huber_strength, and set "
                "it to 0"
            )
    if not (config.mse_strength or config.huber_strength):
        yield "mse_strength: is 0, as is huber_strength, so nothing would be learned; give one"
    if str(config.loss_weight_fn) not in ("CONSTANT", "SIGMA", "MIN_SNR_GAMMA"):
        yield (
            f"loss_weight_fn: is {config.loss_weight_fn}; choose CONSTANT, SIGMA or MIN_SNR_GAMMA"
        )
    if config.custom_conditioning_image:
        yield (
            "custom_conditioning_image: is on; the start image of I2V is each clip's own first "
            "frame, so turn it off"
        )
    for part in ("transformer", "transformer_2", "text_encoder"):
        dtype = str(getattr(config, part).weight_dtype)
        if dtype.startswith("GGUF"):
            yield (
                f"{part}.weight_dtype: is {dtype}; choose FLOAT_8, INT_W8A8 or BFLOAT_16 (a GGUF "
                "file can be the model; its weights are expanded and then brought to that type)"
            )
    low, high = config.min_noising_strength, config.max_noising_strength
    if not 0 <= low < high <= 1:
        yield (
            f"min_noising_strength: is {low}, max_noising_strength {high}; they are to rise "
            "between 0 and 1"
        )
    yield from _wrong_words(config, variant)


def _wrong_words(config: Any, variant: Variant) -> Iterator[str]:
    """Of the settings that are written as text."""
    readers: dict[str, tuple[Callable[[], object], str]] = {
        "frames": (lambda: frames_of(config), "give one number, such as 81"),
        "wan_layers": (lambda: layers_of(config), "give numbers and ranges, such as 0-9, 12"),
        "wan_high_share": (
            lambda: high_share_of(config),
            "give equal, density or a number from 0 to 1",
        ),
    }
    for name, (read, remedy) in readers.items():
        if not _is_readable(read):
            yield f"{name}: is {getattr(config, name)!r}; {remedy}"
    try:
        resolutions_of(config.resolution, config.aspect_ratio_bucketing, variant.size_multiple)
    except ValueError as error:
        yield f"resolution: {error}"
    strategies = ("uniform", "random", "keyframe")
    if config.wan_frame_strategy not in strategies:
        yield (
            f"wan_frame_strategy: is {config.wan_frame_strategy!r}; choose one of "
            f"{', '.join(strategies)}"
        )
    boundary = config.wan_boundary
    if boundary is not None and not 0 < boundary < 1:
        yield f"wan_boundary: is {boundary}; give a noise level between 0 and 1, or nothing"


def _is_readable(read: Callable[[], object]) -> bool:
    try:
        read()
    except ValueError:
        return False
    return True


def train_section(config: Any) -> TrainSection:
    """The parts of a run file's `train` that the objective and the schedule read."""
    return TrainSection(
        seed=SEED,
        batch_size=config.batch_size,
        accumulation=config.gradient_accumulation_steps,
        timesteps=timesteps_of(config),
        loss=LossSection(
            weighting=_weighting(config),
            unmasked_weight=config.unmasked_weight,
        ),
        high_expert_share=high_share_of(config),
        switch_expert_every=config.wan_expert_block,
        first_frame_probability=config.wan_first_frame_probability,
        noise_offset=config.offset_noise_weight,
        input_perturbation=config.perturbation_noise_weight,
    )


def losses_of(config: Any) -> tuple[tuple[float, LossSection], ...]:
    """What is added up: strengths and kinds. OneTrainer's Huber loss is half of onewan's, which
    equals the square for small errors."""
    found = ((config.mse_strength, LossSection(kind="mse")),)
    if config.huber_strength:
        section = LossSection(kind="huber", delta=config.huber_delta)
        found += ((config.huber_strength / 2, section),)
    return tuple((strength, section) for strength, section in found if strength)


def timesteps_of(config: Any) -> Timesteps:
    """The density of noise levels before the shift, and the shift.

    OneTrainer shifts after it has squeezed the density between the least and the largest strength;
    so is it here. Its discrete distributions become tables. A dynamic shift is the variant's
    official one, scaled by the tokens of each clip.
    """
    dynamic = bool(config.dynamic_timestep_shifting)
    common: dict[str, Any] = {
        "shift": None if dynamic else float(config.timestep_shift),
        "shift_by_tokens": dynamic,
    }
    weight, bias = config.noising_weight, config.noising_bias
    match str(config.timestep_distribution):
        case "UNIFORM":
            chosen: Timesteps = UniformTimesteps(**common)
        case "LOGIT_NORMAL":
            chosen = LogitNormalTimesteps(mean=bias, std=max(1e-4, weight + 1), **common)
        case "HEAVY_TAIL":
            chosen = ModeTimesteps(scale=min(1.75, max(-1.0, weight)), **common)
        case "BETA":
            chosen = BetaTimesteps(alpha=max(1e-4, weight), beta=max(1e-4, bias), **common)
        case name:
            chosen = TableTimesteps(weights=tuple(_discrete(name, weight, bias)), **common)
    low, high = config.min_noising_strength, config.max_noising_strength
    return chosen if (low, high) == (0, 1) else _squeezed(chosen, low, high, common)


def _discrete(name: str, weight: float, bias: float) -> Iterator[float]:
    for place in range(_BINS):
        u = (place + 0.5) / _BINS
        match name:
            case "COS_MAP":
                yield 2 / (math.pi * (1 - 2 * u + 2 * u * u))
            case "SIGMOID":
                yield 1 / (1 + math.exp(-weight * (u - bias - 0.5)))
            case "INVERTED_PARABOLA":
                yield max(0.0, 2 - weight * (u - bias - 0.5) ** 2)
            case _:
                raise ConfigError(
                    "OneTrainer's settings for Wan 2.2",
                    [f"timestep_distribution: {name} is not known; choose UNIFORM or LOGIT_NORMAL"],
                )


def _squeezed(chosen: Timesteps, low: float, high: float, common: dict[str, Any]) -> Timesteps:
    base = density_of(chosen, 1.0).base
    edges = [min(1.0, max(0.0, (i / _BINS - low) / (high - low))) for i in range(_BINS + 1)]
    below = [base.cdf(u) for u in edges]
    weights = tuple(max(0.0, b - a) for a, b in pairwise(below))
    return TableTimesteps(weights=weights, **common)


def _weighting(config: Any) -> Weighting:
    match str(config.loss_weight_fn):
        case "SIGMA":
            return CurveWeighting(points=((0.0, 0.0), (1.0, 1.0)))
        case "MIN_SNR_GAMMA":
            return MinSnrWeighting(gamma=config.loss_weight_strength)
        case _:
            return NoWeighting()


def high_share_of(config: Any) -> Any:
    """`train.high_expert_share`; ValueError if it is none."""
    text = str(config.wan_high_share).strip().lower()
    if text in ("equal", "density"):
        return text
    share = float(text)
    if not 0 <= share <= 1:
        raise ValueError(text)
    return share


def frames_of(config: Any) -> int:
    """Most frames of a clip; ValueError if that is no number from 1."""
    frames = int(str(config.frames).strip())
    if frames < 1:
        raise ValueError(frames)
    return frames


def layers_of(config: Any) -> tuple[int, ...] | None:
    """The transformer blocks that train, from "0-9, 12"; None is all."""
    text = config.wan_layers.strip()
    if not text:
        return None
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        chosen |= set(range(int(first), int(last if dash else first) + 1))
    if not chosen:
        raise ValueError(text)
    return tuple(sorted(chosen))


def resolutions_of(text: str, bucketing: bool, multiple: int) -> tuple[int | str, ...]:
    """Training sizes: of "512" the area of 512x512, which every shape of clip gets, or without
    buckets that square; "832x480" is that size. ValueError says what is wrong."""
    found: list[int | str] = []
    for part in re.split(r"[,;]", str(text)):
        size = re.fullmatch(r"\s*(\d+)\s*(?:[xX]\s*(\d+)\s*)?", part)
        if size is None:
            raise ValueError(f"is {text!r}; give numbers such as 512, or sizes such as 832x480")
        width, height = int(size[1]), int(size[2] or size[1])
        if min(width, height) < multiple:
            raise ValueError(f"is {text!r}; sides are at least {multiple}")
        if size[2] or not bucketing:
            width, height = (max(1, round(side / multiple)) * multiple for side in (width, height))
            found.append(f"{width}x{height}")
        else:
            found.append(width * height)
    return tuple(found)


def wan_config(config: Any) -> WanTrainConfig:
    """The run file's `wan_config`."""
    return WanTrainConfig(
        max_frames=frames_of(config),
        frame_sample_strategy=config.wan_frame_strategy,
        temporal_consistency_weight=config.wan_temporal_consistency_weight,
        transformer_layers_to_train=layers_of(config),
        use_temporal_attention=config.wan_use_temporal_attention,
    )


def is_mask_file(path: str) -> bool:
    """Whether the file is the mask of a clip, and no clip."""
    return is_mask(Path(path)) or Path(path).stem.endswith(MASK_LABEL)
