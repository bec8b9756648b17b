"""Reading the frames of a video nearest to given times.

Why not torchcodec, whose `get_frames_played_at` also selects frames by time: it sets no error
detection of FFmpeg's and checks no frame for damage, so pictures that a decoder has made up are
returned as good ones; here they are an error that names the file. It brings no FFmpeg but needs
shared libraries of one on the system, and since 0.14 its wheels for Linux also need CUDA's, even to
decode on the CPU, where PyAV's wheels contain all of it on Linux, macOS and Windows. It converts
colors with swscale's fast flags (1.1 levels too dark on average) and imports torch. It is not
faster on the CPU either (`benchmarks/data.py`).
(torchcodec 0.17, August 2026: README.md, src/torchcodec/_core/SingleStreamDecoder.cpp and
CpuDeviceInterface.cpp.)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, dropwhile, pairwise, takewhile
from math import inf
from pathlib import Path
from typing import TypeVar

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from onewan.errors import DataError
from onewan.media.animation import animation_frames, is_animation
from onewan.media.colors import VideoColors
from onewan.media.deinterlace import FieldOrder, deinterlaced
from onewan.media.faults import DAMAGE_REMEDY
from onewan.media.kinds import IMAGE_SUFFIXES, extension
from onewan.media.open_gop import tolerate_open_start
from onewan.media.still import RGB, WHITE, Fit, image_pixels, read_image, refuse_damaged_gif
from onewan.media.video_frames import DamageError, decode_frames, frame_pixels
from onewan.media.video_stream import open_video_at, pixel_aspect

# Frames that no other frame refers to are not decoded if they are this much earlier than the first
# requested time, in s. It only has to be longer than the usual gap between two frames: if a gap is
# longer, the span is read again without skipping.
_SKIP_LEAD = 0.25

# By so much the shape of frames may differ, since encoders round sizes to even numbers.
_SAME_SHAPE = 0.02

_Frame = TypeVar("_Frame")

# A time just before a key frame, by more than containers round; in s.
_JUST_BEFORE = 1e-3


def read_frames(
    path: str | Path,
    times: Sequence[float],
    fit: Fit | None = None,
    background: RGB = WHITE,
    *,
    within: tuple[float, float] = (-inf, inf),
    fields: FieldOrder | None = None,
    threads: int = 0,
) -> np.ndarray:
    """The frames nearest to `times` (s, ascending; a tie goes to the earlier): uint8 [F, H, W, 3].

    Decodes from the key frame at or before ``times[0]`` to the last frame needed, and fits each
    selected frame at once, so that full-size frames are never stacked. An image is returned for
    every time. Without `fit`, frames have their stored pixels; with it, the pixels are square.
    Frames that are flagged as interlaced are deinterlaced, or with `fields`, the order of their
    fields, all frames of a video. Transparent parts lie over `background`. Only frames from the
    first time of `within` to before the second one are taken.
    `threads` is how many the decoder uses, 0 one for each core; it makes no difference to pixels.

    Raises `DataError` if anything between that key frame and the last frame is damaged, since later
    frames are predicted from earlier ones. ValueError if `times` is empty or not ascending.
    """
    path = Path(path)
    if not len(times) or any(b < a for a, b in pairwise(times)):
        raise ValueError(f"times must be ascending and not empty, not {list(times)}")
    if extension(path) in IMAGE_SUFFIXES:
        if is_animation(path):
            pixels_of = partial(image_pixels, fit=fit, background=background)
            return _select(path, animation_frames(path), times, within, pixels_of)
        return np.repeat(read_image(path, fit, background)[None], len(times), axis=0)
    look = _Look(fit, background, fields, within)
    try:
        return _read_video(path, times, look, threads, skip_before=times[0] - _SKIP_LEAD)
    except DamageError as damage:
        # H.264 that is decoded from a key frame of an open GOP on can fail at references to frames
        # before it. Real damage is still found when decoding begins one key frame earlier.
        return _read_video_from_earlier(path, times, look, damage)


@dataclass(frozen=True, slots=True)
class _Look:
    """What becomes of a frame; see `read_frames`."""

    fit: Fit | None
    background: RGB
    fields: FieldOrder | None
    within: tuple[float, float]


def _read_video(
    path: Path, times: Sequence[float], look: _Look, threads: int, *, skip_before: float
) -> np.ndarray:
    """`read_frames` for a video; decodes only reference frames before `skip_before`."""
    with open_video_at(path, times[0], threads=threads) as (stream, packets):
        decoded = decode_frames(path, stream, packets, skip_before=skip_before)
        frames = deinterlaced(decoded, look.fields)
        first = next(frames, None)
        # If the first frame is later than this, one before `skip_before` may be nearer.
        if skip_before > -inf and (first is None or first[0] - times[0] > times[0] - skip_before):
            return _read_video(path, times, look, threads, skip_before=-inf)
        if stream.container.format.name == "gif":
            refuse_damaged_gif(path, stream.frames, times[-1])
        frames = chain([first] if first else [], frames)
        return _select(path, frames, times, look.within, _VideoPixels(path, stream, look))


def _read_video_from_earlier(
    path: Path, times: Sequence[float], look: _Look, damage: DamageError
) -> np.ndarray:
    """`_read_video`, but decodes from the key frame before the one that led to `damage` on."""
    start = damage.decoded_from

    def read(stream: VideoStream, packets: Iterable[av.Packet]) -> np.ndarray:
        decoded = decode_frames(path, stream, packets, ignore_damage_before=start)
        frames = deinterlaced(decoded, look.fields)
        return _select(path, frames, times, look.within, _VideoPixels(path, stream, look))

    # One thread: after an error, decoders with frame threads refuse all that follows.
    with open_video_at(path, start - _JUST_BEFORE, threads=1) as opened:
        try:
            return read(*opened)
        except DamageError as again:
            if again.decoded_from < start:
                raise
            final = again
    # No key frame is earlier, so what the first pictures refer to may have been cut away.
    with open_video_at(path, start - _JUST_BEFORE, threads=1) as (stream, packets):
        is_open, packets = tolerate_open_start(stream, packets)
        if not is_open:
            raise final
        return read(stream, packets)


class _VideoPixels:
    """The pixels of a video's frames; all must have the same shape when shown."""

    def __init__(self, path: Path, stream: VideoStream, look: _Look) -> None:
        self._path, self._stream, self._look = path, stream, look
        self._aspect = pixel_aspect(stream)
        self._reformatter = VideoReformatter()
        self._shown: float | None = None

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        context = self._stream.codec_context
        # By the stream itself, whose pixels may change where the container has one value for all.
        shown = frame.width / frame.height * float(context.sample_aspect_ratio or 1)
        if self._shown is not None and abs(shown / self._shown - 1) > _SAME_SHAPE:
            time = f" at {frame.time:.2f} s" if frame.time is not None else ""
            raise DataError(f"{self._path}: its shape changes{time}; split the file there")
        self._shown = shown
        colors = VideoColors.of(self._path, frame, context)
        return frame_pixels(
            frame, colors, self._look.fit, self._aspect, self._look.background, self._reformatter
        )


