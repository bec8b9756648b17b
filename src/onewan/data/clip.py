"""`Clip`, a span of a media file to train on, and `ClipPlanner`, which chooses the span.

The planner takes plain values, so that a run file, another trainer or a test can supply them. It
reads a file's header, first frame and end, never the frames in between.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import floor
from pathlib import Path
from typing import Literal

from onewan.arithmetic.buckets import Size, choose_size, floor_to_4n_plus_1, size_without_limit
from onewan.data.captions import CaptionSettings
from onewan.data.masks import Mask, find_mask
from onewan.data.probes import MediaProbes
from onewan.data.sources.item import SourceItem
from onewan.data.sources.names import Patterns
from onewan.errors import DataError
from onewan.media import RGB, WHITE, MediaInfo, keyframe_near
from onewan.seeds import derive_seed

_MOST_ENLARGED = 2
"""A file that would have to be enlarged further, in both directions, has too little detail."""
_NOTED_SECONDS = 1.0
"""What is not used of a video is mentioned from here on: a clip has 4n+1 frames, so that nearly
each has some left over."""
_PLACES = {
    "uniform": "from its middle",
    "random": "from a random place",
    "keyframe": "from the key frame nearest to its middle on",
}

_ROUNDING = 1e-6
"""Added before a product of floats is rounded down: 0.29 s * 100 fps is 28.999999999999996."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """A span of a video file, or an image, with its captions."""

    path: Path
    name: str
    """The path relative to its folder, with forward slashes: the same on every machine."""
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
    caption_dropout: float | None = None
    """Fraction of its training samples whose caption is empty; None is the run's."""
    is_prior: bool = False
    """Whether its target is the base model's prediction (prior preservation), not the data."""
    source_seconds: float = 0.0
    """Duration of the video file; 0 for an image."""
    mask: Mask | None = None
    """Its loss mask; None if all of the clip is trained on."""
    background: RGB = WHITE
    """What transparent parts are laid over; white for files without them, which need none."""
    media_notes: tuple[str, ...] = ()
    """What is assumed or changed when the file is read; see `MediaInfo.notes`."""

    def times(self) -> tuple[float, ...]:
        """Presentation time of each frame in the file's own clock, s."""
        return tuple(self.start + k / self.fps for k in range(self.frames))


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipSource:
    """Where clips come from, and how they are trained on; see the fields of `Clip`."""

    path: Path
    repeats: int = 1
    loss_weight: float = 1.0
    is_prior: bool = False
    caption_dropout: float | None = None
    captions: CaptionSettings = field(default_factory=CaptionSettings)
    """What becomes of the captions of its clips."""
    recursive: bool = True
    """Whether a folder is read with its subfolders."""
    patterns: Patterns = field(default_factory=Patterns)
    """Which files of a folder are used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipPlanner:
    """Turns a media file into a clip: chooses its span, number of frames and training size."""

    seed: int
    """Seed of the spans that the strategy "random" chooses."""
    fps: float
    """Frames per second of the clips."""
    max_frames: int
    """Largest number of frames of a clip; rounded down to 4n+1."""
    max_duration: float
    """Longest clip, s."""
    frame_strategy: Literal["uniform", "random", "keyframe"]
    """Which frames of a longer file are taken: those in the middle, at a random position, or from
    the key frame nearest to the middle on."""
    resolutions: tuple[int | str, ...]
    """Training sizes: areas in pixels (399360) or exact sizes ("832x480")."""
    min_resolution: Size | None
    """(width, height), in either orientation; smaller files are refused. None refuses those that
    would be enlarged more than twice in both directions."""
    max_resolution: Size
    """(width, height), in either orientation, that a training size given as an area may have."""
    video_formats: tuple[str, ...]
    """Extensions of the video files to use, lower case, without the dot."""
    interlaced: Literal["deinterlace", "refuse"] = "deinterlace"
    """Whether interlaced files are used."""
    background: RGB = WHITE
    """What transparent parts of files are laid over."""
    size_multiple: int
    """Both sides of a training size are multiples of it, pixels."""
    temporal_compression: int
    """Frames per latent frame after the first."""
    probes: MediaProbes = field(default_factory=MediaProbes)
    """What the files contain."""

    @property
    def longest_clip(self) -> int:
        """`max_frames` rounded down to the 4n+1 that the VAE encodes."""
        return floor_to_4n_plus_1(self.max_frames, self.temporal_compression)

    def plan(self, item: SourceItem, source: ClipSource, captions: tuple[str, ...]) -> Clip:
        """The clip of a file that `source` names, with its loss mask if `item` has one.

        Raises DataError, which names the file, if it can't be used.
        """
        whole = self.probes.of(item.path)
        info = item.within(whole)
        if info.interlaced and self.interlaced == "refuse":
            raise DataError(
                f"{item.path}: is interlaced, and video_data.interlaced is refuse; set that to "
                "deinterlace, or take the file out"
            )
        frames, size = self.bucket(info)
        clip = Clip(
            path=item.path,
            name=item.name,
            captions=captions,
            kind=info.kind,
            start=self._start_time(info, item.name, frames),
            fps=self.fps,
            frames=frames,
            size=size,
            source_size=info.shown_size,
            source_seconds=_seconds(info),
            repeats=source.repeats * item.repeats,
            loss_weight=source.loss_weight * item.weight,
            is_prior=source.is_prior or item.is_prior,
            caption_dropout=source.caption_dropout,
            background=self.background if info.has_alpha else WHITE,
            media_notes=info.notes,
        )
        # Last, since a mask has to cover exactly the frames that the clip takes.
        mask = find_mask(whole, clip.times(), item.masks, self.video_formats, self.probes)
        return replace(clip, mask=mask)

    def bucket(self, info: MediaInfo) -> tuple[int, Size]:
        """(frames, size) of the clip of a file with this header; DataError if it is too small."""
        size = choose_size(
            *info.shown_size, self.resolutions, self.size_multiple, self.max_resolution
        )
        self._check_size(info, size)
        return self._frame_count(info), size

    def warnings(self, clip: Clip) -> list[str]:
        """What the user should know about a planned clip: how it differs from its file, and from
        what the run file asks for."""
        texts = list(clip.media_notes)
        width, height = clip.source_size
        if clip.size[0] > width or clip.size[1] > height:
            texts.append(f"scaled up from {width}x{height} to {clip.size[0]}x{clip.size[1]}")
        wanted = size_without_limit(
            width, height, self.resolutions, self.size_multiple, self.max_resolution
        )
        if wanted is not None:
            limit = "x".join(map(str, self.max_resolution))
            texts.append(
                f"trained at {clip.size[0]}x{clip.size[1]} instead of {wanted[0]}x{wanted[1]}, "
                f"since video_data.max_resolution is {limit}"
            )
        used = clip.frames / clip.fps
        if clip.source_seconds - used >= _NOTED_SECONDS:
            texts.append(
                f"{clip.source_seconds:.1f} s long; {used:.1f} s {_PLACES[self.frame_strategy]} "
                "are used (cut it into several files to train on more of it)"
            )
        if clip.kind == "video" and clip.frames < self.longest_clip:
            texts.append(
                f"{clip.frames} frame{'s' if clip.frames > 1 else ''} at {clip.fps:g} fps instead "
                f"of {self.longest_clip}: the file or video_data.max_duration is too short for more"
            )
        return texts

    def _check_size(self, info: MediaInfo, size: Size) -> None:
        limit = self.min_resolution
        if limit is None:
            width, height = info.shown_size
            if size[0] > _MOST_ENLARGED * width and size[1] > _MOST_ENLARGED * height:
                raise DataError(
                    f"{info.path}: is {width}x{height}, and would be enlarged more than twice, to "
                    f"{size[0]}x{size[1]}; take it out, choose a smaller video_data.resolution, or "
                    "allow it with video_data.min_resolution: [1, 1]"
                )
            return
        # In either orientation, as for the largest size: portrait is no smaller than landscape.
        shorter, longer = sorted((info.width, info.height))
        if shorter < min(limit) or longer < max(limit):
            raise DataError(
                f"{info.path}: is {info.width}x{info.height}, smaller than "
                f"video_data.min_resolution ({limit[0]}x{limit[1]}); lower that, or take it out"
            )

    def _frame_count(self, info: MediaInfo) -> int:
        # At least one frame, however short `max_duration` is.
        by_duration = max(1, floor(self.max_duration * self.fps + _ROUNDING))
        available = min(self.max_frames, by_duration, info.frames_at(self.fps))
        return floor_to_4n_plus_1(available, self.temporal_compression)

    def _start_time(self, info: MediaInfo, name: str, frames: int) -> float:
        """Time of the first frame by `frame_strategy`, s."""
        slack = max(0.0, info.last - info.start - (frames - 1) / self.fps)
        if info.kind == "image" or not slack:
            return info.start
        if self.frame_strategy == "keyframe":
            key = keyframe_near(info.path, (info.start + info.last) / 2)
            # Too near the end for all frames: the latest start at which they fit.
            return min(max(key, info.start), info.start + slack)
        position = 0.5
        if self.frame_strategy == "random":
            # By the name, so that adding or removing other files does not move the clip's span.
            position = derive_seed(self.seed, "span", name) / 2**63
        # On a frame of the file. Midway between two frames, the last bit of each time would decide
        # which of them is nearest, so that some frames would be taken twice and others not at all.
        whole_frames = floor(slack * position / info.frame_interval + _ROUNDING)
        return info.start + whole_frames * info.frame_interval


def _seconds(info: MediaInfo) -> float:
    """Duration of a video, to the end of its last frame; 0 for an image."""
    return 0.0 if info.kind == "image" else info.last - info.start + info.frame_interval
