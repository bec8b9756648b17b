"""Still images: reading them upright, and scaling and cropping to a size.

Hides Pillow, EXIF, transparency, and files whose header claims an impossible size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError, InvalidDataError
from PIL import Image, ImageOps

from onewan.errors import DataError
from onewan.media.faults import DAMAGE_REMEDY, error_reason, faults_of
from onewan.media.kinds import MAX_IMAGE_PIXELS, pixel_limit

RGB = tuple[int, int, int]
"""A color, each part from 0 to 255."""
WHITE: RGB = (255, 255, 255)


@dataclass(frozen=True, slots=True)
class Fit:
    """A target size in pixels: the image is scaled to cover it, then cropped to it."""

    width: int
    height: int
    across: float = 0.5
    """Horizontal position of the crop, from left (0) to right (1); 0.5 is the center."""
    down: float = 0.5
    """Vertical position of the crop, from top (0) to bottom (1)."""


def read_image(path: str | Path, fit: Fit | None = None, background: RGB = WHITE) -> np.ndarray:
    """A still image as RGB uint8 [H, W, 3]: upright by EXIF, transparency over `background`.

    Raises `DataError` if it can't be read or its data are damaged, as far as its format shows that.
    """
    path = Path(path)
    with open_image(path) as image:
        _refuse_damaged_data(path, image.format)
        upright = flatten_alpha(upright_image(image), background)
    return np.array(upright) if fit is None else fit_image(upright, fit)


def fit_image(image: Image.Image | np.ndarray, fit: Fit, pixel_aspect: float = 1.0) -> np.ndarray:
    """`image` (RGB uint8 [H, W, 3], or one channel, float32 [H, W]) scaled to cover `fit` and
    cropped to it, as an array.

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
    with faults_of(path, "image"), Image.open(path) as image:
        check_pixels(path, image.width, image.height, image.format or "image")
        yield image


def upright_image(image: Image.Image) -> Image.Image:
    """The opened `image` decoded and turned by its EXIF orientation, which changes it in place."""
    ImageOps.exif_transpose(image, in_place=True)
    return image


def _refuse_damaged_data(path: Path, form: str | None) -> None:
    """`DataError` for damage that Pillow's decoders overlook: they return what they could decode.

    For PNG the checksums of all data are compared. JPEG has none, so a second decoder has to read
    it: FFmpeg's is stricter than libjpeg, which fills up what it can't decode. WebP can't be
    checked in this way.
    """
    if form == "PNG":
        with Image.open(path) as image:
            image.verify()
    elif form in {"JPEG", "MPO"} and _jpeg_coding(data := path.read_bytes()) in {0xC0, 0xC1, 0xC2}:
        decoder = av.CodecContext.create("mjpeg", "r")
        decoder.options = {"err_detect": "crccheck+explode", "max_pixels": str(MAX_IMAGE_PIXELS)}
        try:
            decoder.decode(av.Packet(data))
        except InvalidDataError as error:
            raise DataError(f"{path}: its data are damaged; {DAMAGE_REMEDY}") from error
        except FFmpegError:
            return  # a kind of JPEG that FFmpeg does not know


def _jpeg_coding(data: bytes) -> int | None:
    """How a JPEG is coded: baseline (0xC0, 0xC1), progressive (0xC2) or else."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if 0xC0 <= marker <= 0xCF and marker not in {0xC4, 0xC8, 0xCC}:
            return marker
        # A marker may follow any number of 0xFF bytes.
        length = (
            1 if marker == 0xFF else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        )
        position += length
    return None


def refuse_damaged_gif(path: Path, frames: int, until: float) -> None:
    """`DataError` if a frame of a GIF up to the time `until` (s) is damaged.

    FFmpeg's decoder returns such frames as good ones and only logs what is wrong with them.
    `frames` is how many of them FFmpeg finds in the file.
    """
    time = 0.0
    with faults_of(path, "video"), Image.open(path) as image:
        try:
            if getattr(image, "n_frames", 1) < frames:
                raise EOFError(f"after {image.tell() + 1} of {frames} frames")
            for number in range(frames):
                image.seek(number)
                image.load()
                milliseconds = image.info.get("duration", 0)
                # As in FFmpeg: 10 ms and less stand for 100 ms.
                time += (milliseconds if milliseconds > 10 else 100) / 1000
                if time > until:
                    return
        except (OSError, EOFError, SyntaxError) as error:
            raise DataError(
                f"{path}: is damaged near {time:.2f} s ({error_reason(error)}); {DAMAGE_REMEDY}"
            ) from error


def check_pixels(path: Path, width: int, height: int, kind: str) -> int:
    """`pixel_limit` of this file; DataError if its header claims more."""
    size = path.stat().st_size
    limit = pixel_limit(size, kind)
    if width * height > limit:
        raise DataError(
            f"{path}: claims {width}x{height} pixels, more than the {limit} that are believed of a "
            f"file of {size} bytes; {DAMAGE_REMEDY}"
        )
    return limit


def flatten_alpha(image: Image.Image, background: RGB = WHITE) -> Image.Image:
    """`image` as RGB, transparent parts over `background`."""
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow's own conversion clips to white
        return Image.fromarray((np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        # `convert` would copy an image that is RGB, and large ones take up to 540 MB.
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image.convert("RGBA")
    below = Image.new("RGBA", rgba.size, background)
    return Image.alpha_composite(below, rgba).convert("RGB")
