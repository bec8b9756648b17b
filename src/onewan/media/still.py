"""Still images: reading them upright, and scaling and cropping to a size.

Hides Pillow, EXIF, transparency, and files whose header claims an impossible size.
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
from onewan.media.kinds import DAMAGE_REMEDY, MAX_PIXELS, error_reason


@dataclass(frozen=True, slots=True)
class Fit:
    """A target size in pixels: the image is scaled to cover it, then cropped to it."""

    width: int
    height: int
    across: float = 0.5
    """Horizontal position of the crop, from left (0) to right (1); 0.5 is the center."""
    down: float = 0.5
    """Vertical position of the crop, from top (0) to bottom (1)."""


def read_image(path: str | Path, fit: Fit | None = None) -> np.ndarray:
    """A still image as RGB uint8 [H, W, 3]: upright by EXIF, transparency over white, first frame.

    Raises `DataError` if it can't be read.
    """
    path = Path(path)
    with open_image(path) as image:
        upright = flatten_alpha(ImageOps.exif_transpose(image))
    return np.array(upright) if fit is None else fit_image(upright, fit)


def fit_image(image: Image.Image | np.ndarray, fit: Fit, pixel_aspect: float = 1.0) -> np.ndarray:
    """`image` (RGB uint8 [H, W, 3]) scaled to cover `fit` and cropped to it, as an array.

    `pixel_aspect` is the width of its pixels over their height; those of the result are square.
    """
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
    # Crop and scale in one step, so that the crop is exact to a fraction of a pixel. Pillow widens
    # the filter when it scales down (no aliasing, unlike OpenCV or torch without antialias); of its
    # filters, Lanczos keeps the most detail, which the VAE should see.
    return np.array(image.resize((fit.width, fit.height), Image.Resampling.LANCZOS, box=box))


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """The opened image, not yet decoded; Pillow's errors inside become `DataError`."""
    try:
        with Image.open(path) as image:
            _check_pixels(path, *image.size)
            yield image
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{path}: claims more pixels than any image has; {DAMAGE_REMEDY}"
        ) from error
    except UnidentifiedImageError as error:  # its message is only the path
        raise DataError(f"{path}: is not an image that can be read; {DAMAGE_REMEDY}") from error
    # Pillow's decoders report damage by any of these exceptions.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise DataError(
            f"{path}: is not an image that can be read ({error_reason(error)}); {DAMAGE_REMEDY}"
        ) from error


def _check_pixels(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{path}: claims {width}x{height} pixels, more than any image has; {DAMAGE_REMEDY}"
        )


def flatten_alpha(image: Image.Image) -> Image.Image:
    """`image` as RGB, transparent parts over white."""
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow's own conversion clips to white
        return Image.fromarray((np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")
