"""Reading videos: what a file holds, and the frames nearest to given times.

Hides containers, seeking, codecs, broken timestamps, rotation and damage; see the package.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import chain, pairwise
from math import floor, inf
from pathlib import Path
from typing import Literal

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError, InvalidDataError
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image, ImageOps

from onewan.errors import DataError
from onewan.media.kinds import AGAIN, IMAGE_SUFFIXES, MAX_PIXELS, SWS_ACCURATE, extension, reason
from onewan.media.still import Fit, fit_image, flat, open_image, read_image

# Frames that no other frame refers to are not decoded if they lie this much before the first time
# asked for, in seconds. It only has to be longer than the usual gap between two frames: where a
# gap turns out to be longer, the span is read again without the shortcut.
_SKIP_LEAD = 0.25
# Only these decoders take the order to skip and to stop skipping at any packet; dav1d, for one,
# reads it once.
_SKIPPING_DECODERS = frozenset({"h264", "hevc"})


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaInfo:
    """What a media file holds, from its header, its first frame and its last packets."""

    path: Path
    kind: Literal["video", "image"]
    width: int
    """Stored pixels of the upright picture, after rotation metadata or EXIF."""
    height: int
    pixel_aspect: float
    """Width of an upright pixel over its height; 1.0 for nearly all, 1.09 for PAL DVD or CIF."""
    start: float
    """Presentation time of the first frame, s."""
    last: float
    """Presentation time of the last frame, s."""
    frame_interval: float
    """Mean time between frames by the header, s; 0 for an image."""
    rotation: int
    """Degrees counterclockwise by which the stored picture is turned to be upright: 0 to 359."""
    codec: str

    @property
    def shown_size(self) -> tuple[int, int]:
        """(width, height) of the upright picture in square pixels, as a player shows it."""
        return max(1, round(self.width * self.pixel_aspect)), self.height

    def frames_at(self, fps: float) -> int:
        """How many of the instants start, start + 1/fps, ... this file has a frame for.

        The last of them lies at most half a source frame behind the last frame.
        """
        if self.kind == "image":
            return 1
        # The epsilon keeps rounding from costing a frame when an instant falls on the very end.
        return floor((self.last + self.frame_interval / 2 - self.start) * fps + 1e-6) + 1


class _DamageError(DataError):
    """Damage met while decoding, which began at the key frame at `begun` (s)."""

    def __init__(self, path: Path, time: float, reason: str, *, begun: float | None) -> None:
        super().__init__(f"{path}: is damaged near {max(time, 0.0):.2f} s ({reason}); {AGAIN}")
        self.begun = begun or 0.0


# --- Looking at a file ---------------------------------------------------------------------------


def probe(path: str | Path) -> MediaInfo:
    """What `path` holds; decodes one frame. Time and memory do not grow with the file's length.

    Raises `DataError` when the file can't be used, which says why and what to do. A file that is
    damaged behind its first frame may pass here; `read_frames` reports it.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: is not a file; check the path")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty (0 bytes); {AGAIN}")
    return _probe_image(path) if extension(path) in IMAGE_SUFFIXES else _probe_video(path)


def keyframe_near(path: str | Path, time: float) -> float:
    """Presentation time (s) of the key frame nearest to `time`; reads only around it."""
    path = Path(path)
    if extension(path) in IMAGE_SUFFIXES:
        return 0.0
    best = inf
    with _open_video_at(path, time, threads=1) as (_, packets):
        for packet in packets:
            now = _packet_time(packet)
            if packet.is_keyframe and abs(now - time) < abs(best - time):
                best = now
            # Packets come in decoding order, up to a second off the order of presentation.
            if now > time + abs(best - time) + 1.0:
                break
    if best == inf:
        raise DataError(f"{path}: has no key frame; {AGAIN}")
    return best


