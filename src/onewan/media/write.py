"""Writing videos: frames -> mp4, mov, webm, avi.

Hides codecs, their settings, and color tags. Never leaves an incomplete file under its name.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream

from onewan.errors import DataError
from onewan.files import replacing
from onewan.media.faults import error_reason
from onewan.media.kinds import SWS_ACCURATE, SWS_FULL_CHR_H_INP, extension

_BT709 = 1
"""Code of ITU-T H.273 for primaries and transfer function, for which PyAV 16 has no name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Encoding:
    """Settings of one container format."""

    codec: str
    options: Mapping[str, str]
    container: Mapping[str, str]
    matrix: Colorspace


_H264 = _Encoding(
    codec="libx264",
    options={"crf": "17"},  # visually lossless
    container={"movflags": "+faststart"},  # index first, so that browsers can start early
    matrix=Colorspace.ITU709,
)
_ENCODINGS: Mapping[str, _Encoding] = {
    "mp4": _H264,
    "mov": _H264,
    "webm": _Encoding(
        codec="libvpx-vp9",
        # b=0: by quality alone, no bit rate; cpu-used 4 halves the time for a few percent of size.
        options={"crf": "24", "b": "0", "row-mt": "1", "deadline": "good", "cpu-used": "4"},
        container={},
        matrix=Colorspace.ITU709,
    ),
    # MPEG-4 Part 2 in AVI has no color tags, so readers assume BT.601.
    "avi": _Encoding(
        codec="mpeg4",
        options={"qmin": "2", "qmax": "2"},
        container={},
        matrix=Colorspace.ITU601,
    ),
}


def write_video(path: str | Path, frames: np.ndarray, fps: float) -> None:
    """Write uint8 RGB `frames` [F, H, W, 3] as .mp4 or .mov (H.264), .webm (VP9) or .avi (MPEG-4).

    All are yuv420p; all but AVI are tagged BT.709. The file appears under its name only when it is
    complete. Raises `DataError` if it can't be written or a side is odd (4:2:0 has one chroma
    sample for two pixels), ValueError if `frames` is not such an array.
    """
    path = Path(path)
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"frames must be uint8 [F, H, W, 3], not {frames.dtype} {frames.shape}")
    check_video_name(path)
    encoding = _ENCODINGS[extension(path)]
    height, width = frames.shape[1:3]
    if width % 2 or height % 2:
        raise DataError(f"{path}: can't write {width}x{height}, a side is odd; use even sides")
    try:
        with (
            replacing(path) as partial,
            av.open(
                f"file:{partial}",
                "w",
                format=extension(path),
                container_options=dict(encoding.container),
            ) as container,
        ):
            _encode(container, frames, Fraction(fps).limit_denominator(100_000), encoding)
    except (FFmpegError, OSError) as error:
        raise DataError(
            f"{path}: can't be written ({error_reason(error)}); check the folder and the free space"
        ) from error


def video_bytes(frames: np.ndarray, fps: float) -> bytes:
    """A small mp4 (H.264) of uint8 RGB `frames` [F, H, W, 3] with even sides, to look at in a
    browser: a tenth of the bytes of `write_video`, with losses that can be seen."""
    file = io.BytesIO()
    preview = replace(_H264, options={"crf": "28", "preset": "veryfast"})
    # Without the index first, for which FFmpeg would have to read again what it has written.
    with av.open(file, "w", format="mp4") as container:
        _encode(container, frames, Fraction(fps).limit_denominator(100_000), preview)
    return file.getvalue()


def check_video_name(path: Path) -> None:
    """DataError if `write_video` writes no videos with the ending of `path`."""
    if extension(path) not in _ENCODINGS:
        raise DataError(
            f"{path}: videos of this kind can't be written; name it .{', .'.join(_ENCODINGS)}"
        )


def _encode(
    container: OutputContainer, frames: np.ndarray, rate: Fraction, encoding: _Encoding
) -> None:
    stream = container.add_stream(encoding.codec, rate=rate, options=dict(encoding.options))
    assert isinstance(stream, VideoStream)
    context = stream.codec_context
    context.height, context.width = frames.shape[1:3]
    context.pix_fmt = "yuv420p"
    if encoding.matrix == Colorspace.ITU709:
        context.color_primaries = context.color_trc = _BT709
        context.colorspace = Colorspace.ITU709
        context.color_range = ColorRange.MPEG
    # swscale would otherwise convert to BT.601, whatever the stream is tagged with.
    for number, pixels in enumerate(frames):
        frame = VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(
            format="yuv420p",
            dst_colorspace=encoding.matrix,
            dst_color_range=ColorRange.MPEG,
            interpolation=SWS_ACCURATE | SWS_FULL_CHR_H_INP,
        )
        frame.pts, frame.time_base = number, 1 / rate
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
