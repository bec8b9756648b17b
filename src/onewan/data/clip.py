"""`Clip`, a span of a media file to train on, and `ClipPlanner`, which chooses the clips of a file.

The planner takes plain values, so that a run file, another trainer or a test can supply them. It
reads a file's header, first frame and end; the frames in between only to find changes of scene.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import floor, inf
from pathlib import Path
from typing import Any, Literal, NamedTuple

from onewan.arithmetic.buckets import Size, choose_size, floor_to_4n_plus_1
from onewan.arithmetic.clip_timesteps import ALL_TIMESTEPS, ClipTimesteps
from onewan.data.augment import Augmentation, Variation
from onewan.data.captions import CaptionSettings
from onewan.data.companions import Companion, CompanionFinder
from onewan.data.conditions import FIRST_FRAME, ConditionChoice, Conditions
from onewan.data.found_cuts import FoundCuts
from onewan.data.probes import MediaProbes
from onewan.data.sources.item import SourceItem
from onewan.data.sources.names import Patterns
from onewan.data.spans import Span, SpanChooser, Strategy, scenes_between
from onewan.errors import DataError
from onewan.media import (
    IMAGE_SUFFIXES,
    RGB,
    WHITE,
    FieldOrder,
    MediaInfo,
    extension,
    keyframe_near,
)
from onewan.media.cuts import cut_detector
from onewan.seeds import derive_seed

_MOST_ENLARGED = 2
"""A file that would have to be enlarged further, in both directions, has too little detail."""
SAME_RATE = 0.99
"""A file with this share of the wanted frames per second is not slow: 23.976 for 24, for
instance."""
_ROUNDING = 1e-6
"""Added before a product of floats is rounded down: 0.29 s * 100 fps is 28.999999999999996."""

WHOLE_FILE = (-inf, inf)
"""Bounds that are none."""
SlowVideo = Literal["repeat", "keep_rate", "skip"]
Interlaced = Literal["deinterlace", "refuse", "top_first", "bottom_first"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """A span of a video file, or an image, with its captions."""

    path: Path
    name: str
    """The path relative to its folder, with forward slashes: the same on every machine. If the file
    gives several clips, with the clip's number among them: "a.mp4 (2 of 5)"."""
    captions: tuple[str, ...]
    """At least one; each training sample draws one of them."""
    kind: Literal["video", "image"]
    start: float
    """Time of the first frame in the file's own clock, s."""
    fps: float
    """Frames per second at which the frames are taken."""
    frames: int
    """Number of frames, 4n+1; 1 for an image."""
    size: tuple[int, int]
    """(width, height) of the training sample, pixels."""
    source_size: tuple[int, int]
    """(width, height) of the upright picture in the file, in square pixels."""
    repeats: int
    """How many times an epoch contains the clip."""
    loss_weight: float = 1.0
    """Factor of the clip's loss."""
    timesteps: ClipTimesteps = ALL_TIMESTEPS
    """Those that it is trained at."""
    caption_dropout: float | None = None
    """Fraction of its training samples whose caption is empty; None is the run's."""
    is_prior: bool = False
    """Whether its target is the base model's prediction (prior preservation), not the data."""
    class_captions: tuple[str | None, ...] = ()
    """For each of `captions` the text for which the base model's prediction is kept beside, or
    None; empty if there are none."""
    item_name: str = ""
    """The name that all clips of a file share, or of a part of a file that a source names."""
    source_seconds: float = 0.0
    """Duration of the video file or of this part; 0 for an image."""
    source_fps: float = 0.0
    """Mean number of frames per second of the video file; 0 for an image."""
    take: int = 0
    """Index among its alternatives, of which each pass through the data has one."""
    takes: int = 1
    """Number of these alternatives, itself included; they follow each other in a data set."""
    part: tuple[float, float | None] | None = None
    """The part of the file that its source names, s after the first frame; None: all of it."""
    bounds: tuple[float, float] = WHOLE_FILE
    """Its frames are those from the first time of the file's own clock to before the second one:
    where the rate varies, a frame outside of the part may be nearest to an instant within."""
    augmentation: Augmentation | None = None
    """The variants of it that are trained too; None if there are none."""
    variation: Variation | None = None
    """What is different if it is a variant; None if it is not."""
    mask: Companion | None = None
    """Its loss mask; None if all of the clip is trained on."""
    conditions: Conditions = FIRST_FRAME
    """Its condition image and its control video."""
    background: RGB = WHITE
    """What transparent parts are laid over; white for files without them, which need none."""
    interlaced: bool = False
    """Whether its file is flagged as interlaced; such frames are deinterlaced."""
    fields: FieldOrder | None = None
    """The order of the fields by which all frames are deinterlaced; None: only those that are
    flagged, by their own."""
    media_notes: tuple[str, ...] = ()
    """What is assumed or changed when the file is read; see `MediaInfo.notes`."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Its file and all that belong to it, but for captions."""
        mask = () if self.mask is None else (self.mask,)
        return (self.path, *(each.path for each in (*mask, *self.conditions.companions)))

    def class_caption(self, caption: str) -> str | None:
        """The text for which the base model's prediction is kept beside training on `caption`."""
        if not self.class_captions or caption not in self.captions:  # such as one that is dropped
            return None
        return self.class_captions[self.captions.index(caption)]

    def times(self) -> tuple[float, ...]:
        """Presentation time of each frame in the file's own clock, s."""
        return tuple(self.start + k / self.fps for k in range(self.frames))


