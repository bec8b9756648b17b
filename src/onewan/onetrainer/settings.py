"""OneTrainer's settings -> onewan's: a `TrainConfig`'s objective and clips, a sample's sizes.

Only attributes and the names of enum members are read, so nothing of OneTrainer is imported.
Settings that Wan 2.2 does not support are refused, all at once, before anything is loaded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from onewan.arithmetic.buckets import SMALLEST_SIDE
from onewan.arithmetic.condition_shares import ConditionShares, Given, default_shares
from onewan.arithmetic.timestep_density import TimestepDensity
from onewan.config.objective import (
    BetaTimesteps,
    ConditionSharesSection,
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
from onewan.data.companions import role_of
from onewan.documents import format_value
from onewan.errors import ConfigError, OnewanError
from onewan.variants import VARIANTS, Variant, variant_of

SEED = 42
"""OneTrainer has no seed in its config; this is onewan's default."""

MASK_LABEL = "-masklabel"
"""OneTrainer's suffix of a clip's mask; onewan's own, NAME.mask.ext, is accepted too."""

# fmt: off
VIDEO_FORMATS = (
    "mp4", "avi", "mov", "webm", "mkv", "gif", "m4v", "mpeg", "mpg", "wmv", "flv", "ts",
)
# fmt: on
"""Extensions of video files; OneTrainer itself takes some of them."""

NO_LIMITS = {"wan_min_resolution": (1, 1), "wan_max_resolution": (16384, 16384)}
"""What the settings mean where they are empty: OneTrainer itself has no limits."""

SAMPLE_SIZE = (832, 480)
"""Width and height of a new sample: the 480p class, of which every variant makes samples."""

_BINS = 1000
"""Steps of a density without a formula; OneTrainer draws from as many timesteps."""


def variant_of_base_model(name: str, folder: Path) -> Variant | None:
    """The variant that the `name` of a base model determines, or the configuration of the
    transformer in `folder`; None if neither does."""
    # Local folders are usually named after the repository: Wan2.2-T2V-A14B.
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    for known, variant in VARIANTS.items():
        if known.replace("-", "") in plain:
            return variant
    file = folder / "transformer" / "config.json"
    try:
        return variant_of(json.loads(file.read_text(encoding="utf-8")), str(file))
    except (OSError, ValueError, OnewanError):
        return None


class SettingError(ValueError):
    """A setting that can't be used; the message has no key: ``is 'x'; give one number``."""


def check(config: Any, variant: Variant) -> None:
    """ConfigError with every setting that can't be used for Wan 2.2."""
    if problems := [f"{key}: {text}" for key, text in _setting_errors(config, variant)]:
        raise ConfigError("OneTrainer's settings for Wan 2.2", problems)


def _setting_errors(config: Any, variant: Variant) -> Iterator[tuple[str, str]]:
    if variant.name.startswith("fun"):
        yield (
            "base_model_name",
            f"is {variant.title}, which has no settings in OneTrainer; train it with onewan train",
        )
    for name in ("mae_strength", "log_cosh_strength"):
        if strength := getattr(config, name):
            yield name, f"is {strength}; use mse_strength or huber_strength, and set it to 0"
    if not (config.mse_strength or config.huber_strength):
        yield "mse_strength", "is 0, and so is huber_strength; set one of them"
    if (weighting := str(config.loss_weight_fn)) not in WEIGHTINGS:
        yield "loss_weight_fn", f"is {weighting}; choose {', '.join(WEIGHTINGS)}"
    if config.custom_conditioning_image:
        yield (
            "custom_conditioning_image",
            "is on; the start image of I2V is each clip's own first frame, so turn it off",
        )
    for part in ("transformer", "transformer_2", "text_encoder"):
        dtype = str(getattr(config, part).weight_dtype)
        if dtype.startswith("GGUF"):
            yield (
                f"{part}.weight_dtype",
                f"is {dtype}; choose FLOAT_8, INT_W8A8 or BFLOAT_16 (a GGUF file can be the model: "
                "its weights are expanded and then converted to that type)",
            )
    readers: dict[str, Callable[[Any], object]] = {
        "min_noising_strength": check_noising_strengths,
        "frames": frames_of,
        "wan_layers": layers_of,
        "wan_high_share": high_share_of,
        "wan_condition_shares": lambda c: condition_shares_of(c, variant),
        "resolution": lambda c: resolutions_of(
            c.resolution, c.aspect_ratio_bucketing, variant.size_multiple
        ),
        "wan_frame_strategy": frame_strategy_of,
        "wan_supported_formats": formats_of,
        "wan_min_resolution": min_resolution_of,
        "wan_max_resolution": max_resolution_of,
        "wan_boundary": boundary_of,
    }
    for name, read in readers.items():
        try:
            read(config)
        except SettingError as error:  # noqa: PERF203  (a few settings, once)
            yield name, str(error)


