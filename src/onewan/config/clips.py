"""The fields of the run file about clips: `wan_config`, `video_data` and the sources of clips.

As in `schema`, the string under each field is its documentation.
"""

# Sections are immutable, so a subclass may narrow the type of a field and take its default away.
# pyright: reportIncompatibleVariableOverride=false, reportGeneralTypeIssues=false

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, cast

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator
from typing_extensions import Self

from onewan.arithmetic.buckets import LARGEST_SIDE, SMALLEST_SIDE, parse_sizes
from onewan.config.objective import OwnWeighting
from onewan.config.section import Distinct, Float, Int, Positive, Section, Several, Share, Size
from onewan.documents import format_value
from onewan.variants import NUM_TRAIN_TIMESTEPS

_Phrase = Annotated[str, AfterValidator(lambda value: " ".join(value.split()))]
_Extension = Annotated[str, AfterValidator(lambda value: value.lower().lstrip("."))]
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(text: str) -> bool:
    """Whether `text` is an address such as s3://bucket/clips, not a path on this machine."""
    return bool(_URL.match(text))


def _as_location(value: object) -> object:
    # A path would make one slash of the two in an address.
    return Path(value) if isinstance(value, str) and not is_url(value) else value


Location = Annotated[Path | str, BeforeValidator(_as_location), WithJsonSchema({"type": "string"})]
"""A path on this machine, or an address as text."""
_Change = Annotated[Float, Field(ge=0, lt=1)]
_SIDE = {"type": "integer", "minimum": 1, "maximum": LARGEST_SIDE}
_PAIR = {"type": "array", "items": _SIDE, "minItems": 2, "maxItems": 2}
_ONE_SIZE = [
    {"type": "integer", "minimum": SMALLEST_SIDE, "maximum": LARGEST_SIDE},
    {"type": "integer", "minimum": SMALLEST_SIDE**2},
    {"type": "string", "pattern": "^ *[1-9][0-9]*( *[xX] *[1-9][0-9]*|[pP])? *$"},
]
_SIZES = {
    "anyOf": [
        *_ONE_SIZE,
        _PAIR,
        {"type": "array", "items": {"anyOf": [*_ONE_SIZE, _PAIR]}, "minItems": 1},
        {"type": "null"},
    ]
}
"""JSON schema of what `parse_sizes` takes."""

_NOISE_LEVEL = {"type": "number", "minimum": 0, "maximum": 1}
_RANGE = {
    "anyOf": [
        {"enum": ["high", "low"]},
        {"type": "array", "items": _NOISE_LEVEL, "minItems": 2, "maxItems": 2},
        {"type": "null"},
    ]
}
"""JSON schema of what `_as_range` takes."""


def _as_range(value: object) -> object:
    if value is None or value in ("high", "low"):
        return value
    given = format_value(value)
    ends = cast("Sequence[object]", value) if isinstance(value, list | tuple) else ()
    numbers = [float(end) for end in ends if isinstance(end, int | float) and end is not True]
    if len(ends) != 2 or len(numbers) != 2:
        form = "must be high, low, or a list of two noise levels from 0 to 1 such as [0.875, 1]"
        raise ValueError(f"{form}, got {given}")
    low, high = numbers
    if not 0 <= low < high <= 1:
        remedy = "give the lower one first"
        if 0 <= low < high <= NUM_TRAIN_TIMESTEPS:
            scaled = ", ".join(f"{number / NUM_TRAIN_TIMESTEPS:g}" for number in numbers)
            remedy = f"if these are timesteps up to {NUM_TRAIN_TIMESTEPS}, write [{scaled}]"
        rule = "must be two noise levels from 0 (clean) to 1 (noise)"
        raise ValueError(f"{rule}, got {given}; {remedy}")
    return (low, high)


_COLOR = "^#[0-9a-fA-F]{6}$"


def _as_color(value: object) -> object:
    # Without quotes, a color is a comment in YAML, and so nothing.
    if isinstance(value, str) and re.fullmatch(_COLOR, value):
        return value
    found = "nothing" if value is None else f"`{value}`"
    raise ValueError(f'{found} is no color; write it as "#rrggbb", in quotes, such as "#ffffff"')


