"""What a media file contains, without decoding more than one frame."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import floor, inf
from pathlib import Path
from typing import Literal, NamedTuple

import av
import PIL
from av.container import InputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from onewan.errors import DataError
from onewan.media.animation import animation_frames, frame_count, is_animation, shown_milliseconds
from onewan.media.colors import VideoColors
from onewan.media.cut_off import cut_off_reason
from onewan.media.faults import DAMAGE_REMEDY, faults_of
from onewan.media.kinds import IMAGE_SUFFIXES, extension
from onewan.media.open_gop import tolerate_open_start
from onewan.media.still import image_notes, open_image, upright_image
from onewan.media.video_frames import Orientation, decode_frames, has_alpha
from onewan.media.video_stream import (
    end_time,
    frame_interval,
    open_video,
    open_video_at,
    packet_time,
    pixel_aspect,
    promised_end,
    seconds,
    ticks,
)

PROBE_VERSION = f"4, PyAV {av.__version__}, Pillow {PIL.__version__}"
"""Changes when `probe` may say something else of a file: the number is incremented when its code
does, and with another PyAV comes another FFmpeg."""

# The search for the last frame begins this much before the end that the header gives; in s. More
# than codecs reorder, so that the last packets in the file include the last frame shown.
_END_WINDOW = 2.0

_BEGINS_OPEN = (
    "cut within an open group of pictures, so that damage of its first seconds may not be found"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaInfo:
    """What a media file contains, by its header, its first frame and its last packets."""

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
    """Degrees counterclockwise by which the stored picture is rotated to be upright: 0 to 359."""
    codec: str
    interlaced: bool = False
    """Whether the first frame is flagged as interlaced; `read_frames` deinterlaces such frames."""
    has_alpha: bool = False
    """Whether pixels can be transparent, so that a background shows through."""
    notes: tuple[str, ...] = ()
    """What is assumed or changed when its frames are read, for the user."""

    @property
    def shown_size(self) -> tuple[int, int]:
        """(width, height) of the upright picture in square pixels, as a player shows it."""
        return max(1, round(self.width * self.pixel_aspect)), self.height

    def frames_at(self, fps: float) -> int:
        """For how many of the times start, start + 1/fps, ... the file has a frame.

        The last of them is at most half a source frame later than the last frame.
        """
        if self.kind == "image":
            return 1
        # 1e-6 against float rounding, if a time falls on the very end.
        return floor((self.last + self.frame_interval / 2 - self.start) * fps + 1e-6) + 1


def probe(path: str | Path) -> MediaInfo:
    """What `path` contains; decodes one frame. Time and memory do not grow with the file's length.

    Raises `DataError` if the file can't be used. Damage behind the first frame is not always found
    here; `read_frames` reports it.
    """
    path = Path(path)
    is_image = extension(path) in IMAGE_SUFFIXES
    with faults_of(path, "image" if is_image else "video"):
        if not path.is_file():
            raise DataError(f"{path}: is not a file; check the path")
        if path.stat().st_size == 0:
            raise DataError(f"{path}: is empty (0 bytes); {DAMAGE_REMEDY}")
        return _probe_image(path) if is_image else _probe_video(path)


def describe(path: Path) -> tuple[str, dict[str, str]]:
    """(what it is, what its header says by label) of a video or an image, in words. DataError if it
    can't be read."""
    info = probe(path)
    width, height = info.shown_size
    rows = {"size": f"{width}x{height}"}
    if info.kind == "video" and info.frame_interval:
        fps = 1 / info.frame_interval
        frames, seconds = info.frames_at(fps), info.last - info.start + info.frame_interval
        rows["length"] = f"{frames} frames, {fps:.4g} fps, {seconds:.2f} s"
    if info.notes:
        rows["notes"] = "; ".join(info.notes)
    article = "an" if info.kind == "image" else "a"
    return f"{article} {info.kind} ({info.codec})", rows


def probe_header(path: str | Path) -> MediaInfo:
    """What the header of `path` says, without decoding: about as `probe`, in a few milliseconds.

    Pictures that metadata rotates are not upright, and times may be estimates. Raises `DataError`
    if the header can't be read.
    """
    path = Path(path)
    is_image = extension(path) in IMAGE_SUFFIXES
    with faults_of(path, "image" if is_image else "video"):
        if is_image:
            with open_image(path) as image:
                return _image_info(path, image)
        with open_video(path, threads=1) as (container, stream):
            start, interval = seconds(stream, stream.start_time) or 0.0, frame_interval(stream)
            end = end_time(container, stream)
            context = stream.codec_context
            colors = VideoColors.of(path, context, context)
            return MediaInfo(
                path=path,
                kind=_video_kind(stream),
                width=context.width,
                height=context.height,
                pixel_aspect=pixel_aspect(stream),
                start=start,
                last=start if end is None else max(start, end - interval),
                frame_interval=interval,
                rotation=0,
                codec=context.name,
                notes=colors.notes,
            )