def _probe_image(path: Path) -> MediaInfo:
    with open_image(path) as image:
        codec = image.format or "unknown"
        upright = ImageOps.exif_transpose(image)  # decodes, so a truncated file is found here
    return MediaInfo(
        path=path,
        kind="image",
        width=upright.width,
        height=upright.height,
        pixel_aspect=1.0,
        start=0.0,
        last=0.0,
        frame_interval=0.0,
        rotation=0,
        codec=codec.lower(),
    )


def _probe_video(path: Path) -> MediaInfo:
    with _open_video(path, threads=1) as (container, stream):
        start, frame = next(_decoded(path, stream, container.demux(stream)), (0.0, None))
        if frame is None:
            raise DataError(f"{path}: no frame of it can be decoded; {AGAIN}")
        turned = _Turn.of(frame)
        width, height, aspect = frame.width, frame.height, _pixel_aspect(stream)
        if turned.transpose:
            width, height, aspect = height, width, 1 / aspect
        last = _last_time(path, container, stream)
        interval, codec = _frame_interval(stream), stream.codec.name
    if last is None:
        with _open_video(path, threads=1) as (container, stream):
            last = max(_shown_times(container.demux(stream)), default=start)
    return MediaInfo(
        path=path,
        kind="video",
        width=width,
        height=height,
        pixel_aspect=aspect,
        start=start,
        last=max(start, last),
        frame_interval=interval,
        rotation=round(frame.rotation) % 360,
        codec=codec,
    )


def _last_time(path: Path, container: InputContainer, stream: VideoStream) -> float | None:
    """Presentation time of the last frame, by its packet; None if seeking does not lead there."""
    end, begin = _end_time(container, stream), _seconds(stream, stream.start_time) or 0.0
    back = 2.0  # s, more than any codec reorders
    while end is not None and end - back / 4 > begin:
        try:
            # Any frame will do, as nothing is decoded: a file that is one long GOP costs no more.
            container.seek(_ticks(stream, end - back), stream=stream, any_frame=True)
            last = max(_shown_times(container.demux(stream)), default=None)
        except FFmpegError:
            return None
        if last is not None:
            # Most headers only estimate; these know where their last frame is.
            if container.format.name.startswith("mov") and back > 2.0 and last < end - 2.0:
                raise DataError(
                    f"{path}: is cut off, its header promises {end - begin:.1f} s and its data end "
                    f"after {last - begin:.1f} s; {AGAIN}"
                )
            return last
        back *= 4
    return None


def _shown_times(packets: Iterable[av.Packet]) -> Iterator[float]:
    # Not shown: packets outside the edit list, half packets at a cut, PyAV's empty one at the end.
    return (_packet_time(p) for p in packets if p.size and not p.is_discard and not p.is_corrupt)


# --- Reading -------------------------------------------------------------------------------------


def read_frames(path: str | Path, times: Sequence[float], fit: Fit | None = None) -> np.ndarray:
    """The frames nearest to `times` (s, ascending; ties go to the earlier): uint8 [F, H, W, 3].

    Decodes from the key frame at or before ``times[0]`` to the last frame needed, and fits each
    chosen frame as it comes, so that full-size frames are never stacked. An image stands for every
    time. Without `fit`, frames have their stored pixels; with it, non-square pixels are evened out.

    Raises `DataError` when anything between that key frame and the last frame is damaged (later
    frames build on earlier ones, so what follows the damage can't be trusted either).
    """
    path = Path(path)
    if not len(times) or any(b < a for a, b in pairwise(times)):
        raise ValueError(f"times must be ascending and not empty, not {list(times)}")
    if extension(path) in IMAGE_SUFFIXES:
        return np.repeat(read_image(path, fit)[None], len(times), axis=0)
    try:
        return _read_video(path, times, fit, skip_before=times[0] - _SKIP_LEAD)
    except _DamageError as damage:
        # H.264 that starts at a key frame of an open GOP can stumble over references to frames
        # before it. Real damage is still there when decoding begins one key frame earlier.
        return _read_video_from_earlier(path, times, fit, damage)


