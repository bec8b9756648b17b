"""Colors of images -> sRGB: by their ICC profile, with LittleCMS (Pillow's ImageCms), or by the tag
for their primaries."""

from __future__ import annotations

from io import BytesIO
from itertools import product

import numpy as np
from PIL import Image, ImageCms

from onewan.media.colors import is_wide
from onewan.media.gamut import SRGB, sdr_to_709

PRIMARIES = "onewan_primaries"
"""Key of an image's `info` with the number of its primaries by ITU-T H.273, if it has a tag."""

_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""The mode of pixels in the color space of a profile."""

# As printing and photo programs do by default: white stays white and black becomes black.
_INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC
_FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION


def to_srgb(image: Image.Image) -> tuple[Image.Image, str | None]:
    """`image`, decoded, with its colors in sRGB, and what the user should know about them.

    The image itself if it has no profile and no wide primaries, or a profile that is sRGB to within
    one level of 255.
    """
    profile = image.info.get("icc_profile")
    if not profile:
        if image.mode == "CMYK":
            return image, "CMYK without a color profile: its colors are approximate"
        primaries = image.info.get(PRIMARIES, 0)
        return (_from_wide(image, primaries) if is_wide(primaries) else image), None
    image, alpha = _without_alpha(image)
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        assert isinstance(source.profile, ImageCms.core.CmsProfile)  # which no type hint says
        mode = _MODES.get(source.profile.xcolor_space.strip(), "")
        if mode == "RGB" and image.mode == "L":
            image = image.convert("RGB")
        if mode != image.mode:
            raise ImageCms.PyCMSError(f"it is not for {image.mode} pixels")
        transform = ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), mode, "RGB", _INTENT, _FLAGS
        )
        if mode != "RGB" or _changes(transform):
            image = ImageCms.applyTransform(image, transform) or image
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        return _with_alpha(image, alpha), (
            f"color profile that can't be used ({reason}): its colors are taken for sRGB"
        )
    return _with_alpha(image, alpha), None


def _from_wide(image: Image.Image, primaries: int) -> Image.Image:
    colors, alpha = _without_alpha(image)
    signal = np.asarray(colors.convert("RGB"), np.float32) / 255
    return _with_alpha(Image.fromarray(sdr_to_709(signal, primaries, SRGB)), alpha)


def _without_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colors of `image` as RGB, L or CMYK, and its alpha channel."""
    if image.mode.startswith("I"):
        return gray_of_16_bits(image), None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return image.convert("RGB"), image.getchannel("A")
    if image.mode in {"P", "1"}:
        return image.convert("RGB" if image.mode == "P" else "L"), None
    return image, None


def _with_alpha(image: Image.Image, alpha: Image.Image | None) -> Image.Image:
    if alpha is not None:
        image = image.convert("RGB")
        image.putalpha(alpha)
    return image


def gray_of_16_bits(image: Image.Image) -> Image.Image:
    """A gray image of 16 bits, of Pillow's modes that begin with I, with 8."""
    return Image.fromarray((np.asarray(image) / 257).astype(np.uint8))


def _changes(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether the transform changes colors by more than rounding does."""
    grid = np.array(list(product(range(0, 256, 51), repeat=3)), np.uint8)[None]
    changed = ImageCms.applyTransform(Image.fromarray(grid), transform)
    assert changed is not None
    return bool((np.abs(np.asarray(changed).astype(int) - grid) > 1).any())
