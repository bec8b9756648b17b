"""Animated images (WebP, PNG, AVIF): their frames with the times at which they are shown.

Read by Pillow from the first frame on, since most frames are changes of earlier ones. FFmpeg takes
these files for still images; GIF, which it reads, is among the videos.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from onewan.media.still import open_image, refuse_damaged_data

# Not every file with several pictures is an animation: TIFF has pages, MPO several views.
_FORMATS = frozenset({"AVIF", "GIF", "PNG", "WEBP"})


def frame_count(image: Image.Image) -> int:
    """The number of frames of an opened image; 1 if it is a still one."""
    if image.format not in _FORMATS:
        return 1
    return getattr(image, "n_frames", 1) - _skipped(image)


def is_animation(path: Path) -> bool:
    """Whether the image file has several frames; DataError if it can't be opened."""
    with open_image(path) as image:
        return frame_count(image) > 1


def shown_milliseconds(image: Image.Image) -> float:
    """How long the current frame is shown; before it is decoded, of WebP and AVIF a guess."""
    milliseconds = image.info.get("duration") or 0
    return milliseconds if milliseconds > 10 else 100  # as in browsers


def animation_frames(path: Path) -> Iterator[tuple[float, Image.Image]]:
    """The decoded frames of an animated image with the times at which they begin, s.

    Raises DataError if the file is damaged.
    """
    refuse_damaged_data(path)
    elapsed = 0.0
    with open_image(path) as image:
        for number in range(_skipped(image), _skipped(image) + frame_count(image)):
            image.seek(number)
            image.load()
            yield elapsed / 1000, image.copy()
            elapsed += shown_milliseconds(image)


def _skipped(image: Image.Image) -> int:
    # A PNG may begin with a picture for programs that do not know animations.
    return int(getattr(image, "default_image", False))
