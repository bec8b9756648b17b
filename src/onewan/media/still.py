"""Still images: reading them upright, and fitting a picture to a size.

Hides Pillow, EXIF, transparency, and files that claim to be larger than any picture.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from onewan.errors import DataError
from onewan.media.kinds import AGAIN, MAX_PIXELS, reason


@dataclass(frozen=True, slots=True)
class Fit:
    """A target size: the picture is scaled to cover it, then cropped to it."""

    width: int
    height: int
    across: float = 0.5
    """Where the cut lies from left (0) to right (1); 0.5 is around the centre."""
    down: float = 0.5
    """The same from top to bottom."""


def read_image(path: str | Path, fit: Fit | None = None) -> np.ndarray:
    """A still image as uint8 [H, W, 3]: upright by EXIF, transparency over white, first frame."""
    path = Path(path)
    with open_image(path) as image:
        picture = flat(ImageOps.exif_transpose(image))
    return np.array(picture) if fit is None else fit_image(picture, fit)


def fit_image(image: Image.Image | np.ndarray, fit: Fit, pixel_aspect: float = 1.0) -> np.ndarray:
    """`image` (uint8 RGB) scaled to cover `fit` and cropped to it: [H, W, 3]."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    shown_width = image.width * pixel_aspect
    scale = max(fit.width / shown_width, fit.height / image.height)
    width, height = fit.width / (scale * pixel_aspect), fit.height / scale
    left = max(0.0, (image.width - width) * fit.across)
    top = max(0.0, (image.height - height) * fit.down)
    box = (left, top, min(image.width, left + width), min(image.height, top + height))
    if box == (0, 0, fit.width, fit.height):
        return np.array(image)
    # One step for crop and scale, so the crop is exact to a fraction of a pixel. Pillow widens the
    # filter by the reduction (no aliasing, unlike OpenCV or torch without antialias); Lanczos keeps
    # the most detail of its filters, and the VAE should see the footage's detail, not a blur.
    return np.array(image.resize((fit.width, fit.height), Image.Resampling.LANCZOS, box=box))


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """The image, not yet decoded; Pillow's errors inside become `DataError`."""
    try:
        with Image.open(path) as image:
            _check_pixels(path, *image.size)
            yield image
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: claims more pixels than any picture has; {AGAIN}") from error
    except UnidentifiedImageError as error:  # its text is the path alone
        raise DataError(f"{path}: is not an image that can be read; {AGAIN}") from error
    # Pillow's readers report damage as any of these.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise DataError(
            f"{path}: is not an image that can be read ({reason(error)}); {AGAIN}"
        ) from error


def _check_pixels(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{path}: claims {width}x{height} pixels, more than any picture has; {AGAIN}"
        )


def flat(image: Image.Image) -> Image.Image:
    """`image` as RGB, what is transparent shown over white."""
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips it to white
        return Image.fromarray((np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")