def keyframe_near(path: str | Path, time: float) -> float:
    """Presentation time (s) of the key frame nearest to `time`; reads only the packets around it.

    0 for an image, and any frame's time for an animated one. Raises `DataError` if the file can't
    be read or has no key frame.
    """
    path = Path(path)

    def distance(now: float) -> float:
        return abs(now - time)

    if extension(path) in IMAGE_SUFFIXES:
        if not is_animation(path):
            return 0.0
        # Any frame can be the first, since all before it are decoded in any case.
        return min((frame_time for frame_time, _ in animation_frames(path)), key=distance)
    best = inf
    with open_video_at(path, time, threads=1) as (_, packets):
        for packet in packets:
            now = packet_time(packet)
            if packet.is_keyframe and distance(now) < distance(best):
                best = now
            # Packets are in decoding order, up to a second off the presentation order.
            if now > time + distance(best) + 1.0:
                break
    if best == inf:
        raise DataError(f"{path}: has no key frame; {DAMAGE_REMEDY}")
    return best


def _probe_image(path: Path) -> MediaInfo:
    with open_image(path) as image:
        info = _image_info(path, image)
        upright = upright_image(image)  # decodes, so a truncated file is found here
        info = replace(info, width=upright.width, height=upright.height, notes=image_notes(upright))
    if info.kind == "image":
        return info
    times = [time for time, _ in animation_frames(path)]
    interval = times[-1] / (len(times) - 1)
    return replace(info, last=times[-1], frame_interval=interval)


def _image_info(path: Path, image: Image.Image) -> MediaInfo:
    """What an image says before it is decoded; the times of an animated one are estimates."""
    frames = frame_count(image)
    interval = shown_milliseconds(image) / 1000 if frames > 1 else 0.0
    return MediaInfo(
        path=path,
        kind="video" if frames > 1 else "image",
        width=image.width,
        height=image.height,
        pixel_aspect=1.0,
        start=0.0,
        last=(frames - 1) * interval,
        frame_interval=interval,
        rotation=0,
        codec=(image.format or "unknown").lower(),
        has_alpha=image.has_transparency_data,
    )


def _probe_video(path: Path) -> MediaInfo:
    if reason := cut_off_reason(path):
        raise DataError(f"{path}: {reason}; {DAMAGE_REMEDY}")
    with open_video(path, threads=1) as (container, stream):
        begins_open, packets = tolerate_open_start(stream, container.demux(stream))
        start, frame = next(decode_frames(path, stream, packets), (0.0, None))
        if frame is None:
            raise DataError(f"{path}: no frame of it can be decoded; {DAMAGE_REMEDY}")
        notes = _frame_notes(path, frame, stream)
        if begins_open:
            notes += (_BEGINS_OPEN,)
        width, height, aspect = frame.width, frame.height, pixel_aspect(stream)
        if Orientation.of(frame).transpose:
            width, height, aspect = height, width, 1 / aspect
        last = _last_shown(container, stream)
        promised = promised_end(container, stream)
        interval, codec = frame_interval(stream), stream.codec.name
        kind = _video_kind(stream)
    if last is None:  # seeking does not work, so read all packets
        with open_video(path, threads=1) as (container, stream):
            last = max(_shown(container.demux(stream)), default=_Shown(start, start))
    if promised is not None and last.end < promised - _END_WINDOW:
        raise DataError(
            f"{path}: is truncated, its header promises {promised:.1f} s and its data end after "
            f"{last.end:.1f} s; {DAMAGE_REMEDY}"
        )
    return MediaInfo(
        path=path,
        kind=kind,
        width=width,
        height=height,
        pixel_aspect=aspect,
        start=start,
        last=max(start, last.time),
        frame_interval=interval if kind == "video" else 0.0,
        rotation=round(frame.rotation) % 360,
        codec=codec,
        interlaced=frame.interlaced_frame,
        has_alpha=has_alpha(frame),
        notes=notes,
    )


def _video_kind(stream: VideoStream) -> Literal["video", "image"]:
    """A GIF of one frame is an image; other videos of one frame are videos that are too short."""
    is_still = stream.container.format.name == "gif" and stream.frames == 1
    return "image" if is_still else "video"


def _frame_notes(path: Path, frame: VideoFrame, stream: VideoStream) -> tuple[str, ...]:
    colors = VideoColors.of(path, frame, stream.codec_context)
    notes = list(colors.notes)
    if colors.transfer != "SDR" and has_alpha(frame):
        notes.append("the transparency of HDR video is ignored")
    return tuple(notes)


class _Shown(NamedTuple):
    """A packet whose frame is shown."""

    time: float
    """Presentation time of its frame, s."""
    end: float
    """Until when the frame is shown, s."""


def _last_shown(container: InputContainer, stream: VideoStream) -> _Shown | None:
    """The packet of the last frame; None if seeking does not find it."""
    end, begin = end_time(container, stream), seconds(stream, stream.start_time) or 0.0
    back = _END_WINDOW
    # Seeks further and further back, until the video has been searched from its beginning.
    while end is not None and end - back / 4 > begin:
        try:
            # Any frame, since nothing is decoded: a file of one long GOP takes no longer.
            container.seek(ticks(stream, end - back), stream=stream, any_frame=True)
            last = max(_shown(container.demux(stream)), default=None)
        except FFmpegError:
            return None
        if last is not None:
            return last
        back *= 4
    return None


def _shown(packets: Iterable[av.Packet]) -> Iterator[_Shown]:
    """The packets whose frames are shown.

    Not shown are packets outside the edit list, incomplete ones at a cut, and PyAV's empty one at
    the end.
    """
    for packet in packets:
        if packet.size and not packet.is_discard and not packet.is_corrupt:
            time = packet_time(packet)
            yield _Shown(time, time + float((packet.duration or 0) * packet.time_base))