SEVERAL_CLIPS = ("uniform", "random", "keyframe")
"""Strategies that give `clips_per_video` clips."""
LIST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".json", ".tar")
"""Extensions of files that list or hold clips; other sources are folders."""
Interlaced = Literal["deinterlace", "refuse", "top_first", "bottom_first"]
Strategy = Literal["uniform", "middle", "head", "random", "keyframe", "chunks", "sliding", "all"]


class WanTrainConfig(Section):
    """The `wan_config` section: frames per clip, trained blocks and temporal behavior."""

    max_frames: Int | None = Field(default=None, ge=1)
    """Maximum frames of a training clip, rounded down to 4n+1 as the VAE takes it (16: 13); null is
    the variant's own number (81, or 121 for TI2V-5B: five seconds)."""
    clip_lengths: Annotated[tuple[Annotated[Int, Field(ge=1)], ...], Several, Distinct] = ()
    """Numbers of frames, such as [17, 33, 81], instead of `max_frames`: each video gives clips of
    each of them."""
    frame_sample_strategy: Strategy = "uniform"
    """Which parts of a longer video are clips: `clips_per_video` spread evenly (`uniform`; one is
    the middle), the middle, the beginning (`head`), from a change of scene or key frame on
    (`keyframe`), at random, another in each pass (`random`), one behind the other (`chunks`; `all`
    with the rest too), or overlapping (`sliding`). The speed is never changed."""
    clips_per_video: Int | None = Field(default=None, ge=1)
    """Clips of each video for `uniform` and `keyframe` (null: 1), or the random parts that are
    encoded for `random` (null: 4), of which each pass through the data takes one."""
    stride: Positive | None = None
    """Seconds between the beginnings of `sliding` clips; null is half of a clip."""
    avoid_cuts: bool = False
    """Take no clip across a change of scene; needs to read all videos completely once."""
    temporal_consistency_weight: Float = Field(default=1.0, ge=0)
    """Loss weight of each frame's deviation from the mean error over frames. 1.0 is exactly the
    plain loss; larger values penalize flicker and wrong motion, smaller ones favor appearance."""
    transformer_layers_to_train: (
        Annotated[tuple[Annotated[Int, Field(ge=0)], ...], Field(min_length=1), Distinct] | None
    ) = None
    """Indices of the transformer blocks to train, e.g. [0, 1, 2]; null is all."""
    use_temporal_attention: bool = True
    """false: in training, each latent frame attends only to itself (styles and characters)."""
    spatial_compression_ratio: Int = 8
    """Spatial compression of the variant's VAE (8, or 16 for TI2V-5B); must match if given."""
    temporal_compression_ratio: Int = 4
    """Temporal compression of the variant's VAE (4); must match if given."""


class ResolvedWanTrainConfig(WanTrainConfig):
    max_frames: int
    clips_per_video: int


class AugmentSection(Section):
    """Variants of clips that are encoded beside them; each pass takes the clip or one of them."""

    flip: Share = 0.0
    """Probability that a variant is mirrored left to right."""
    crop: Annotated[Float, Field(ge=0, le=0.5)] = 0.0
    """Largest part of width and height that is cropped away, at a random place, such as 0.1."""
    brightness: _Change = 0.0
    """Largest relative change of the brightness, such as 0.1."""
    contrast: _Change = 0.0
    """Largest relative change of the contrast, around middle gray."""
    saturation: _Change = 0.0
    """Largest relative change of the saturation."""
    hue: Annotated[Float, Field(ge=0, le=0.5)] = 0.0
    """Largest rotation of the hue in turns, such as 0.02."""
    variants: Int = Field(default=1, ge=1)
    """Number of variants of each clip; each takes as much of the cache as the clip."""

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if not any(value for name, value in dict(self).items() if name != "variants"):
            raise ValueError("changes nothing; give flip, crop, brightness, contrast, ... a value")
        return self


