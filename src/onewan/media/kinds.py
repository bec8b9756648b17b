"""File extensions of media, and the limits and conversion flags of this package."""

from __future__ import annotations

from pathlib import Path

import av

PYAV_VERSION = tuple(int(number) for number in av.__version__.split(".")[:2])
"""OneTrainer pins (16, 1)."""

HEIF_SUFFIXES = frozenset({"heic", "heif", "hif"})
"""Extensions of images that need the package pillow-heif, an optional one."""

IMAGE_SUFFIXES = HEIF_SUFFIXES | {
    *("apng", "avif", "bmp", "jfif", "jpe", "jpeg", "jpg", "png", "tif", "tiff", "webp")
}
"""Extensions of images, lower case, without the dot; some of them can be animated."""

# fmt: off
UNREAD_IMAGE_SUFFIXES = frozenset({
    "arw", "cr2", "cr3", "dng", "exr", "hdr", "j2k", "jp2", "jxl", "nef", "orf", "psd", "raf",
    "rw2", "svg", "tga",
})
# fmt: on
"""Extensions of images that are not read, so that they can be reported."""

# fmt: off
VIDEO_SUFFIXES = frozenset({
    "3g2", "3gp", "asf", "avi", "divx", "dv", "f4v", "flv", "gif", "m1v", "m2ts", "m2v", "m4v",
    "mjpeg", "mkv", "mov", "mp4", "mpe", "mpeg", "mpg", "mts", "mxf", "nut", "ogg", "ogm", "ogv",
    "qt", "rm", "rmvb", "ts", "vob", "webm", "wmv", "y4m",
})
# fmt: on
"""Extensions of videos, whether supported or not, so that an unsupported one can be reported."""

# A header that claims more is damaged or malicious, and nothing is allocated for it. Cameras take
# images of 150 million pixels at most; a frame of 8K has 33 million, one of a 11K dome 66.
MAX_IMAGE_PIXELS = 2**27
MAX_FRAME_PIXELS = 2**26

# Beyond this size, 16.8 million pixels, a picture must have a byte for so many of them. A video of
# 8K frames is never smaller than 1.6 MB, but a VP8 file of 10 kB can be damaged into one that takes
# 2.3 GB and 14 s to decode. Images may be drawn: of one color, a PNG has 8256 pixels per byte.
_LARGE_PIXELS = 2**24
_PIXELS_PER_BYTE = {"video": 20, "image": 10_000, "JPEG": 1000, "MPO": 1000}


def pixel_limit(file_bytes: int, kind: str) -> int:
    """The most pixels that a picture of a file of this size may have, to be believed.

    `kind` is "video", or Pillow's name of an image format.
    """
    per_byte = _PIXELS_PER_BYTE.get(kind, _PIXELS_PER_BYTE["image"])
    most = MAX_FRAME_PIXELS if kind == "video" else MAX_IMAGE_PIXELS
    return min(most, max(_LARGE_PIXELS, per_byte * file_bytes))


# swscale's default rounds down and repeats chroma: measured on a 1080p frame, 1.1 levels too dark
# on average. These flags reduce the mean error to 0.004, for 2 ms per frame of 720p. They are
# integers here, since PyAV names the last three only from version 18 on, which needs Python 3.11.
SWS_BILINEAR = 0x2
SWS_LANCZOS = 0x200
SWS_FULL_CHR_H_INT = 0x2000
SWS_FULL_CHR_H_INP = 0x4000
SWS_ACCURATE_RND = 0x40000
SWS_BITEXACT = 0x80000
SWS_ACCURATE = SWS_BILINEAR | SWS_ACCURATE_RND | SWS_FULL_CHR_H_INT

# For scaling. swscale widens the filter when it scales down (no aliasing); of its filters, Lanczos
# keeps the most detail, which the VAE should see. FULL_CHR_H_INP matters for RGB sources, of which
# every other column would be left out, and BITEXACT gives the same values on every processor.
SWS_SCALING = (
    SWS_LANCZOS | SWS_ACCURATE_RND | SWS_FULL_CHR_H_INT | SWS_FULL_CHR_H_INP | SWS_BITEXACT
)


def extension(path: Path) -> str:
    """The file's extension in lower case without the dot."""
    return path.suffix.lower().removeprefix(".")
