"""Still images: reading them upright, and scaling and cropping to a size.

Hides Pillow, EXIF, transparency, and files whose header claims an impossible size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from io import BytesIO
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError, InvalidDataError
from PIL import Image, ImageOps, features

from onewan.errors import DataError
from onewan.media.colors import HDR_TRANSFERS
from onewan.media.faults import DAMAGE_REMEDY, error_reason, faults_of
from onewan.media.gamut import primaries_of
from onewan.media.icc import PRIMARIES, gray_of_16_bits, to_srgb
from onewan.media.kinds import HEIF_SUFFIXES, MAX_IMAGE_PIXELS, extension, pixel_limit

_SRGB_GAMMA = 1 / 2.2
_UNREAD_MODES = {"F": "32-bit floating point", "I": "32-bit integers", "LAB": "CIELAB"}
"""Modes that Pillow opens TIFF with. Black and white of 32 bits are unknown."""

RGB = tuple[int, int, int]
"""A color, each part from 0 to 255."""
WHITE: RGB = (255, 255, 255)


@dataclass(frozen=True, slots=True)
class Fit:
    """A target size in pixels: a picture is scaled to cover it, then cropped to it."""

    width: int
    height: int
    across: float = 0.5
    """Horizontal position of the crop, from left (0) to right (1); 0.5 is the center."""
    down: float = 0.5
    """Vertical position of the crop, from top (0) to bottom (1)."""

    def cover(self, width: int, height: int, pixel_aspect: float = 1.0) -> Cover:
        """How a picture of `width` x `height` pixels is scaled and cropped to this size.

        `pixel_aspect` is the width of its pixels over their height; those of the result are square.
        The same for videos, images and masks, so that these lie exactly over each other.
        """
        shown_width = width * pixel_aspect
        scale = max(self.width / shown_width, self.height / height)
        scaled_width = max(self.width, round(shown_width * scale))
        scaled_height = max(self.height, round(height * scale))
        return Cover(
            width=scaled_width,
            height=scaled_height,
            left=round((scaled_width - self.width) * self.across),
            top=round((scaled_height - self.height) * self.down),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cover:
    """A picture scaled to cover a `Fit`, in pixels, and where in it the crop begins."""

    width: int
    height: int
    left: int
    top: int


def read_image(path: str | Path, fit: Fit | None = None, background: RGB = WHITE) -> np.ndarray:
    """A still image as RGB uint8 [H, W, 3]: upright by EXIF, its colors in sRGB by its profile,
    transparency over `background`; the first picture if there are several.

    Raises `DataError` if it can't be read or its data are damaged, as far as its format shows that.
    """
    path = Path(path)
    refuse_damaged_data(path)
    with open_image(path) as image:
        return image_pixels(image, fit, background)


def image_pixels(image: Image.Image, fit: Fit | None, background: RGB) -> np.ndarray:
    """An opened image as RGB uint8 [H, W, 3]; see `read_image`. Changes `image`."""
    colors, _ = to_srgb(upright_image(image))
    pixels = flatten_alpha(colors, background)
    return np.array(pixels) if fit is None else fit_image(pixels, fit)


def fit_image(image: Image.Image | np.ndarray, fit: Fit, pixel_aspect: float = 1.0) -> np.ndarray:
    """`image` (RGB, uint8 [H, W, 3]) scaled and cropped to `fit`, as such an array.

    For still images; the frames of videos are scaled when their colors are converted, eight times
    as fast, see `onewan.media.video_frames`. `pixel_aspect` as for `Fit.cover`.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    cover = fit.cover(image.width, image.height, pixel_aspect)
    # The pixels of `image` that the crop is made of, so that no others are computed. Pillow, too,
    # widens the filter when it scales down.
    across, down = image.width / cover.width, image.height / cover.height
    box = (
        cover.left * across,
        cover.top * down,
        min(image.width, (cover.left + fit.width) * across),
        min(image.height, (cover.top + fit.height) * down),
    )
    return np.array(image.resize((fit.width, fit.height), Image.Resampling.LANCZOS, box=box))


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """The opened image, not yet decoded; Pillow's errors inside become `DataError`."""
    _require_decoder(path)
    with faults_of(path, "image"), Image.open(_with_free_parts(path)) as image:
        check_pixels(path, image.width, image.height, image.format or "image")
        if image.format == "TIFF" and image.mode in _UNREAD_MODES:
            raise DataError(
                f"{path}: has pixels of {_UNREAD_MODES[image.mode]}, which are not read; convert "
                "it to a png of 8 or 16 bits"
            )
        primaries, code = _color_codes(path, image)
        if transfer := HDR_TRANSFERS.get(code):
            raise DataError(
                f"{path}: is an HDR image ({transfer}), which is not read; convert it to SDR"
            )
        image.info[PRIMARIES] = primaries
        yield image


