"""Loss masks: the values of a clip's mask per latent cell or pixel.

A mask is an image or a video (`onewan.data.companions`). White is 1 in the loss mask, black is 0,
and transparent pixels are white. It is cropped and scaled like its clip, and then averaged over the
pixels and frames that one latent cell encodes. Hides the arithmetic; uses neither the cache nor
torch.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onewan.data.augment import Variation
from onewan.data.companions import Companion
from onewan.media import Fit, read_frames

MASK_VERSION = 3
"""Incremented when the values of `latent_mask` change, so that cached masks are computed again."""

# Luma of BT.601 in thousandths, as in Pillow's conversion to grayscale. Integers, so that the sum
# does not depend on the order of its terms and white is exactly 1.
_LUMA_WEIGHTS = np.array([299, 587, 114], np.int32)
_WHITE = 255 * 1000


def uniform_mask_note(lowest: float, highest: float) -> str | None:
    """What to say about a mask with these extreme values; None if it is neither all 0 nor all 1."""
    if highest == 0:
        return (
            "the mask is entirely black: its clip is trained as if it had no mask, or not at all "
            "if train.loss.unmasked_weight is 0"
        )
    if lowest == 1:
        return (
            "the mask is entirely white (or transparent): its clip is trained as if it had no mask"
        )
    return None


def latent_mask(
    mask: Companion,
    *,
    fps: float,
    frames: int,
    size: tuple[int, int],
    spatial: int,
    temporal: int,
    variation: Variation | None = None,
) -> np.ndarray:
    """The loss mask per latent cell of a clip: float32 [1, F, h, w] from 0 to 1.

    `frames` (4n+1) at `fps` and `size` (width, height) are the clip's; `spatial` and `temporal` are
    the compression factors of the VAE. Latent frame 0 encodes pixel frame 0, and latent frame k the
    pixel frames 4k-3 to 4k. `variation` is the clip's. Raises DataError, which names the mask, if
    the file is damaged.
    """
    width, height = size
    # The crop of the clip's own frames, so that each cell covers the pixels that it encodes.
    fit = Fit(width, height) if variation is None else variation.fit(size)
    luma_frames = list(_luma_frames(mask, fps, frames, fit))
    if variation is not None:
        luma_frames = [variation.shaped(luma[..., None], size)[..., 0] for luma in luma_frames]
    h, w = height // spatial, width // spatial
    # Integers until the last division, so that the mean of white pixels is exactly 1.
    cell_sums = np.empty((len(luma_frames), h, w), np.int64)
    for sums, luma in zip(cell_sums, luma_frames, strict=True):
        luma.reshape(h, spatial, w, spatial).sum(axis=(1, 3), dtype=np.int64, out=sums)
    white = _WHITE * spatial**2
    first = cell_sums[:1] / white
    count = (frames - 1) // temporal
    if mask.is_image:
        rest = np.repeat(first, count, axis=0)
    else:
        rest = cell_sums[1:].reshape(count, temporal, h, w).sum(axis=1) / (white * temporal)
    return np.concatenate([first, rest])[None].astype(np.float32)


def pixel_mask(mask: Companion, *, fps: float, frames: int, fit: Fit) -> np.ndarray:
    """The loss mask per pixel of a clip: float32 [1, frames, H, W] from 0 to 1.

    For trainers that augment masks together with their clips before encoding. Raises DataError,
    which names the mask, if the file is damaged.
    """
    values = [luma.astype(np.float32) / _WHITE for luma in _luma_frames(mask, fps, frames, fit)]
    return np.stack(values * (frames // len(values)))[None]


def _luma_frames(mask: Companion, fps: float, frames: int, fit: Fit) -> Iterator[np.ndarray]:
    """Luma in thousandths, int32 [H, W], of each frame of a mask video, or of its one image."""
    # An image is read once and repeated by the callers, not read for each frame.
    times = [mask.start + k / fps for k in range(1 if mask.is_image else frames)]
    for rgb in read_frames(mask.path, times, fit):
        yield rgb @ _LUMA_WEIGHTS
