"""By which matrix, range and transfer function a video's samples are colors.

The tags of the stream decide. Where it has none, the rules of players do: BT.709 for HD and BT.601
for SD, limited range. What was assumed, and what is not converted, is said in notes.

Numbers are those of ITU-T H.273, which are also FFmpeg's AVColorSpace, AVColorPrimaries and
AVColorTransferCharacteristic.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame

from onewan.errors import DataError

Transfer = Literal["SDR", "PQ", "HLG"]
"""SDR stands for all transfer functions that screens for BT.709 and sRGB show about right."""

BT709, BT601, BT2020, DCI_P3, DISPLAY_P3 = 1, 5, 9, 11, 12
"""Matrix coefficients or color primaries."""

UNTAGGED = "colors without tags"
"""Begins the note about a stream without them, as most are."""

_RGB, _UNSPECIFIED, _RESERVED = 0, 2, 3

# swscale converts them as if they were BT.601.
_UNREAD_MATRICES = {
    8: "YCgCo",
    11: "Y'D'zD'x",
    12: "chromaticity-derived YCbCr",
    13: "chromaticity-derived YCbCr",
    14: "ICtCp",
    15: "IPT-C2",
    16: "YCgCo-R",
    17: "YCgCo-R",
}
# Streams of other profiles are tagged as HLG, PQ or BT.709, which is what is read of them.
_DOLBY_VISION_TAGS = frozenset({"dvh1", "dvhe", "dva1", "dvav", "dav1"})
_MATRICES_BY_PRIMARIES = {1: BT709, 5: BT601, 6: BT601, 9: BT2020}
HDR_TRANSFERS: dict[int, Transfer] = {16: "PQ", 18: "HLG"}
_UNREAD_TRANSFERS = {8: "linear", 9: "logarithmic", 10: "logarithmic", 17: "SMPTE ST 428-1"}
_WIDE_PRIMARIES = {BT2020: "BT.2020", DCI_P3: "DCI-P3", DISPLAY_P3: "Display P3"}

_HD_LINES, _HD_COLUMNS = 720, 1280
"""From either of these on, a video without tags is BT.709; 1280x534 is HD as well."""


@dataclass(frozen=True, slots=True)
class VideoColors:
    """How the samples of a video become RGB."""

    matrix: int
    """Matrix coefficients of YUV samples; without meaning if they are RGB."""
    color_range: int
    """FFmpeg's AVColorRange: 1 limited, 2 full, 0 unspecified, which is limited for YUV."""
    transfer: Transfer
    primaries: int
    curve: int = _UNSPECIFIED
    """The transfer function as tagged."""
    notes: tuple[str, ...] = ()
    """What was assumed, and what is not converted or not exactly, for the user."""

    @property
    def is_wide(self) -> bool:
        """Whether these are SDR colors whose primaries have to be converted."""
        return self.transfer == "SDR" and is_wide(self.primaries)

    @staticmethod
    def of(
        path: Path, source: VideoFrame | VideoCodecContext, context: VideoCodecContext
    ) -> VideoColors:
        """The colors of a decoded frame, or of a stream by its header: `source` is one of them.

        `context` is the stream's decoder; PyAV 16 gives a frame's matrix and range, but no other of
        its tags. Raises DataError for samples that can't be converted.
        """
        # The header of VP8 itself can only say BT.601, whatever the tags of the container are.
        tagged = context if context.name == "vp8" else source
        matrix, color_range = int(tagged.colorspace), int(tagged.color_range)
        if matrix == _UNSPECIFIED:  # the libvpx decoders forget the tags of the container
            matrix = int(context.colorspace)
        transfer, primaries = (
            HDR_TRANSFERS.get(context.color_trc, "SDR"),
            int(context.color_primaries),
        )
        notes = list[str]()
        name = _UNREAD_MATRICES.get(matrix)
        if matrix == _UNSPECIFIED and context.codec_tag in _DOLBY_VISION_TAGS:
            name = "Dolby Vision of profile 5"
        if name:
            raise DataError(
                f"{path}: its colors are coded as {name}, which is not read; convert it to BT.709"
            )
        # The planes of YUV formats are luma and chroma, those of RGB and gray formats are not.
        form = source.format
        is_yuv = form is not None and any(c.is_chroma for c in form.components if not form.is_rgb)
        if matrix in {_UNSPECIFIED, _RESERVED} or (is_yuv and matrix == _RGB):
            by_tags = BT2020 if transfer != "SDR" else None
            matrix = _MATRICES_BY_PRIMARIES.get(primaries, by_tags) or _by_size(source)
            if is_yuv and primaries not in _MATRICES_BY_PRIMARIES:
                why = "as HDR is" if by_tags else "by the size"
                name = {BT709: "BT.709", BT601: "BT.601", BT2020: "BT.2020"}[matrix]
                notes.append(f"{UNTAGGED}, read as {name} ({why})")
        if transfer != "SDR":
            notes.append(f"HDR ({transfer}) brought to SDR")
        elif name := _UNREAD_TRANSFERS.get(context.color_trc):
            notes.append(f"{name} transfer function, which is not converted")
        elif name := _WIDE_PRIMARIES.get(primaries):
            notes.append(f"SDR with {name} primaries, brought to those of BT.709")
        return VideoColors(
            matrix=matrix,
            color_range=color_range or int(context.color_range),
            transfer=transfer,
            primaries=primaries,
            curve=int(context.color_trc),
            notes=tuple(notes),
        )


def is_wide(primaries: int) -> bool:
    """Whether primaries are those of a larger gamut than BT.709, which have to be converted."""
    return primaries in _WIDE_PRIMARIES


def _by_size(source: VideoFrame | VideoCodecContext) -> int:
    is_hd = source.height >= _HD_LINES or source.width >= _HD_COLUMNS
    return BT709 if is_hd else BT601
