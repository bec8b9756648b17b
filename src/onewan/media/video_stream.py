"""Opening a video, seeking in it by time, and the clock of its stream.

Exceptions become `DataError`. Nothing is decoded here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from math import inf
from pathlib import Path

import av
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream

from onewan.errors import DataError
from onewan.media.faults import faults_of
from onewan.media.kinds import PYAV_VERSION, pixel_limit
from onewan.media.still import check_pixels

_MAX_REORDERING = 2.0
"""More than the presentation time of a packet differs from that of its neighbors in the file, s."""


# --- Opening -------------------------------------------------------------------------------------


@contextmanager
def open_video(path: Path, *, threads: int) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its main video stream; exceptions inside become `DataError`.

    `threads` is the number of the decoder's threads, 0 for as many as there are cores.
    """
    # "file:", because FFmpeg takes a name like "12:30.mp4" for a protocol; the whitelist, because a
    # playlist that is named like a video could contain addresses on the network. The limit of
    # pixels is for the decoders that FFmpeg runs when it opens a file.
    with (
        faults_of(path, "video"),
        av.open(
            f"file:{path}",
            options=_limits(path),
            container_options={"protocol_whitelist": "file"},
            metadata_errors="replace",
        ) as container,
    ):
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
            kinds = ", ".join(sorted({s.type for s in container.streams})) or "no"
            raise DataError(
                f"{path}: has no video, only {kinds} streams; remove it, or add the video"
            )
        # PyAV's type hints do not know that there may be no decoder.
        if stream.codec_context is None:  # pyright: ignore[reportUnnecessaryComparison]
            raise DataError(
                f"{path}: its video codec is unknown to FFmpeg, or its header is damaged; convert "
                "it to H.264, or take it out"
            )
        context = stream.codec_context
        limit = check_pixels(path, context.width, context.height, "video")
        # By default decoders conceal damage and continue; with "explode" they raise an error.
        context.options = {"err_detect": "crccheck+explode", "max_pixels": str(limit)}
        context.thread_count = threads
        stream.thread_type = "AUTO"
        yield container, stream


def _limits(path: Path) -> dict[str, str]:
    # Before 18.1, PyAV frees options that it has not allocated, and crashes, if a file shows its
    # streams late, as MPEG-PS does. The sizes are still checked, after opening.
    if PYAV_VERSION < (18, 1):
        return {}
    return {"max_pixels": str(pixel_limit(path.stat().st_size, "video"))}


@contextmanager
def open_video_at(
    path: Path, time: float, *, threads: int
) -> Iterator[tuple[VideoStream, Iterator[av.Packet]]]:
    """The main video stream and its packets from the key frame at or before `time` (s) on.

    Yields all packets if `time` is before the first key frame or seeking does not work in the file.
    """
    with open_video(path, threads=threads) as (container, stream):
        packets = _seek(container, stream, time)
        if packets is not None:
            yield stream, packets
            return
    # Opened again, since the state after a failed seek depends on the container.
    with open_video(path, threads=threads) as (container, stream):
        yield stream, container.demux(stream)


def _seek(
    container: InputContainer, stream: VideoStream, time: float
) -> Iterator[av.Packet] | None:
    """Packets from a key frame presented at or before `time` on; None if no seek leads to one."""
    begin = seconds(stream, stream.start_time) or 0.0
    back = 0.0
    while time - back >= begin:
        try:
            container.seek(ticks(stream, time - back), stream=stream)
        except FFmpegError:
            return None
        packets = container.demux(stream)
        for packet in packets:
            now = packet_time(packet)
            # Demuxers search by decoding time, by coarse tables or by byte position, so the packet
            # that they find may be behind `time` or no key frame. Then seek further back.
            if not packet.size or now > time + _MAX_REORDERING:
                break
            if packet.is_keyframe:
                # One outside the edit list, of which MP4 files can have several parts: the packets
                # that follow may belong to a later part.
                if packet.is_discard:
                    return None
                if now <= time:
                    return chain([packet], packets)
                break
        back = max(1.0, back * 4)
    return None


# --- The stream's clock --------------------------------------------------------------------------


def seconds(stream: VideoStream, count: int | None) -> float | None:
    """`count` ticks of the stream's clock in seconds; None if the file does not give it."""
    if count is None or stream.time_base is None:
        return None
    return float(count * stream.time_base)


def ticks(stream: VideoStream, time: float) -> int:
    """`time` (s) in ticks of the stream's clock."""
    return round(time / stream.time_base) if stream.time_base else 0


def packet_time(packet: av.Packet) -> float:
    """Presentation time of a packet's frame, s; -inf if the file does not give it.

    The empty packet at the end has none either. AVI has decoding times only, which are used
    instead: all times of the file are then off by the same delay.
    """
    count = packet.dts if packet.pts is None else packet.pts
    return -inf if count is None else float(count * packet.time_base)


def end_time(container: InputContainer, stream: VideoStream) -> float | None:
    """Where the video ends according to the header, s."""
    if (length := seconds(stream, stream.duration)) is not None:
        return length + (seconds(stream, stream.start_time) or 0.0)
    if container.duration is None:
        return None
    return (container.duration + (container.start_time or 0)) / av.time_base


def promised_end(container: InputContainer, stream: VideoStream) -> float | None:
    """Where the video itself ends if the header says so exactly, s; else None.

    Most headers give an estimate, or the duration of the longest stream, which may be audio.
    """
    form, start = container.format.name, seconds(stream, stream.start_time) or 0.0
    if form.startswith("mov") and (length := seconds(stream, stream.duration)) is not None:
        return start + length  # its index lists all frames
    if form == "avi" and stream.frames and stream.average_rate:  # counts all frames
        return start + float(stream.frames / stream.average_rate)
    # In Matroska by convention of its usual writers, as "00:00:07.720000000".
    match = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if match is None:
        return None
    return int(match[1]) * 3600.0 + int(match[2]) * 60.0 + float(match[3])


def frame_interval(stream: VideoStream) -> float:
    """Mean time between frames according to the header, s."""
    rate = stream.average_rate or stream.guessed_rate
    return float(1 / rate) if rate else 1 / 25  # FFmpeg's own guess for streams without a rate


def pixel_aspect(stream: VideoStream) -> float:
    """Width of a stored pixel over its height."""
    return float(stream.sample_aspect_ratio or 1)