def losses_of(config: Any) -> tuple[tuple[float, LossSection], ...]:
    """(weight, loss) of all losses to add up. OneTrainer's Huber loss is half of onewan's, which
    equals the square for small errors."""
    found = ((config.mse_strength, LossSection(kind="mse")),)
    if config.huber_strength:
        section = LossSection(kind="huber", delta=config.huber_delta)
        found += ((config.huber_strength / 2, section),)
    return tuple((strength, section) for strength, section in found if strength)


def timesteps_of(config: Any) -> Timesteps:
    """The density of timesteps before the shift, and the shift.

    As in OneTrainer, the density is first rescaled to the range between the minimum and maximum
    noising strength, and then shifted. Its discrete distributions become tables. A dynamic shift is
    the variant's official one, scaled by the tokens of each clip.
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
            # OneTrainer's weight is added to a standard deviation of 1.
            chosen = LogitNormalTimesteps(mean=bias, std=max(1e-4, weight + 1), **common)
        case "HEAVY_TAIL":
            chosen = ModeTimesteps(scale=min(1.75, max(-1.0, weight)), **common)
        case "BETA":
            chosen = BetaTimesteps(alpha=max(1e-4, weight), beta=max(1e-4, bias), **common)
        case name:
            chosen = TableTimesteps(weights=tuple(_discrete(name, weight, bias)), **common)
    low, high = config.min_noising_strength, config.max_noising_strength
    return chosen if (low, high) == (0, 1) else _rescaled(chosen, low, high, common)


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
                    [f"timestep_distribution: is {name}; choose UNIFORM or LOGIT_NORMAL"],
                )


def density_of_timesteps(timesteps: Timesteps, variant: Variant) -> TimestepDensity:
    """The density after the shift."""
    return timesteps.density(variant.flow_shift)


def _rescaled(chosen: Timesteps, low: float, high: float, common: dict[str, Any]) -> Timesteps:
    base = chosen.base()
    edges = [min(1.0, max(0.0, (i / _BINS - low) / (high - low))) for i in range(_BINS + 1)]
    below = [base.cdf(u) for u in edges]
    weights = tuple(max(0.0, b - a) for a, b in pairwise(below))
    return TableTimesteps(weights=weights, **common)


WEIGHTINGS: dict[str, Callable[[Any], Weighting]] = {
    "CONSTANT": lambda _: NoWeighting(),
    # OneTrainer weights by sigma, which is t.
    "SIGMA": lambda _: CurveWeighting(points=((0.0, 0.0), (1.0, 1.0))),
    "MIN_SNR_GAMMA": lambda config: MinSnrWeighting(gamma=config.loss_weight_strength),
}


def weighting_of(config: Any) -> Weighting:
    """The loss weight by timestep."""
    return WEIGHTINGS.get(str(config.loss_weight_fn), WEIGHTINGS["CONSTANT"])(config)


def check_noising_strengths(config: Any) -> None:
    low, high = config.min_noising_strength, config.max_noising_strength
    if not 0 <= low < high <= 1:
        raise SettingError(
            f"is {low}, and max_noising_strength is {high}; both lie between 0 and 1, and the "
            "minimum is below the maximum"
        )


def high_share_of(config: Any) -> float | Literal["equal", "density"]:
    """`train.high_expert_share`; SettingError for anything else."""
    text = str(config.wan_high_share).strip().lower()
    if text in ("equal", "density"):
        return text
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise SettingError(
            f"is {format_value(config.wan_high_share)}; give equal, density or a number from 0 to 1"
        )
    return share


def condition_shares_of(config: Any, variant: Variant) -> ConditionShares:
    """`train.condition_shares`, from "first 0.5, both 0.5"; those that the variant has by default
    for an empty text; SettingError."""
    text = str(config.wan_condition_shares).strip()
    if not text:
        return default_shares(variant)
    found = [re.fullmatch(r"\s*([a-z]+)\s*[ :=]\s*([\d.]+)\s*", part) for part in text.split(",")]
    try:
        shares = {part[1]: float(part[2]) for part in found if part}
        ConditionSharesSection.model_validate(shares)
    except ValueError:
        shares = {}
    if len(shares) != len(found):
        raise SettingError(
            f"is {format_value(config.wan_condition_shares)}; give shares of "
            f"{', '.join(get_args(Given))} that add up to 1, such as first 0.5, both 0.5"
        )
    return ConditionShares(**shares)


def frames_of(config: Any) -> int:
    """The maximum frames of a clip; SettingError for anything but a number from 1."""
    text = str(config.frames).strip()
    if not re.fullmatch(r"0*[1-9]\d{0,5}", text):
        raise SettingError(f"is {format_value(config.frames)}; give one number, such as 81")
    return int(text)


def layers_of(config: Any) -> tuple[int, ...] | None:
    """The transformer blocks to train, from "0-9, 12"; None for all; SettingError."""
    text = str(config.wan_layers).strip()
    if not text:
        return None
    blocks: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,3})\s*(?:-\s*(\d{1,3})\s*)?", part)
        if found is None or int(found[2] or found[1]) < int(found[1]):
            raise SettingError(
                f"is {format_value(config.wan_layers)}; give numbers and ranges, such as 0-9, 12"
            )
        blocks |= set(range(int(found[1]), int(found[2] or found[1]) + 1))
    return tuple(sorted(blocks))


FrameStrategy = Literal["uniform", "random", "keyframe"]


def frame_strategy_of(config: Any) -> FrameStrategy:
    """`wan_config.frame_sample_strategy`; SettingError for anything else."""
    chosen = config.wan_frame_strategy
    if chosen not in get_args(FrameStrategy):
        raise SettingError(
            f"is {format_value(chosen)}; choose one of {', '.join(get_args(FrameStrategy))}"
        )
    return chosen


def formats_of(config: Any) -> tuple[str, ...]:
    """Extensions of the video files to use, from "mp4, .webm"; all for an empty text;
    SettingError."""
    names = [
        name.strip().lower().lstrip(".") for name in str(config.wan_supported_formats).split(",")
    ]
    if names == [""]:
        return VIDEO_FORMATS
    if unknown := [name for name in names if name not in VIDEO_FORMATS]:
        raise SettingError(f"has {format_value(unknown[0])}; give {', '.join(VIDEO_FORMATS)}")
    return tuple(dict.fromkeys(names))


def min_resolution_of(config: Any) -> tuple[int, int]:
    """(width, height); smaller files are skipped; SettingError."""
    return _size_of(config, "wan_min_resolution")


def max_resolution_of(config: Any) -> tuple[int, int]:
    """(width, height) that a training size given as an area may have; SettingError."""
    return _size_of(config, "wan_max_resolution")


def _size_of(config: Any, key: str) -> tuple[int, int]:
    text = str(getattr(config, key)).strip()
    if not text:
        return NO_LIMITS[key]
    size = re.fullmatch(r"([1-9]\d{0,4})\s*[xX]\s*([1-9]\d{0,4})", text)
    if size is None:
        raise SettingError(f"is {format_value(text)}; give a width and a height, such as 256x256")
    return int(size[1]), int(size[2])


def boundary_of(config: Any) -> float | None:
    """The timestep between the experts, None for the variant's own; SettingError."""
    boundary = config.wan_boundary
    if boundary is not None and not 0 < boundary < 1:
        raise SettingError(f"is {boundary}; give a timestep between 0 and 1, or leave it empty")
    return boundary