def _with_free_parts(path: Path) -> Path | BytesIO:
    """An animated WebP whose frames leave parts of the picture free, marked as transparent there;
    other files as they are.

    Players show free parts as transparent. Whether Pillow gives an alpha channel depends on a flag
    of the file, which encoders set for frames with transparent pixels of their own only
    (https://developers.google.com/speed/webp/docs/riff_container, VP8X and ANMF).
    """
    animation, alpha, size = 0x02, 0x10, slice(24, 30)
    with path.open("rb") as file:
        head = file.read(30)
    if head[8:16] != b"WEBPVP8X" or head[20] & (animation | alpha) != animation:
        return path
    data = bytearray(path.read_bytes())
    position, is_first = 12, True
    whole = bytes(6) + head[size]  # the place of a frame, and its size
    while position + 24 <= len(data):
        if data[position : position + 4] == b"ANMF":
            frame = data[position + 8 : position + 24]
            disposes = frame[15] & 1
            if disposes or (is_first and frame[:12] != whole):
                data[20] |= alpha
                return BytesIO(data)
            is_first = False  # the later ones lie over it
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        position += 8 + length + length % 2
    return path


def _require_decoder(path: Path) -> None:
    """`DataError` if the file's extension is that of a format for which a package is missing."""
    kind = extension(path)
    if kind in HEIF_SUFFIXES:
        try:
            import_module("pillow_heif").register_heif_opener()
        except ImportError as error:
            raise DataError(
                f"{path}: {kind} needs the package pillow-heif; install it with "
                '`pip install "onewan[heic]"`, or convert the file to png'
            ) from error
    elif kind == "avif" and not features.check("avif"):
        raise DataError(
            f"{path}: avif needs Pillow 11.3 or later; install it with `pip install -U pillow`, or "
            "convert the file to png"
        )


def _color_codes(path: Path, image: Image.Image) -> tuple[int, int]:
    """Primaries and transfer function, as in ITU-T H.273, that an image is tagged with, without
    its profile; 0 where it has no tag. Pillow applies neither."""
    if image.format == "PNG":
        with path.open("rb") as file:
            head = file.read(2**16).partition(b"IDAT")[0]
        _, found, chunk = head.partition(b"cICP")
        if found and len(chunk) > 1:
            return chunk[0], chunk[1]
        given = None if "srgb" in image.info else image.info.get("chromaticity")
        return primaries_of(given) if given else 0, 0
    if image.format == "AVIF":
        options = {"protocol_whitelist": "file"}
        # FFmpeg does not open every AVIF that Pillow does, and then nothing is known.
        with suppress(FFmpegError), av.open(f"file:{path}", container_options=options) as container:
            for stream in container.streams.video:
                context = stream.codec_context
                return int(context.color_primaries), int(context.color_trc)
    if image.format == "HEIF":
        tags = image.info.get("nclx_profile") or {}
        return tags.get("color_primaries") or 0, tags.get("transfer_characteristics") or 0
    return 0, 0


def image_notes(image: Image.Image) -> tuple[str, ...]:
    """What is assumed or left out when an image, which is decoded, is read, for the user."""
    _, note = to_srgb(image.crop((0, 0, 1, 1)))
    notes = [note] if note else []
    if image.format == "PNG" and not {"icc_profile", "srgb"} & image.info.keys():
        gamma = image.info.get("gamma") or _SRGB_GAMMA
        if abs(gamma / _SRGB_GAMMA - 1) > 0.05:
            notes.append(f"gamma of {1 / gamma:.2g} (gAMA), which is not applied: read as sRGB")
    pages = getattr(image, "n_frames", 1)
    if image.format == "TIFF" and pages > 1:
        notes.append(f"{pages} pages, of which the first is used")
    return tuple(notes)


def upright_image(image: Image.Image) -> Image.Image:
    """The opened `image` decoded and turned by its EXIF orientation, which changes it in place."""
    ImageOps.exif_transpose(image, in_place=True)
    return image


def refuse_damaged_data(path: Path) -> None:
    """`DataError` for damage that Pillow's decoders overlook: they return what they could decode.

    For PNG the checksums of all data are compared. JPEG has none, so a second decoder has to read
    it: FFmpeg's is stricter than libjpeg, which fills up what it can't decode. Other formats can't
    be checked in this way.
    """
    with open_image(path) as image:
        form = image.format
        if form == "PNG":
            image.verify()
    if form in {"JPEG", "MPO"} and _jpeg_coding(data := path.read_bytes()) in {0xC0, 0xC1, 0xC2}:
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
    if image.mode.startswith("I"):  # which Pillow's own conversion clips to white
        return gray_of_16_bits(image).convert("RGB")
    if not image.has_transparency_data:
        # `convert` would copy an image that is RGB, and large ones take up to 540 MB.
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image.convert("RGBA")
    below = Image.new("RGBA", rgba.size, background)
    return Image.alpha_composite(below, rgba).convert("RGB")