class SourceSection(Section):
    shorthand = "path"

    path: Location
    """A folder, in which each video or image NAME.ext is a clip if NAME.txt, its caption, exists
    next to it (see `video_data.captions`); a table (csv, tsv, jsonl or parquet) that names files
    and captions; OneTrainer's concepts.json; or tar shards (`shards-{000..010}.tar`, `*.tar`). On
    this machine, or elsewhere (`s3://`, `hf://`, `https://`)."""
    kind: Literal[
        "auto", "folder", "table", "concepts", "hugging_face", "nemo_curator", "webdataset"
    ] = "auto"
    """What `path` is; `auto` goes by its extension and by what is in the folder."""
    recursive: bool = True
    """Read a folder with its subfolders; false: only the files in the folder itself."""
    include: Annotated[tuple[str, ...], Several] = ()
    """Files of a folder to use, by glob patterns: `*.mp4` is that of a name at any depth,
    `cats/*` one of a path below the folder. Empty: all."""
    exclude: Annotated[tuple[str, ...], Several] = ()
    """Files and subfolders of a folder to leave out, by glob patterns as in `include`."""
    repeats: Int = Field(default=1, ge=1)
    """Number of times that each of its clips is used per epoch."""
    loss_weight: Positive = 1.0
    """Loss weight of its clips."""
    timesteps: Annotated[
        Literal["high", "low"] | tuple[float, float] | None,
        BeforeValidator(_as_range),
        WithJsonSchema(_RANGE),
    ] = None
    """Timesteps at which its clips are trained: `high` or `low` for those of one expert, or the
    lowest and the highest noise level, such as [0.6, 1]; null is all. An expert trains the clips
    whose range meets its own."""
    weighting: OwnWeighting = None
    """Loss weight of its clips by timestep; null is `train.loss.weighting`."""
    target: Literal["data", "base"] = "data"
    """Training target: the clips (`data`), or the base model's own prediction (`base`: prior
    preservation, which keeps existing abilities; needs an adapter method)."""
    trigger_word: _Phrase = ""
    """Word that stands for what is trained: added in front of each caption that does not contain
    it. Prompts of samples stay as they are; write it into them."""
    class_word: _Phrase = ""
    """Word for what the trigger word is one of, such as person: for each caption with this word in
    place of the trigger word, the base model's prediction is kept (differential output
    preservation; needs an adapter method). Empty: it may change."""
    caption_prefix: _Phrase = ""
    """Text in front of each caption, and of the trigger word."""
    caption_dropout: Share | None = None
    """Probability of replacing a caption of its clips by the empty one; null is
    `train.caption_dropout`."""
    augment: AugmentSection | None = None
    """Augmentation of its clips; null is none."""
    target_fps: Positive | None = None
    """Frames per second of its clips; null is `video_data.target_fps`."""
    max_frames: Int | None = Field(default=None, ge=1)
    """Maximum frames of its clips, in place of `wan_config.max_frames` and `clip_lengths`."""
    frame_sample_strategy: Strategy | None = None
    """Which parts of its videos are clips; null is `wan_config.frame_sample_strategy`."""
    clips_per_video: Int | None = Field(default=None, ge=1)
    """Clips of each of its videos, as in `wan_config`; null is the number there, or with a strategy
    of its own 4 for `random` and 1 for others."""
    max_duration: Positive | None = None
    """Maximum length of its clips in seconds; null is `video_data.max_duration`."""
    resolution: Annotated[
        tuple[int | str, ...] | None, BeforeValidator(parse_sizes), WithJsonSchema(_SIZES)
    ] = None
    """Training sizes of its clips; null is `video_data.resolution`."""
    min_resolution: Size | None = None
    """Its smallest files, width and height; null is `video_data.min_resolution`."""
    max_resolution: Size | None = None
    """Its largest training size; null is `video_data.max_resolution`."""
    interlaced: Interlaced | None = None
    """What to do with its interlaced videos; null is `video_data.interlaced`."""
    masks: bool | None = None
    """Whether its loss masks are used; null is `video_data.masks`."""
    condition: Literal["first_frame", "random_frame"] = "first_frame"
    """Which frame of each clip is the condition image of image-to-video models, unless the clip has
    one of its own (NAME.condition.png): the first, or a random one, drawn once by the seed."""
    speed: Positive = 1.0
    """How much faster than in the files its videos are trained: 2 takes every second frame."""
    shuffle_tags: Int = Field(default=0, ge=0)
    """Number of random orders in which the comma-separated tags of a caption are trained, such as
    8; each one is encoded and cached. 0 keeps the order of the file."""
    keep_tags: Int = Field(default=0, ge=0)
    """Number of tags at the beginning of a caption that `shuffle_tags` leaves in their place."""