def resolutions_of(text: str, bucketing: bool, multiple: int) -> tuple[int | str, ...]:
    """Training sizes: "512" is the area of 512x512 in each clip's own shape, or without buckets
    that square; "832x480" is that size. SettingError."""
    sizes: list[int | str] = []
    for part in re.split(r"[,;]", str(text)):
        size = re.fullmatch(r"\s*(\d{1,5})\s*(?:[xX]\s*(\d{1,5})\s*)?", part)
        if size is None:
            raise SettingError(
                f"is {format_value(text)}; give numbers such as 512, or sizes such as 832x480"
            )
        width, height = int(size[1]), int(size[2] or size[1])
        exact = bool(size[2]) or not bucketing
        least = multiple if exact else SMALLEST_SIDE
        if min(width, height) < least:
            raise SettingError(f"is {format_value(text)}; sides are at least {least}")
        if exact:
            width, height = (max(1, round(side / multiple)) * multiple for side in (width, height))
            sizes.append(f"{width}x{height}")
        else:
            sizes.append(width * height)
    return tuple(sizes)


def with_onetrainers_names(message: str) -> str:
    """A message about the run file's fields, with the names of OneTrainer's settings."""
    return re.sub(
        r"video_data\.(supported_formats|min_resolution|max_resolution|target_fps|max_duration)",
        r"wan_\1",
        message,
    )


def is_companion_file(path: str) -> bool:
    """Whether the file belongs to a clip, as a mask for instance, rather than being one."""
    return role_of(Path(path)) is not None or Path(path).stem.endswith(MASK_LABEL)


# ------------------------------------------------------------------------------------------ samples


def rounded_size(pixels: float, variant: Variant) -> int:
    """Width or height: the nearest multiple that the VAE and the patches divide."""
    return max(1, round(pixels / variant.size_multiple)) * variant.size_multiple


def rounded_frames(frames: float | None, variant: Variant) -> int:
    """The nearest 4n+1; the official number for None."""
    if frames is None:
        return variant.frames
    temporal = variant.temporal_compression
    return max(0, round((frames - 1) / temporal)) * temporal + 1


def guidance_of(high: float | None, low: float | None, variant: Variant) -> tuple[float, ...]:
    """A scale for each expert: without `high` the official ones, without `low` that of `high`.
    OneTrainer's scales below 1 mean no guidance, which is 1."""
    official = [expert.guidance_scale for expert in variant.experts]
    given = [high, high if low is None else low][: len(official)]
    return tuple(
        theirs if scale is None else max(1.0, float(scale))
        for scale, theirs in zip(given, official, strict=True)
    )