def alternatives(clips: Iterable[Clip]) -> list[tuple[Clip, ...]]:
    """The `clips` in groups of which each pass through the data has one member."""
    groups = list[list[Clip]]()
    for clip in clips:
        if clip.take == 0:
            groups.append([])
        groups[-1].append(clip)
    return [tuple(group) for group in groups]


def count_clips(clips: Iterable[Clip]) -> int:
    """How many of `clips` one pass through the data has, without repeats."""
    return sum(clip.take == 0 for clip in clips)


class Bucket(NamedTuple):
    """The shape of a clip, before anything of its file is decoded."""

    frames: int
    size: Size
    takes: int
    """See `Clip.takes`."""


SourceKind = Literal[
    "auto", "folder", "table", "concepts", "hugging_face", "nemo_curator", "webdataset"
]
"""What the path of a source is; "auto" goes by its extension and by what is in the folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipSource:
    """Where clips come from, and how they are trained on; see the fields of `Clip`."""

    path: Path | str
    """On this machine; an address elsewhere is a text."""
    repeats: int = 1
    loss_weight: float = 1.0
    is_prior: bool = False
    timesteps: ClipTimesteps = ALL_TIMESTEPS
    caption_dropout: float | None = None
    captions: CaptionSettings = field(default_factory=CaptionSettings)
    """What becomes of the captions of its clips."""
    kind: SourceKind = "auto"
    recursive: bool = True
    """Whether a folder is read with its subfolders."""
    patterns: Patterns = field(default_factory=Patterns)
    """Which files of a folder are used."""
    augmentation: Augmentation | None = None
    """The variants of its clips that are trained too; None if there are none."""
    planning: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Fields of the `ClipPlanner` that its clips have other values of."""
    use_masks: bool | None = None
    """Whether its masks are used; None is the run's setting."""
    condition: ConditionChoice = "first_frame"
    """Which frame of each clip is its condition image, where no file is."""
    speed: float = 1.0
    """How much faster than in their files the motion of its videos is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipPlanner:
    """Turns a media file into clips: chooses their spans, numbers of frames and training size."""

    seed: int
    """Seed of the spans that the strategy "random" chooses."""
    fps: float
    """Frames per second of the clips."""
    max_frames: int
    """Largest number of frames of a clip; rounded down to 4n+1."""
    clip_lengths: tuple[int, ...] = ()
    """Instead of `max_frames`: the numbers of frames at each of which a file gives clips."""
    max_duration: float
    """Longest clip as it is trained, s."""
    frame_strategy: Strategy
    """Which spans of a longer file are taken; see docs/data.md."""
    clips_per_video: int = 1
    """Number of spans of the strategies "uniform", "keyframe" and "random"; each pass through the
    data has all of them, or one of those of "random"."""
    stride: float | None = None
    """Time between the beginnings of the spans of "sliding", s; None is half of a span."""
    avoid_cuts: bool = False
    """Whether no clip may cross a change of scene."""
    slow_video: SlowVideo = "repeat"
    """What becomes of a file with fewer frames per second than are wanted: frames come twice, it
    is taken at its own rate, or it is refused."""
    resolutions: tuple[int | str, ...]
    """Training sizes: areas in pixels (399360) or exact sizes ("832x480")."""
    min_resolution: Size | None
    """(width, height), in either orientation; smaller files are refused. None refuses those that
    would be enlarged more than twice in both directions."""
    max_resolution: Size
    """(width, height), in either orientation, that a training size given as an area may have."""
    video_formats: tuple[str, ...]
    """Extensions of the video files to use, lower case, without the dot."""
    interlaced: Interlaced = "deinterlace"
    """Whether interlaced files are used, and whether all videos count as such."""
    background: RGB = WHITE
    """What transparent parts of files are laid over."""
    size_multiple: int
    """Both sides of a training size are multiples of it, pixels."""
    temporal_compression: int
    """Frames per latent frame after the first."""
    takes_condition_image: bool = False
    """Whether the model is given an image, which need not be the clip's first frame."""
    condition_is_reference: bool = False
    """Whether that image is a reference image, and not what samples start from."""
    takes_control: bool = False
    """Whether the model is given a control video."""
    probes: MediaProbes = field(default_factory=MediaProbes)
    """What the files contain."""
    cuts: FoundCuts = field(default_factory=FoundCuts)
    """The changes of scene of the files, where they are needed."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """The numbers of frames of clips, ascending, as the VAE encodes them: 4n+1."""
        wanted = self.clip_lengths or (self.max_frames,)
        return tuple(sorted({floor_to_4n_plus_1(n, self.temporal_compression) for n in wanted}))

    @property
    def longest_clip(self) -> int:
        """The largest number of frames of a clip."""
        return self.lengths[-1]

    @property
    def needs_cuts(self) -> bool:
        """Whether files are searched for changes of scene."""
        by_library = self.frame_strategy == "keyframe" and cut_detector() == "PySceneDetect"
        return self.avoid_cuts or by_library

    def plan(
        self, item: SourceItem, source: ClipSource, captions: tuple[str, ...]
    ) -> tuple[Clip, ...]:
        """The clips of a file that `source` names, with the masks and conditions of `item`.

        Raises DataError, which names the file, if it can't be used.
        """
        whole = self.probes.of(item.path)
        info = item.within(whole)
        if info.interlaced and self.interlaced == "refuse":
            raise DataError(
                f"{item.path}: is interlaced, and video_data.interlaced is refuse; set that to "
                "deinterlace, or take the file out"
            )
        size, fps = self._size(info), self._rate(info, source.speed)
        is_prior = source.is_prior or item.is_prior
        # A clip with the base model's prediction as its target keeps that anyway.
        classes = () if is_prior else tuple(map(source.captions.class_caption, captions))
        spans = [
            (span, take, len(group))
            for group in self._spans(info, item.name, fps)
            for take, span in enumerate(group)
        ]
        clips = [
            Clip(
                path=item.path,
                name=item.name if len(spans) == 1 else f"{item.name} ({number} of {len(spans)})",
                item_name=item.name,
                captions=captions,
                kind=info.kind,
                start=span.start,
                fps=fps,
                frames=span.frames,
                size=size,
                source_size=info.shown_size,
                source_seconds=_seconds(info),
                source_fps=1 / info.frame_interval if info.frame_interval else 0.0,
                take=take,
                takes=takes,
                repeats=source.repeats * item.repeats,
                loss_weight=source.loss_weight * item.weight,
                is_prior=is_prior,
                class_captions=classes if any(classes) else (),
                timesteps=source.timesteps,
                caption_dropout=source.caption_dropout,
                part=item.part,
                bounds=item.bounds(whole),
                augmentation=source.augmentation,
                background=self.background if info.has_alpha else WHITE,
                interlaced=info.interlaced,
                fields=self._fields(info),
                media_notes=info.notes,
            )
            for number, (span, take, takes) in enumerate(spans, start=1)
        ]
        # Last, since a mask has to cover exactly the frames that its clip takes.
        return tuple(
            self._with_companions(clip, whole, item, source, number)
            for number, clip in enumerate(clips)
        )

    def _with_companions(
        self, clip: Clip, info: MediaInfo, item: SourceItem, source: ClipSource, number: int
    ) -> Clip:
        """`clip`, the one of this `number` of its file, with its mask and its conditions."""
        finder = CompanionFinder(
            clip=info,
            video_formats=self.video_formats,
            background=self.background,
            probes=self.probes,
        )
        times, choice = clip.times(), item.condition or source.condition
        image, frame = finder.find("condition", item.condition_images, times), 0
        is_random = image is None and choice == "random_frame" and self.takes_condition_image
        if is_random:
            frame = floor(self._draw("condition frame", item.name, number) * clip.frames)
        return replace(
            clip,
            mask=finder.find("mask", item.masks, times),
            conditions=Conditions(
                frame=frame,
                image=image,
                control=finder.find("control", item.controls, times),
                as_reference=self.condition_is_reference and (is_random or image is not None),
            ),
        )

    def prepare(
        self,
        items: Sequence[SourceItem],
        source: ClipSource,
        progress: Callable[[str, int, int], None],
    ) -> None:
        """Find out what `plan` has to know of the files of `source`, several at a time. What is
        wrong with one is raised by `plan`."""
        self.probes.prepare(path for item in items for path in (item.path, *item.companions))
        if self.needs_cuts:
            searched = [item.path for item in items if self._is_searched(item, source)]
            self.cuts.prepare(
                searched,
                lambda done, total: progress("searching for changes of scene", done, total),
            )

    def _is_searched(self, item: SourceItem, source: ClipSource) -> bool:
        """Whether the whole file will be searched for changes of scene."""
        try:
            info = item.within(self.probes.of(item.path))
            self._size(info)
            self._rate(info, source.speed)
        except DataError:
            return False
        return info.kind == "video" and not (info.interlaced and self.interlaced == "refuse")

    def buckets(self, info: MediaInfo, speed: float = 1.0) -> list[Bucket]:
        """The shapes of the clips of a file with this header; DataError if it can't be used.

        If `cuts` are not known, and not searched for, they are those of a file of one scene.
        """
        size, fps = self._size(info), self._rate(info, speed)
        groups = self._spans(info, info.path.name, fps)
        return [Bucket(group[0].frames, size, len(group)) for group in groups]

    def _fields(self, info: MediaInfo) -> FieldOrder | None:
        """See `Clip.fields`."""
        can_be = info.kind == "video" and extension(info.path) not in (*IMAGE_SUFFIXES, "gif")
        if not can_be or self.interlaced in ("deinterlace", "refuse"):
            return None
        return self.interlaced

    def _size(self, info: MediaInfo) -> Size:
        """The training size of a file; DataError if the file is too small."""
        size = choose_size(
            *info.shown_size, self.resolutions, self.size_multiple, self.max_resolution
        )
        limit = self.min_resolution
        if limit is None:
            width, height = info.shown_size
            if size[0] > _MOST_ENLARGED * width and size[1] > _MOST_ENLARGED * height:
                raise DataError(
                    f"{info.path}: is {width}x{height}, and would be enlarged more than twice, to "
                    f"{size[0]}x{size[1]}; take it out, choose a smaller video_data.resolution, or "
                    "allow it with video_data.min_resolution: [1, 1]"
                )
            return size
        # In either orientation, as for the largest size: portrait is no smaller than landscape.
        shorter, longer = sorted((info.width, info.height))
        if shorter < min(limit) or longer < max(limit):
            raise DataError(
                f"{info.path}: is {info.width}x{info.height}, smaller than "
                f"video_data.min_resolution ({limit[0]}x{limit[1]}); lower that, or take it out"
            )
        return size

    def _rate(self, info: MediaInfo, speed: float) -> float:
        """Frames per second of the file's time at which its frames are taken; DataError."""
        wanted = self.fps / speed
        if info.kind == "image" or info.last <= info.start:
            return wanted
        own = 1 / info.frame_interval
        if self.slow_video == "repeat" or own >= SAME_RATE * wanted:
            return wanted
        if self.slow_video == "skip":
            raise DataError(
                f"{info.path}: has {own:.4g} frames per second, fewer than the {wanted:.4g} that "
                "are trained on, and video_data.slow_video is skip; choose repeat or keep_rate "
                "there, lower video_data.target_fps, or take it out"
            )
        return own

    def _spans(self, info: MediaInfo, name: str, fps: float) -> list[list[Span]]:
        """The spans of a file, in groups of which each pass through the data has one member."""
        if info.kind == "image":
            return [[Span(info.start, 1)]]
        cuts = self.cuts.of(info.path) if self.needs_cuts else ()
        every = scenes_between(info.start, info.last, info.frame_interval, cuts)
        whole = scenes_between(info.start, info.last, info.frame_interval, ())
        beginnings = [scene.start for scene in every]

        def key_near(time: float) -> float:
            if not self.needs_cuts:
                return keyframe_near(info.path, time)
            return min(beginnings, key=lambda start: (abs(start - time), start))

        chooser = SpanChooser(
            strategy=self.frame_strategy,
            number=self.clips_per_video,
            stride=self.stride,
            scenes=every if self.avoid_cuts else whole,
            fps=fps,
            frame_interval=info.frame_interval,
            temporal_compression=self.temporal_compression,
            key_near=key_near,
            draw=lambda index: self._draw("span", name, index),
        )
        groups = list[list[Span]]()
        for frames in self._lengths_of(max(s.frames_at(fps) for s in chooser.scenes)):
            spans = chooser.spans(frames)
            groups += [spans] if self.frame_strategy == "random" else [[span] for span in spans]
        return groups

    def _lengths_of(self, available: int) -> list[int]:
        """The numbers of frames of the clips of a file with `available` frames in a scene."""
        # As they are trained, at the rate of all clips, however far apart in the file they are. At
        # least one frame, however short `max_duration` is.
        by_duration = max(1, floor(self.max_duration * self.fps + _ROUNDING))
        limit = floor_to_4n_plus_1(by_duration, self.temporal_compression)
        lengths = sorted({min(length, limit) for length in self.lengths})
        return [n for n in lengths if n <= available] or lengths[:1]

    def _draw(self, purpose: str, name: str, index: int) -> float:
        """A number in [0, 1) for the span or the clip `index` of a file."""
        # By the name, so that adding or removing other files changes nothing.
        counters = (name, index) if index else (name,)
        return derive_seed(self.seed, purpose, *counters) / 2**63


def _seconds(info: MediaInfo) -> float:
    """Duration of a video, to the end of its last frame; 0 for an image."""
    return 0.0 if info.kind == "image" else info.last - info.start + info.frame_interval