def _select(
    path: Path,
    frames: Iterable[tuple[float, _Frame]],
    times: Sequence[float],
    within: tuple[float, float],
    pixels_of: Callable[[_Frame], np.ndarray],
) -> np.ndarray:
    """The pixels of the `frames` nearest to `times`, uint8 [F, H, W, 3]."""
    begin, end = within
    inside = dropwhile(lambda each: each[0] < begin, frames)
    inside = takewhile(lambda each: each[0] < end, inside)
    out: np.ndarray | None = None
    for indices, time, frame in _nearest(inside, times):
        pixels = pixels_of(frame)
        if out is None:
            out = np.empty((len(times), *pixels.shape), np.uint8)
        if pixels.shape != out.shape[1:]:
            raise DataError(f"{path}: its frame size changes at {time:.2f} s; split the file there")
        out[indices] = pixels
    if out is None and within != (-inf, inf):
        raise DataError(
            f"{path}: has no frame from {begin:.2f} s to {end:.2f} s; correct the times"
        )
    if out is None:
        raise DataError(f"{path}: no frame near {times[0]:.2f} s can be decoded; {DAMAGE_REMEDY}")
    return out


def _nearest(
    frames: Iterable[tuple[float, _Frame]], times: Sequence[float]
) -> Iterator[tuple[slice, float, _Frame]]:
    """(indices, time, frame) for each frame that is nearest to `times[indices]`, one or several.

    Frames and times ascend. Holds two frames, and stops as soon as the last time has its frame.
    """
    served = 0
    previous: tuple[float, _Frame] | None = None
    for time, frame in frames:
        if previous is not None:
            # The times up to the middle between two frames belong to the earlier one.
            decided = bisect_right(times, (previous[0] + time) / 2, lo=served)
            if decided > served:
                yield slice(served, decided), *previous
            served = decided
        if served < len(times) and time >= times[-1]:
            yield slice(served, len(times)), time, frame
            served = len(times)
        if served == len(times):
            return
        previous = time, frame
    if previous is not None:
        yield slice(served, len(times)), *previous