def _read_video(
    path: Path, times: Sequence[float], fit: Fit | None, *, skip_before: float
) -> np.ndarray:
    """`read_frames` for a video; decodes only half of what lies before `skip_before`."""
    with _open_video_at(path, times[0], threads=0) as (stream, packets):
        frames = _decoded(path, stream, packets, skip_before=skip_before)
        first = next(frames, None)
        # Where the first frame behind `skip_before` is this late, one before may be nearer.
        if skip_before > -inf and (first is None or first[0] - times[0] > times[0] - skip_before):
            return _read_video(path, times, fit, skip_before=-inf)
        return _collect(path, stream, chain([first] if first else [], frames), times, fit)


def _read_video_from_earlier(
    path: Path, times: Sequence[float], fit: Fit | None, damage: _DamageError
) -> np.ndarray:
    """`_read_video` that begins one key frame earlier; raises `damage` if there is none."""
    with _open_video_at(path, damage.begun - 1e-3, threads=1) as (stream, packets):
        # One thread: after an error, frame-threaded decoders refuse all that follows.
        frames = _decoded(path, stream, packets, sound_from=damage.begun)
        return _collect(path, stream, frames, times, fit)


def _collect(
    path: Path,
    stream: VideoStream,
    frames: Iterable[tuple[float, VideoFrame]],
    times: Sequence[float],
    fit: Fit | None,
) -> np.ndarray:
    """The frames nearest to `times` as uint8 [F, H, W, 3]."""
    aspect = _pixel_aspect(stream)
    out: np.ndarray | None = None
    for places, time, frame in _nearest(frames, times):
        pixels = _pixels(frame, fit, aspect)
        if out is None:
            out = np.empty((len(times), *pixels.shape), np.uint8)
        if pixels.shape != out.shape[1:]:
            raise DataError(
                f"{path}: its frame size changes at {time:.2f} s; cut it there into two"
            )
        out[places] = pixels
    if out is None:
        raise DataError(f"{path}: no frame near {times[0]:.2f} s can be decoded; {AGAIN}")
    return out


def _nearest(
    frames: Iterable[tuple[float, VideoFrame]], times: Sequence[float]
) -> Iterator[tuple[slice, float, VideoFrame]]:
    """For each frame that is nearest to some of `times`: which ones, its time, and itself.

    Both ascend. Holds two frames and stops as soon as the last time is decided.
    """
    served = 0
    previous: tuple[float, VideoFrame] | None = None
    for time, frame in frames:
        if previous is not None:
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


def _decoded(
    path: Path,
    stream: VideoStream,
    packets: Iterable[av.Packet],
    *,
    skip_before: float = -inf,
    sound_from: float = -inf,
) -> Iterator[tuple[float, VideoFrame]]:
    """Frames with their times (s), strictly ascending, from the first key frame on.

    Frames before `skip_before` are left out, and not decoded if no other frame needs them. Frames
    before `sound_from` are left out, and damage there does not count; elsewhere it raises
    `_DamageError`.
    """
    begun: float | None = None
    newest = max(skip_before, sound_from) - 1e-6
    # AVI has no presentation times, and those that FFmpeg makes up are out of order for H.264. But
    # frames come out in order of presentation, so each gets the earliest time not yet given out.
    in_avi, waiting = stream.container.format.name == "avi", list[float]()
    can_skip = stream.codec_context.name in _SKIPPING_DECODERS and not in_avi
    for packet in _decodable(packets):
        now = _packet_time(packet)
        if begun is None:
            begun = 0.0 if now == -inf else now
        if can_skip and packet.size:
            skip = packet.pts is not None and now < skip_before
            stream.codec_context.skip_frame = "NONREF" if skip else "DEFAULT"
        if in_avi and packet.size:
            heappush(waiting, now)
        try:
            frames = packet.decode()
        except FFmpegError as error:
            if now < sound_from:
                continue
            raise _DamageError(path, max(now, newest), reason(error), begun=begun) from error
        for frame in frames:
            time = heappop(waiting) if in_avi and waiting else frame.time
            time = now if time is None else time
            if time <= newest:
                continue  # not wanted; or a timestamp that runs backwards, which has no place
            if frame.is_corrupt:
                raise _DamageError(path, time, "so says its decoder", begun=begun)
            newest = time
            yield time, frame