class VideoDataSection(Section):
    sources: Annotated[tuple[SourceSection, ...], Several] = ()
    """Folders with clips: one, or a list, each a path or a mapping."""
    supported_formats: tuple[_Extension, ...] = ("mp4", "avi", "mov", "webm", "mkv", "m4v", "gif")
    """File extensions of videos to use. Images (png, jpg, webp, avif, tiff and others) are
    clips of one frame, and animated ones are videos, without being named here."""
    max_duration: Positive = 10.0
    """Maximum length of a training clip in seconds. Of a longer file, a part is used."""
    min_resolution: Size | None = None
    """Width and height in pixels; smaller files are reported and left out. null: files that would
    be enlarged to more than twice their width and height for training."""
    max_resolution: Size = (1280, 1280)
    """Maximum width and height of the training size in pixels. Larger files are scaled down."""
    captions: Literal["lines", "whole"] = "lines"
    """What a caption file holds: a caption in each line, of which each training sample draws one
    (`lines`), or one text, whose lines are joined (`whole`)."""
    interlaced: Interlaced = "deinterlace"
    """What to do with interlaced video (DV, DVDs, broadcasts): make one frame of each pair of
    fields (`deinterlace`), or report it and leave it out (`refuse`). With `top_first` or
    `bottom_first`, the field that comes first, all videos are deinterlaced, also those that do not
    say that they are interlaced; `onewan doctor` finds such."""
    background: Annotated[str, BeforeValidator(_as_color), Field(pattern=_COLOR)] = "#ffffff"
    """Color that transparent videos and images are laid over, as "#rrggbb" in quotes."""
    masks: bool = False
    """Use loss masks: NAME.mask.png for all frames of NAME.mp4, or NAME.mask.mp4 with the same
    timing. White and transparent have weight 1, black has `train.loss.unmasked_weight`."""
    cache: bool = True
    """Encode clips and captions once; false: in every step, with VAE and text encoder in memory."""
    cache_dir: Path = Path("cache")
    """Folder of the cache. Several runs can share one."""
    workers: Annotated[Int, Field(ge=0)] | Literal["auto"] = "auto"
    """Threads that decode clips ahead of the VAE, and that read training batches ahead; 0: none;
    auto: one for each core, at most four. It makes no difference to any value."""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which the VAE encodes clips: float32, without TF32, or bfloat16, which is faster
    on a GPU and makes latents differ by 6e-3 of their size. Sample videos are always decoded in
    float32."""

    target_fps: Positive | None = None
    """Frames per second of the training clips; null is the variant's own rate (16, or 24)."""
    slow_video: Literal["repeat", "keep_rate", "skip"] = "repeat"
    """What becomes of a video with fewer frames per second: frames come twice, it is taken at its
    own rate (and seems faster), or it is left out. Each is reported."""
    resolution: Annotated[
        tuple[int | str, ...] | None, BeforeValidator(parse_sizes), WithJsonSchema(_SIZES)
    ] = None
    """Training sizes. An area, at which each clip keeps its aspect ratio: 480p (832x480), 720p
    (1280x720; for TI2V-5B 1280x704), a side (512: the area of 512x512) or a number of pixels
    (399360). Or an exact size: "832x480" or [832, 480]. A list of exactly two sides is one size;
    several are a list of texts, of areas in pixels, of such pairs, or of three and more sides
    ([512, 640, 768]), of which each clip is trained at the one that suits it. null: 480p."""


class ResolvedVideoData(VideoDataSection):
    target_fps: float
    resolution: tuple[int | str, ...]
