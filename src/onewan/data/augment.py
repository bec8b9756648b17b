"""Augmentation of clips: variants of a clip that are encoded beside it, and what changes in them.

Latents are cached, so a clip has a fixed number of variants, and each pass through the data takes
the clip or one of them. What changes is drawn once per variant, by the seed and the content of the
file, and is the same for all frames. A loss mask is mirrored and cropped like its clip.
"""

from __future__ import annotations

import random
from dataclasses import astuple, dataclass
from math import ceil, cos, pi, sin

import numpy as np
from PIL import Image

from onewan.media import Fit
from onewan.seeds import derive_seed

AUGMENT_VERSION = 1
"""Incremented when the same variation gives other pixels, so that no older entry is used."""

_MIDDLE = 127.5
"""The level that contrast leaves alone: a fixed one, since the mean of a frame would flicker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variation:
    """What is different in one variant of a clip."""

    mirrored: bool = False
    kept: float = 1.0
    """Part of the width and of the height that is kept."""
    left: float = 0.5
    """Position of what is kept, from left (0) to right (1), before it is mirrored."""
    top: float = 0.5
    """From top (0) to bottom (1)."""
    brightness: float = 1.0
    """Factor of all levels."""
    contrast: float = 1.0
    """Factor of the distance to the middle gray."""
    saturation: float = 1.0
    """0 is gray."""
    hue: float = 0.0
    """Rotation of all colors, in turns."""

    @property
    def key(self) -> list[object]:
        """All that the pixels depend on, as JSON values."""
        return [AUGMENT_VERSION, *astuple(self)]

    def fit(self, size: tuple[int, int]) -> Fit:
        """At which size to read frames, for `shaped` to crop them to `size` (width, height)."""
        width, height = size
        return Fit(ceil(width / self.kept), ceil(height / self.kept))

    def shaped(self, frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """`frames` [..., H, W, C] that were read at `fit`, cropped and mirrored: a view."""
        width, height = size
        left = round((frames.shape[-2] - width) * self.left)
        top = round((frames.shape[-3] - height) * self.top)
        shaped = frames[..., top : top + height, left : left + width, :]
        return shaped[..., ::-1, :] if self.mirrored else shaped

    def applied(self, frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """`shaped` RGB uint8 frames [F, H, W, 3] with their colors changed; contiguous."""
        shaped = np.ascontiguousarray(self.shaped(frames, size))
        if (self.brightness, self.contrast, self.saturation, self.hue) == (1.0, 1.0, 1.0, 0.0):
            return shaped
        matrix = tuple(self._color_matrix().flatten().tolist())
        return np.stack(
            [np.asarray(Image.fromarray(frame).convert("RGB", matrix)) for frame in shaped]
        )

    def _color_matrix(self) -> np.ndarray:
        """[3, 4]: what R, G, B and 1 contribute to the new R, G and B."""
        factor = self.brightness * self.contrast
        matrix = _hue_rotation(self.hue) @ _saturation(self.saturation) * factor
        # Gray stays gray under the two matrices, so the offset of the contrast can come last.
        return np.hstack([matrix, np.full((3, 1), _MIDDLE * (1 - self.contrast))])


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """How far the variants of clips may differ from their clips."""

    flip: float
    """Probability that a variant is mirrored."""
    crop: float
    """Largest part of width and height that is cropped away, below 1."""
    brightness: float
    """Largest relative change."""
    contrast: float
    saturation: float
    hue: float
    """Largest rotation in either direction, in turns."""
    variants: int
    """Number of variants of each clip."""

    def variations(self, seed: int, content: str) -> tuple[Variation, ...]:
        """Those of a file with this digest of its content; none that changes nothing."""
        found = [self._drawn(seed, content, index) for index in range(self.variants)]
        return tuple(each for each in dict.fromkeys(found) if each != Variation())

    def _drawn(self, seed: int, content: str, index: int) -> Variation:
        draw = random.Random(derive_seed(seed, "augment", content, index))
        # All are drawn in any case, so that one setting does not change what others give.
        mirrored, crop, left, top, *colors = (draw.random() for _ in range(8))

        def around(center: float, share: float, limit: float) -> float:
            return center + (2 * share - 1) * limit

        return Variation(
            mirrored=mirrored < self.flip,
            kept=1 - crop * self.crop,
            left=left if self.crop else 0.5,
            top=top if self.crop else 0.5,
            brightness=around(1.0, colors[0], self.brightness),
            contrast=around(1.0, colors[1], self.contrast),
            saturation=around(1.0, colors[2], self.saturation),
            hue=around(0.0, colors[3], self.hue),
        )


# The matrices of the operations saturate and hueRotate in the W3C's Filter Effects Module Level 1,
# section feColorMatrix.
_LUMA = np.array([0.213, 0.715, 0.072])
_HUE_COS = np.eye(3) - _LUMA
_HUE_SIN = np.array([[-0.213, -0.715, 0.928], [0.143, 0.140, -0.283], [-0.787, 0.715, 0.072]])


def _saturation(factor: float) -> np.ndarray:
    return np.tile(_LUMA, (3, 1)) * (1 - factor) + np.eye(3) * factor


def _hue_rotation(turns: float) -> np.ndarray:
    angle = 2 * pi * turns
    return np.tile(_LUMA, (3, 1)) + cos(angle) * _HUE_COS + sin(angle) * _HUE_SIN