def _decodable(packets: Iterable[av.Packet]) -> Iterator[av.Packet]:
    """The packets without those whose frames build on something before the first key frame."""
    first = None
    for packet in packets:
        if packet.size and first is None:
            if not packet.is_keyframe:
                continue  # a recording that starts in mid-stream
            first = _packet_time(packet)
        # What leads an open GOP comes after its key frame and is shown before it.
        leads = packet.pts is not None and first is not None and _packet_time(packet) < first
        if not leads:
            yield packet


def _seek(
    container: InputContainer, stream: VideoStream, time: float
) -> Iterator[av.Packet] | None:
    """Packets from a key frame presented at or before `time`; None if only reading on finds it."""
    begin = _seconds(stream, stream.start_time) or 0.0
    back = 0.0
    while time - back >= begin:
        try:
            container.seek(_ticks(stream, time - back), stream=stream)
        except FFmpegError:
            return None
        packets = container.demux(stream)
        for packet in packets:
            now = _packet_time(packet)
            # Demuxers search by decoding time, by rough tables or by bytes: look where we landed.
            if not packet.size or now > time + 2.0:
                break
            if packet.is_keyframe:
                if now <= time:
                    return chain([packet], packets)
                break
        back = max(1.0, back * 4)
    return None


def _pixels(frame: VideoFrame, fit: Fit | None, pixel_aspect: float) -> np.ndarray:
    """A decoded frame as upright RGB uint8 [H, W, 3], fitted if asked."""
    if any(component.is_alpha for component in frame.format.components):
        rgba = frame.to_ndarray(format="rgba", interpolation=SWS_ACCURATE)
        pixels = np.asarray(flat(Image.fromarray(rgba)))
    else:
        pixels = _rgb(frame)
    turn = _Turn.of(frame)
    pixels = turn.apply(pixels)
    if fit is None:
        return pixels
    return fit_image(pixels, fit, 1 / pixel_aspect if turn.transpose else pixel_aspect)


def _rgb(frame: VideoFrame) -> np.ndarray:
    """A decoded frame as stored, RGB uint8 [H, W, 3]."""
    # By way of planes, since swscale has fast code for these flags to gbrp only: the same values as
    # straight to rgb24 in half the time, 2.4 instead of 4.5 ms for 720p. PyAV's own way from gbrp
    # to an array takes as long as the detour saves.
    planar = frame.reformat(format="gbrp", interpolation=SWS_ACCURATE, threads=1)
    pixels = np.empty((frame.height, frame.width, 3), np.uint8)
    for plane, channel in zip(planar.planes, (1, 2, 0), strict=True):
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
        pixels[..., channel] = rows[:, : plane.width]
    return pixels


@dataclass(frozen=True, slots=True)
class _Turn:
    """How the stored picture becomes upright: transposed first, then mirrored.

    Covers all eight turns and mirrorings; an angle alone, as in `VideoFrame.rotation`, shows the
    mirrored recordings of front cameras upside down.
    """

    transpose: bool
    mirror_rows: bool
    mirror_columns: bool

    @staticmethod
    def of(frame: VideoFrame) -> _Turn:
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return _Turn(False, False, False)
        # (x, y) is shown at (a x + c y, b x + d y), y pointing down (libavutil/display.h).
        a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
        if abs(b) > abs(a):
            return _Turn(True, b < 0, c < 0)
        return _Turn(False, d < 0, a < 0)

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        if self.transpose:
            pixels = pixels.swapaxes(0, 1)
        if self.mirror_rows:
            pixels = pixels[::-1]
        return pixels[:, ::-1] if self.mirror_columns else pixels


