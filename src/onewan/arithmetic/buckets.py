"""Which frames and sizes a clip trains at. Pure arithmetic: no files, no torch, no randomness.

Hides how a training size given as an area becomes sides that the model takes. Never crops or scales
anything; it only says to what.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

Size = tuple[int, int]
"""(width, height) in pixels."""

# An area may be exceeded by this much, so that 480p (399360) allows 848x480 for 16:9.
_AREA_EXCESS = 1.05

# Shapes whose logarithms differ by less count as the same: rounding sides to multiples moves them
# by about as much, and should not decide between two areas.
_SAME_SHAPE = 0.05


def floor_to_4n_plus_1(n: int, temporal: int = 4) -> int:
    """The largest number of frames ``temporal * k + 1 <= n`` that the VAE takes; `n` at least 1."""
    if n < 1:
        raise ValueError(f"a clip has at least one frame, not {n}")
    return (n - 1) // temporal * temporal + 1


def sizes_for(
    resolution: int | str, aspect: float, multiple: int, max_resolution: Size
) -> tuple[Size, ...]:
    """The sizes that one entry of `video_data.resolution` allows for a clip, best first.

    An exact size ("832x480") is the only one of its own. For an area in pixels: sides are multiples
    of `multiple`, the area is close to the one given and at most 1.05 times it (or the smallest
    there is), and both sides lie within `max_resolution`, either way up. Best is what changes the
    clip's shape (`aspect`, width over height) least; half as much counts what is lost in area.
    """
    if isinstance(resolution, str):
        width, _, height = resolution.partition("x")
        return ((int(width), int(height)),)
    area = min(float(resolution), _largest_area(aspect, max_resolution))
    sizes: set[Size] = set()
    for side in range(multiple, max(max_resolution) + 1, multiple):
        down = int(area / side + 1e-6) // multiple * multiple  # 1e-6: float rounding
        for other in (down, down + multiple):
            small_enough = side * other <= _AREA_EXCESS * resolution
            if other and small_enough and _within((side, other), max_resolution):
                sizes |= {(side, other), (other, side)}
    if not sizes:
        sizes.add((multiple, multiple))

    def cost(size: Size) -> tuple[float, Size]:
        width, height = size
        return _shape_error(size, aspect) + abs(log(width * height / area)) / 2, size

    return tuple(sorted(sizes, key=cost))


def choose_size(
    width: int,
    height: int,
    resolutions: Sequence[int | str],
    multiple: int,
    max_resolution: Size,
) -> Size:
    """The training size for a clip of `width` x `height` (shown size, square pixels).

    Among several entries: those that need no upscaling, then the nearest shape, then the largest;
    where all need upscaling, the nearest shape and then the smallest, which needs the least.
    """
    aspect = width / height
    best = [sizes_for(entry, aspect, multiple, max_resolution)[0] for entry in resolutions]
    enough = [size for size in best if size[0] <= width and size[1] <= height]
    candidates = enough or best
    nearest = min(_shape_error(size, aspect) for size in candidates)
    same = [s for s in candidates if _shape_error(s, aspect) <= nearest + _SAME_SHAPE]
    return (max if enough else min)(same, key=lambda size: (size[0] * size[1], size))


def _shape_error(size: Size, aspect: float) -> float:
    return abs(log(size[0] / size[1] / aspect))


def _within(size: Size, limit: Size) -> bool:
    width, height = size
    return (width <= limit[0] and height <= limit[1]) or (width <= limit[1] and height <= limit[0])


def _largest_area(aspect: float, limit: Size) -> float:
    """Area of the largest picture of this shape within `limit`, either way up."""
    ways = (limit, limit[::-1])
    return max(min(w, h * aspect) * min(h, w / aspect) for w, h in ways)
