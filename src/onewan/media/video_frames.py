"""Decoding the packets of a video, and its frames as upright RGB."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from PIL import Image

from onewan.errors import DataError
from onewan.media.colors import VideoColors
from onewan.media.faults import DAMAGE_REMEDY, error_reason
from onewan.media.gamut import sdr_to_709
from onewan.media.hdr import to_sdr
from onewan.media.kinds import PYAV_VERSION, SWS_ACCURATE, SWS_SCALING
from onewan.media.still import RGB, Fit, fit_image, flatten_alpha
from onewan.media.video_stream import packet_time

# Only these decoders react to `skip_frame` at any packet; others, such as dav1d, read it once.
_SKIPPING_DECODERS = frozenset({"h264", "hevc"})

_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}

# AVCOL_SPC_RGB, which is no YUV matrix.
_RGB = 0

# AVCOL_RANGE_JPEG.
_FULL_RANGE = 2

# Which channel of RGB each plane of FFmpeg's planar RGB formats is.
_GBR = (1, 2, 0)

# A pool of threads for one frame costs more than it saves. PyAV 16 has none.
_ONE_THREAD = {} if PYAV_VERSION < (17, 0) else {"threads": 1}

# Two times closer than this are the same: containers round them differently; in s.
_SAME_TIME = 1e-6


class DamageError(DataError):
    """Damage that was found while decoding."""

    def __init__(self, path: Path, time: float, reason: str, *, decoded_from: float) -> None:
        """`decoded_from` is the time of the key frame at which decoding began, s."""
        super().__init__(
            f"{path}: is damaged near {max(time, 0.0):.2f} s ({reason}); {DAMAGE_REMEDY}"
        )
        self.decoded_from = decoded_from


# --- Decoding ------------------------------------------------------------------------------------


def decode_frames(
    path: Path,
    stream: VideoStream,
    packets: Iterable[av.Packet],
    *,
    skip_before: float = -inf,
    ignore_damage_before: float = -inf,
) -> Iterator[tuple[float, VideoFrame]]:
    """Frames with their presentation times (s), strictly ascending, from the first key frame on.

    Frames before `skip_before` are left out, and not decoded if no other frame refers to them.
    Frames before `ignore_damage_before` are left out, and so is damage there; elsewhere it raises
    `DamageError`.
    """
    decoded_from: float | None = None
    decoder = _decoder(stream)
    newest = max(skip_before, ignore_damage_before) - _SAME_TIME
    # AVI has no presentation times, and those that FFmpeg makes up for H.264 are out of order. But
    # decoders output frames in presentation order, so each frame gets the earliest time that no
    # other frame has got: the smallest one in the heap.
    is_avi, free_times = stream.container.format.name == "avi", list[float]()
    can_skip = stream.codec_context.name in _SKIPPING_DECODERS and not is_avi
    for packet in _decodable(packets):
        now = packet_time(packet)
        if decoded_from is None:
            decoded_from = 0.0 if now == -inf else now
        if can_skip and packet.size:
            # NONREF skips the frames that no other frame is predicted from. Per packet: frames of
            # the requested span must all be decoded.
            skip = packet.pts is not None and now < skip_before
            stream.codec_context.skip_frame = "NONREF" if skip else "DEFAULT"
        if is_avi and packet.size:
            heappush(free_times, now)
        try:
            frames = decoder.decode(packet)
        except FFmpegError as error:
            if now < ignore_damage_before:
                continue
            # Packets are not in presentation order; all up to `newest` was decoded well.
            time = max(now, newest)
            raise DamageError(path, time, error_reason(error), decoded_from=decoded_from) from error
        for frame in frames:
            time = heappop(free_times) if is_avi and free_times else frame.time
            time = now if time is None else time
            if time <= newest:
                continue  # before the span, or with a timestamp that goes backwards
            if frame.is_corrupt:
                raise DamageError(path, time, "as its decoder reports", decoded_from=decoded_from)
            newest = time
            yield time, frame


def _decoder(stream: VideoStream) -> VideoCodecContext:
    """The stream's own decoder; libvpx for VP8 and VP9 with alpha, and another one for all VP8.

    FFmpeg's own decoders of these ignore the alpha channel, which is a second stream beside each
    packet, and return the colors below transparent parts, which are arbitrary. That of VP8 writes
    over the tags that the container has for colors, which `VideoColors` needs.
    """
    context = stream.codec_context
    # Some writers give the mark in capitals.
    tags = {key.lower(): value for key, value in stream.metadata.items()}
    has_alpha = tags.get("alpha_mode") == "1"
    name = _ALPHA_DECODERS.get(context.name) if has_alpha else None
    if name is None and context.name != "vp8":
        return context
    name = name or context.name
    decoder = VideoCodecContext.create(name, "r")
    assert isinstance(decoder, VideoCodecContext)
    decoder.options = dict(context.options)
    decoder.thread_count = context.thread_count
    return decoder


def _decodable(packets: Iterable[av.Packet]) -> Iterator[av.Packet]:
    """The packets without those whose frames refer to something before the first key frame."""
    first_time, keys = None, 0
    for packet in packets:
        if packet.size:
            keys += packet.is_keyframe
            if not keys:
                continue  # a recording that begins between two key frames
            if first_time is None:
                first_time = packet_time(packet)
        # In an open GOP, frames that are stored after the key frame but shown before it refer to
        # the previous GOP, which is not decoded. After the next key frame, earlier times are those
        # of another part of an MP4's edit list.
        is_leading = (
            keys == 1
            and packet.pts is not None
            and first_time is not None
            and packet_time(packet) < first_time
        )
        if not is_leading:
            yield packet


# --- Pixels --------------------------------------------------------------------------------------


def frame_pixels(
    frame: VideoFrame,
    colors: VideoColors,
    fit: Fit | None,
    pixel_aspect: float,
    background: RGB,
    reformatter: VideoReformatter,
) -> np.ndarray:
    """A decoded frame as upright RGB uint8 [H, W, 3], at the size of `fit` if it is given.

    `pixel_aspect` is the width of a stored pixel over its height; `fit` makes pixels square.
    `background` is what transparent parts are laid over. `reformatter` is for the frames of one
    video in one thread: it keeps its filters, 0.8 ms of work for each frame of 720p.
    """
    orientation = Orientation.of(frame)
    aspect = 1 / pixel_aspect if orientation.transpose else pixel_aspect
    if has_alpha(frame):
        rgba = _converted(reformatter, frame, colors, "rgba", None).to_ndarray()
        if colors.is_wide:
            signal = rgba[..., :3].astype(np.float32) / 255
            rgba[..., :3] = sdr_to_709(signal, colors.primaries, colors.curve)
        # Laid over the background first: the colors below transparent parts are arbitrary.
        pixels = orientation.apply(np.asarray(flatten_alpha(Image.fromarray(rgba), background)))
        return pixels if fit is None else fit_image(pixels, fit, aspect)
    size, crop = None, (slice(None), slice(None))
    if fit is not None:
        width, height = orientation.turned((frame.width, frame.height))
        cover = fit.cover(width, height, aspect)
        size = orientation.turned((cover.width, cover.height))
        crop = slice(cover.top, cover.top + fit.height), slice(cover.left, cover.left + fit.width)
    is_plain = colors.transfer == "SDR" and not colors.is_wide
    convert = _rgb if is_plain else _signal
    pixels = orientation.apply(convert(reformatter, frame, colors, size))[crop]
    if is_plain:
        return pixels
    if colors.is_wide:
        return sdr_to_709(pixels, colors.primaries, colors.curve)
    return to_sdr(pixels, colors.transfer, colors.primaries)


def has_alpha(frame: VideoFrame) -> bool:
    """Whether pixels of the frame can be transparent."""
    return any(component.is_alpha for component in frame.format.components)


def _rgb(
    reformatter: VideoReformatter,
    frame: VideoFrame,
    colors: VideoColors,
    size: tuple[int, int] | None,
) -> np.ndarray:
    """A decoded frame as stored, or scaled to `size` (width, height): RGB uint8 [H, W, 3]."""
    # By way of planes, since swscale has fast code with these flags for gbrp only: the same values
    # as directly to rgb24 in a third of the time, 2.5 instead of 7 ms from 720p to 480p. PyAV's own
    # conversion from gbrp to an array takes as long as the detour saves.
    planar = _converted(reformatter, frame, colors, "gbrp", size)
    pixels = np.empty((planar.height, planar.width, 3), np.uint8)
    for plane, channel in zip(planar.planes, _GBR, strict=True):
        # Lines are padded to `line_size` bytes.
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
        pixels[..., channel] = rows[:, : plane.width]
    return pixels


def _signal(
    reformatter: VideoReformatter,
    frame: VideoFrame,
    colors: VideoColors,
    size: tuple[int, int] | None,
) -> np.ndarray:
    """The same of a frame in its own coding, HDR or of wide primaries: float32 [H, W, 3], 0 to 1.

    Scaled in this coding, as SDR is.
    """
    # Not rgb48, to which swscale converts YUV of 10 bits with wrong colors and these flags.
    planar = _converted(reformatter, frame, colors, "gbrp16le", size)
    # swscale shifts bits without filling them up: white is 0xFFC0 for 10 bits, and 0xFF00 for the
    # white of limited range, which is 235/256 at any depth.
    bits = frame.format.components[0].bits
    is_full = frame.format.is_rgb or colors.color_range == _FULL_RANGE
    white = (2**bits - 1) << (16 - bits) if is_full else 0xFF00
    signal = np.empty((planar.height, planar.width, 3), np.float32)
    for plane, channel in zip(planar.planes, _GBR, strict=True):
        rows = np.frombuffer(memoryview(plane), "<u2").reshape(plane.height, -1)
        np.divide(rows[:, : plane.width], white, out=signal[..., channel], dtype=np.float32)
    return signal


def _converted(
    reformatter: VideoReformatter,
    frame: VideoFrame,
    colors: VideoColors,
    format: str,
    size: tuple[int, int] | None,
) -> VideoFrame:
    """The frame in an RGB `format`, by the matrix and range of `colors`, at `size` if given."""
    width, height = size or (frame.width, frame.height)
    # PyAV 16 applies matrix and range only if one of them differs from the destination's, and takes
    # no range from the frame.
    return reformatter.reformat(
        frame,
        width,
        height,
        format,
        src_colorspace=colors.matrix,
        dst_colorspace=_RGB,
        src_color_range=colors.color_range,
        interpolation=SWS_SCALING if size else SWS_ACCURATE,
        **_ONE_THREAD,
    )


@dataclass(frozen=True, slots=True)
class Orientation:
    """How the stored picture becomes upright: transposed first, then mirrored.

    Covers all eight rotations and reflections. An angle alone, such as `VideoFrame.rotation`, shows
    the mirrored recordings of front cameras upside down.
    """

    transpose: bool
    mirror_rows: bool
    mirror_columns: bool

    @staticmethod
    def of(frame: VideoFrame) -> Orientation:
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return Orientation(False, False, False)
        # (x, y) is shown at (a x + c y, b x + d y), y pointing down (libavutil/display.h).
        a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
        if abs(b) > abs(a):
            return Orientation(True, b < 0, c < 0)
        return Orientation(False, d < 0, a < 0)

    def turned(self, size: tuple[int, int]) -> tuple[int, int]:
        """The stored `size` (width, height) as shown, or the reverse."""
        return (size[1], size[0]) if self.transpose else size

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """`pixels`, [H, W, 3] or [H, W], as shown; a view."""
        if self.transpose:
            pixels = pixels.swapaxes(0, 1)
        if self.mirror_rows:
            pixels = pixels[::-1]
        return pixels[:, ::-1] if self.mirror_columns else pixels
