"""What the pixels of a clip show: black frames, a picture that stands still, black bars; and a hash
that is nearly the same for clips that look nearly the same.

Works on small frames: a few hundred pixels a side show all of it, and take a hundredth of the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image

from onewan.media.contact_sheet import preview_indices

_BLACK = 26
"""Luma, of 255, up to which a pixel counts as black: 16 to 235 read as full range, with noise."""
_BLACK_SHARE = 0.995
"""Of the pixels of a black frame."""
_NOTED_BLACK = 0.1
"""Share of black frames from which on they are mentioned; a clip may fade in."""
_CHANGED = 8
"""Levels of 255 by which a pixel differs that has changed; compression changes less."""
_STILL_SHARE = 5e-4
"""Of the pixels of two frames that may have changed although nothing moves."""
_NOTED_STILL = 0.5
"""Share of frames that equal the one before from which on they are mentioned."""
_NOTED_BAR = 0.02
"""Share of the height or width from which on black bars are mentioned."""
_FLAT = 4.0
"""Standard deviation of the luma below which a frame has nothing to tell it from others."""
_HASH_SIDE = 8
HASH_BITS = _HASH_SIDE * _HASH_SIDE
"""Bits of the hash of one frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelFacts:
    """What was found in the frames of one clip."""

    frames: int
    black_frames: int
    still_pairs: int
    """Number of frames in which nothing has changed since the frame before."""
    bars: tuple[float, float, float, float]
    """Share of the height or width that is black in all frames: top, bottom, left, right. 0 where
    the opposite side has no bar, since a dark scene is often black at one side."""
    hash: bytes | None
    """Difference hashes of the first, the middle and the last frame, or of an image; None if one of
    them is too flat."""

    def notes(self) -> Iterator[tuple[str, str]]:
        """(kind, text) of each thing that the user should know."""
        if self.black_frames == self.frames:
            yield "near black", "is black, or nearly so, all the time; take it out"
            return
        if self.black_frames >= _NOTED_BLACK * self.frames:
            text = f"{self.black_frames} of its {self.frames} frames are black; cut them off"
            yield "near black", text
        if self.frames > 1 and self.still_pairs == self.frames - 1:
            yield (
                "frozen",
                "nothing moves in it, which teaches the model to stand still; train on it as an "
                "image, or take it out",
            )
        elif self.still_pairs >= _NOTED_STILL * (self.frames - 1) > 0:
            text = f"{self.still_pairs} of its {self.frames} frames are as the one before"
            yield "frozen", text
        top, bottom, left, right = (f"{100 * bar:.0f} %" for bar in self.bars)
        remedy = "crop them, since the model learns them too"
        if self.bars[0]:
            yield "letterboxed", f"has black bars at top ({top}) and bottom ({bottom}); {remedy}"
        if self.bars[2]:
            yield "letterboxed", f"has black bars left ({left}) and right ({right}); {remedy}"


def look_at_pixels(frames: np.ndarray) -> PixelFacts:
    """The facts about `frames`, uint8 RGB [F, H, W, 3]."""
    luma = np.stack([np.asarray(Image.fromarray(frame).convert("L")) for frame in frames])
    dark = luma <= _BLACK
    black = dark.mean(axis=(1, 2)) >= _BLACK_SHARE
    hashes = [_difference_hash(luma[index]) for index in preview_indices(len(luma))]
    return PixelFacts(
        frames=len(frames),
        black_frames=int(black.sum()),
        still_pairs=sum(_is_still(a, b) for a, b in pairwise(luma)),
        bars=_bars(dark),
        hash=None if None in hashes else b"".join(filter(None, hashes)),
    )


def _is_still(before: np.ndarray, after: np.ndarray) -> bool:
    # Without overflow: the difference of two uint8 is an int16.
    changed = np.abs(before.astype(np.int16) - after) > _CHANGED
    return bool(changed.mean() <= _STILL_SHARE)


def _bars(dark: np.ndarray) -> tuple[float, float, float, float]:
    """See `PixelFacts.bars`; `dark` is [F, H, W]."""
    always = dark.mean(axis=0)  # for how much of the time each pixel is dark
    rows = always.mean(axis=1) >= _BLACK_SHARE
    columns = always.mean(axis=0) >= _BLACK_SHARE
    if rows.all():
        return 0.0, 0.0, 0.0, 0.0

    def pair(line: np.ndarray) -> tuple[float, float]:
        first = float(line.argmin()) / len(line)
        last = float(line[::-1].argmin()) / len(line)
        return (first, last) if min(first, last) >= _NOTED_BAR else (0.0, 0.0)

    return (*pair(rows), *pair(columns))


def _difference_hash(luma: np.ndarray) -> bytes | None:
    """Whether each cell of a coarse grid is brighter than its left neighbor: `HASH_BITS` bits."""
    small = Image.fromarray(luma).resize((_HASH_SIDE + 1, _HASH_SIDE), Image.Resampling.BOX)
    grid = np.asarray(small, np.int16)
    if grid.std() < _FLAT:
        return None
    return np.packbits(grid[:, 1:] > grid[:, :-1]).tobytes()
