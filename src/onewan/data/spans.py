"""Which spans of a video are its clips: the strategies of `wan_config.frame_sample_strategy`.

Arithmetic on times alone; files are read by the caller. All times are in seconds in the file's own
clock. Each start is computed from the beginning of its scene, so nothing drifts in long files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import floor
from typing import Literal, NamedTuple

from onewan.arithmetic.buckets import floor_to_4n_plus_1
from onewan.media.cuts import Cut

Strategy = Literal["uniform", "middle", "head", "random", "keyframe", "chunks", "sliding", "all"]

_ROUNDING = 1e-6
"""Added before a product of floats is rounded down: 0.29 s * 100 fps is 28.999999999999996."""
_BEFORE_CUT = 1e-3
"""A wanted instant is at least this much on its side of the middle between the two frames at a cut:
containers round times to 1 ms."""


class Span(NamedTuple):
    """One clip of a video."""

    start: float
    """Time of its first frame."""
    frames: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A stretch of a video that clips are taken from; no clip leaves it."""

    start: float
    """Time of its first frame."""
    last: float
    """Time of its last frame."""
    end: float
    """The latest instant whose nearest frame belongs to it."""

    def frames_at(self, fps: float) -> int:
        """For how many of the instants start, start + 1/fps, ... it has a frame."""
        return max(0, floor((self.end - self.start) * fps + _ROUNDING)) + 1

    def slack(self, frames: int, fps: float) -> float:
        """By how much a span of `frames` can be moved within it, s."""
        return max(0.0, self.last - self.start - (frames - 1) / fps)


def scenes_between(
    start: float, last: float, frame_interval: float, cuts: Sequence[Cut]
) -> tuple[Scene, ...]:
    """The scenes of a video with frames from `start` to `last`; all of it without `cuts`."""
    inside = sorted(cut for cut in cuts if start < cut.after <= last)
    starts = [start, *(cut.after for cut in inside)]
    ends = [(cut.before, (cut.before + cut.after) / 2 - _BEFORE_CUT) for cut in inside]
    # As `MediaInfo.frames_at`: the last instant is at most half a frame later than the last frame.
    ends.append((last, last + frame_interval / 2))
    return tuple(
        Scene(start=begin, last=shown, end=end)
        for begin, (shown, end) in zip(starts, ends, strict=True)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanChooser:
    """Chooses the spans of one video for clips of one length."""

    strategy: Strategy
    number: int
    """Spans of the strategies `uniform`, `random` and `keyframe`."""
    stride: float | None
    """Time between the beginnings of the spans of `sliding`, s; None is half of a span."""
    scenes: tuple[Scene, ...]
    """At least one."""
    fps: float
    """Frames per second at which frames are taken."""
    frame_interval: float
    """Mean time between the frames of the file, s."""
    key_near: Callable[[float], float]
    """Time of the key frame, or of the beginning of the scene, that is nearest to a time."""
    temporal_compression: int
    """Frames per latent frame after the first."""
    draw: Callable[[int], float]
    """A number in [0, 1) for each span of the strategy `random`, by its index."""

    def spans(self, frames: int) -> list[Span]:
        """The spans of at most `frames` frames, as many as the VAE takes; at least one.

        Scenes that are too short are passed over. If all are, the longest one gives shorter spans.
        """
        fitting = tuple(scene for scene in self.scenes if scene.frames_at(self.fps) >= frames)
        if not fitting:
            longest = max(self.scenes, key=lambda scene: scene.frames_at(self.fps))
            fitting = (longest,)
            frames = floor_to_4n_plus_1(longest.frames_at(self.fps), self.temporal_compression)
        starts = self._starts(fitting, frames)
        # Two wanted places may lead to one span: of two key frames near the end, for instance.
        return [Span(start, frames) for start in dict.fromkeys(starts)]

    def _starts(self, scenes: Sequence[Scene], frames: int) -> list[float]:
        if self.strategy in ("chunks", "sliding", "all"):
            return [
                self._on_frame(scene, offset)
                for scene in scenes
                for offset in self._offsets(scene, frames)
            ]
        if self.strategy == "head":
            return [scenes[0].start]
        if self.strategy == "random":
            return [
                self._at_share(scenes, frames, (index + self.draw(index)) / self.number)
                for index in range(self.number)
            ]
        if self.strategy == "keyframe":
            first, last = self.scenes[0].start, self.scenes[-1].last
            wanted = [
                self.key_near(first + (last - first) * (index + 0.5) / self.number)
                for index in range(self.number)
            ]
        else:
            wanted = self._evenly(frames, 1 if self.strategy == "middle" else self.number)
        return [self._nearest_start(scenes, frames, time) for time in wanted]

    def _offsets(self, scene: Scene, frames: int) -> Iterator[float]:
        """Beginnings of the spans of `chunks`, `sliding` and `all`, from that of the scene on."""
        slack = scene.slack(frames, self.fps)
        if self.strategy == "sliding":
            stride = self.stride or frames / self.fps / 2
            for index in range(floor(slack / stride + _ROUNDING) + 1):
                yield index * stride
            return
        number = scene.frames_at(self.fps) // frames
        for index in range(number):
            yield index * frames / self.fps
        # A rest of less than a latent frame would give nearly the same clip again.
        rest = slack - (number - 1) * frames / self.fps
        if self.strategy == "all" and rest > self.temporal_compression / self.fps - _ROUNDING:
            yield slack

    def _evenly(self, frames: int, number: int) -> list[float]:
        """Beginnings of `number` spans, spread evenly over the file."""
        first, last = self.scenes[0].start, self.scenes[-1].last
        whole = Scene(start=first, last=last, end=last)
        slack, length = whole.slack(frames, self.fps), frames / self.fps
        part = (last - first + self.frame_interval) / number
        if number == 1:
            return [first + slack / 2]
        if part >= length:  # each in the middle of its part of the file
            offsets = [(index + 0.5) * part - length / 2 for index in range(number)]
        else:  # they overlap, from the first frame to the last
            offsets = [slack * index / (number - 1) for index in range(number)]
        return [first + min(max(0.0, offset), slack) for offset in offsets]

    def _at_share(self, scenes: Sequence[Scene], frames: int, share: float) -> float:
        """The beginning at `share` (0 to 1) of all possible ones."""
        slacks = [scene.slack(frames, self.fps) for scene in scenes]
        if not any(slacks):
            return scenes[min(int(share * len(scenes)), len(scenes) - 1)].start
        offset = share * sum(slacks)
        for scene, slack in zip(scenes, slacks, strict=True):
            if offset <= slack:
                return self._on_frame(scene, offset)
            offset -= slack
        return self._on_frame(scenes[-1], slacks[-1])

    def _nearest_start(self, scenes: Sequence[Scene], frames: int, wanted: float) -> float:
        """The possible beginning that is nearest to `wanted`."""
        starts = list[float]()
        for scene in scenes:
            offset = min(max(0.0, wanted - scene.start), scene.slack(frames, self.fps))
            # A key frame is a frame of the file already.
            is_frame = self.strategy == "keyframe"
            starts.append(scene.start + offset if is_frame else self._on_frame(scene, offset))
        return min(starts, key=lambda start: (abs(start - wanted), start))

    def _on_frame(self, scene: Scene, offset: float) -> float:
        # On a frame of the file. Midway between two frames, the last bit of each time would decide
        # which of them is nearest, so that some frames would be taken twice and others not at all.
        whole_frames = floor(offset / self.frame_interval + _ROUNDING)
        return scene.start + whole_frames * self.frame_interval