# --- Opening -------------------------------------------------------------------------------------


@contextmanager
def _open_video(path: Path, *, threads: int) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its main video stream; FFmpeg's errors inside become `DataError`.

    `threads` is the decoder's number of threads, 0 for as many as there are cores.
    """
    try:
        # "file:" because FFmpeg takes a name like "12:30.mp4" for a protocol; the whitelist because
        # a playlist in disguise could name addresses on the network.
        with av.open(
            f"file:{path}",
            container_options={"protocol_whitelist": "file"},
            metadata_errors="replace",
        ) as container:
            stream = container.streams.best("video")
            if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
                kinds = ", ".join(sorted({s.type for s in container.streams})) or "no"
                raise DataError(
                    f"{path}: has no video, only {kinds} streams; take it out, or give the video"
                )
            # By default decoders paint over damage and carry on; "explode" makes them say so.
            stream.codec_context.options = {
                "err_detect": "crccheck+explode",
                "max_pixels": str(MAX_PIXELS),
            }
            stream.codec_context.thread_count = threads
            stream.thread_type = "AUTO"
            yield container, stream
    except FFmpegError as error:
        raise DataError(f"{path}: {_unreadable(path, error)}; {AGAIN}") from error


@contextmanager
def _open_video_at(
    path: Path, time: float, *, threads: int
) -> Iterator[tuple[VideoStream, Iterator[av.Packet]]]:
    """The main video stream and its packets from the key frame at or before `time` on.

    From the beginning if `time` lies before the first key frame or the file can't be searched.
    """
    with _open_video(path, threads=threads) as (container, stream):
        packets = _seek(container, stream, time)
        if packets is not None:
            yield stream, packets
            return
    # Opened anew, since what a failed search leaves behind depends on the container.
    with _open_video(path, threads=threads) as (container, stream):
        yield stream, container.demux(stream)


def _unreadable(path: Path, error: FFmpegError) -> str:
    """Why FFmpeg could not open `path`, in words a newcomer understands."""
    if isinstance(error, InvalidDataError):
        with path.open("rb") as file:
            if file.read(8)[4:] == b"ftyp":
                return "starts as an MP4 or MOV, but its index (moov) is missing: it was cut off"
    return f"is not a video that FFmpeg can read ({reason(error)})"


# --- A stream's clock ----------------------------------------------------------------------------


def _seconds(stream: VideoStream, ticks: int | None) -> float | None:
    if ticks is None or stream.time_base is None:
        return None
    return float(ticks * stream.time_base)


def _ticks(stream: VideoStream, seconds: float) -> int:
    return round(seconds / stream.time_base) if stream.time_base else 0


def _packet_time(packet: av.Packet) -> float:
    """When a packet's frame is shown, s; -inf if the file does not say, as for the last, empty one.

    AVI knows decoding times only. They stand in: with them, all times are off by the same delay.
    """
    ticks = packet.dts if packet.pts is None else packet.pts
    return -inf if ticks is None else float(ticks * packet.time_base)


def _end_time(container: InputContainer, stream: VideoStream) -> float | None:
    """Where the header says that the video ends, s."""
    if (length := _seconds(stream, stream.duration)) is not None:
        return length + (_seconds(stream, stream.start_time) or 0.0)
    if container.duration is None:
        return None
    return (container.duration + (container.start_time or 0)) / av.time_base


def _frame_interval(stream: VideoStream) -> float:
    """Mean time between frames by the header, s."""
    rate = stream.average_rate or stream.guessed_rate
    return float(1 / rate) if rate else 1 / 25  # FFmpeg's own guess for streams without a rate


def _pixel_aspect(stream: VideoStream) -> float:
    """Width of a stored pixel over its height."""
    return float(stream.sample_aspect_ratio or 1)
