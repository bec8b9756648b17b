"""Frames and size that a clip is trained at, which decide its bucket.

A run file may name an area in pixels; this module finds the width and height for it that suit the
clip's aspect ratio and that the model accepts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import ceil, log
from typing import cast

Size = tuple[int, int]
"""(width, height) in pixels."""

LARGEST_SIDE = 2048
"""Up to here a number is a side in pixels, and above it an area."""
SMALLEST_SIDE = 64
"""Of a square that is given by one number, so that no area is as small as a side."""
_EXAMPLES = "480p, 512 (the area of 512x512) or '832x480'"

# An area may be exceeded by this factor, so that 480p (399360) allows 848x480 for 16:9.
_AREA_EXCESS = 1.05

# Aspect ratios whose logarithms differ by less are taken as equal: rounding the sides to multiples
# changes them by about as much, and must not decide between two areas.
_SAME_SHAPE = 0.05


def floor_to_4n_plus_1(n: int, temporal: int = 4) -> int:
    """The largest frame count <= n of the form that the VAE requires, temporal * k + 1.

    ValueError if n < 1.
    """
    if n < 1:
        raise ValueError(f"a clip has at least one frame, not {n}")
    return (n - 1) // temporal * temporal + 1


def parse_sizes(value: object) -> tuple[int | str, ...] | None:
    """The training sizes that a run file gives, each as an area in pixels, as "WxH", or as a name
    such as "480p"; None for None. ValueError if one is nothing of these.

    A number of up to `LARGEST_SIDE` is the side of a square whose area is meant, and a larger one
    an area. A list of exactly two numbers of up to `LARGEST_SIDE` is one size, width and height;
    any other list has several entries, in which such a pair may stand too.
    """
    if value is None:
        return None
    if pair := _pair(value):
        return (pair,)
    if not isinstance(value, (list, tuple)):
        return (_parse_size(value),)
    items = cast("Sequence[object]", value)
    if not items:
        raise ValueError(f"has no size, got []; write {_EXAMPLES}, or leave it out for 480p")
    return tuple(_pair(item) or _parse_size(item) for item in items)


def _pair(value: object) -> str | None:
    """ "WxH" for a list of two sides; None for anything else."""
    if not isinstance(value, (list, tuple)):
        return None
    sides = cast("Sequence[object]", value)
    if len(sides) != 2 or not all(type(side) is int and 0 < side <= LARGEST_SIDE for side in sides):
        return None
    return f"{sides[0]}x{sides[1]}"


def _parse_size(value: object) -> int | str:
    """One entry as an area in pixels, as "WxH" or as a name; ValueError if it is none of them."""
    text = str(value).lower().replace(" ", "")
    if isinstance(value, str | int) and not isinstance(value, bool):
        if re.fullmatch("[0-9]{1,9}", text):
            number = int(text)
            if SMALLEST_SIDE <= number <= LARGEST_SIDE:
                return number**2
            if number >= SMALLEST_SIDE**2:
                return number
        elif re.fullmatch("[1-9][0-9]{0,4}(x[1-9][0-9]{0,4}|p)", text):
            return text
    shown = repr(value) if isinstance(value, str) else str(value).lower()
    raise ValueError(
        f"{shown} is neither a side ({SMALLEST_SIDE} to {LARGEST_SIDE}), an area in pixels (from "
        f"{SMALLEST_SIDE**2}) nor a size; write {_EXAMPLES}"
    )


def size_error(
    size: int | str, multiple: int, max_resolution: Size, named: Mapping[str, int]
) -> str | None:
    """An error message about a training size of `parse_sizes`; None if it fits. `named` are the
    areas that have names."""
    if isinstance(size, int) or size in named:
        return None
    if size.endswith("p"):
        rule = f"must be {' or '.join(named)} if it is a name"
        return f"{rule}, got {size!r}; write a size such as '832x480' instead"
    sides = [int(side) for side in size.split("x")]
    nearest = [max(multiple, round(side / multiple) * multiple) for side in sides]
    if sides != nearest:
        remedy = f"the nearest is '{nearest[0]}x{nearest[1]}'"
        return f"sides must be multiples of {multiple}, got {size!r}; {remedy}"
    if max(sides) > max(max_resolution) or min(sides) > min(max_resolution):
        limit = f"video_data.max_resolution {[*max_resolution]}"
        return f"must fit into {limit}, got {size!r}; raise that, or choose a smaller size"
    return None


def sizes_for(
    resolution: int | str, aspect: float, multiple: int, max_resolution: Size
) -> tuple[Size, ...]:
    """The sizes that one entry of `video_data.resolution` allows for a clip, best first.

    An exact size ("832x480") allows only itself. For an area in pixels, the sides are multiples of
    `multiple`, the area is at most 1.05 times the given one (or the smallest possible), and both
    sides are within `max_resolution` in either orientation. The best size has the smallest change
    of aspect ratio (`aspect`, width over height) plus half the loss of area, both as logarithms.
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
    if not sizes:  # the area is smaller than a single multiple squared
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
    """The training size for a clip of `width` x `height` (display size, square pixels).

    Of several entries, those that need no upscaling are preferred, then the nearest aspect ratio,
    then the largest size; if all need upscaling, the nearest aspect ratio, then the smallest size.
    """
    aspect = width / height
    best = [sizes_for(entry, aspect, multiple, max_resolution)[0] for entry in resolutions]
    enough = [size for size in best if size[0] <= width and size[1] <= height]
    candidates = enough or best
    nearest = min(_shape_error(size, aspect) for size in candidates)
    same = [s for s in candidates if _shape_error(s, aspect) <= nearest + _SAME_SHAPE]
    # The size breaks ties of areas, so that the order of the run file does not matter.
    return (max if enough else min)(same, key=lambda size: (size[0] * size[1], size))


def size_without_limit(
    width: int,
    height: int,
    resolutions: Sequence[int | str],
    multiple: int,
    max_resolution: Size,
) -> Size | None:
    """The training size that `choose_size` would choose if `max_resolution` were no limit; None if
    it is none for this clip."""
    aspect = width / height
    areas = [entry for entry in resolutions if isinstance(entry, int)]
    if not areas or max(areas) <= _largest_area(aspect, max_resolution):
        return None
    longest = ceil((_AREA_EXCESS * max(areas) * max(aspect, 1 / aspect)) ** 0.5) + multiple
    size = choose_size(width, height, resolutions, multiple, (longest, longest))
    limited = choose_size(width, height, resolutions, multiple, max_resolution)
    return size if size[0] * size[1] > limited[0] * limited[1] else None


def _shape_error(size: Size, aspect: float) -> float:
    return abs(log(size[0] / size[1] / aspect))


def _within(size: Size, limit: Size) -> bool:
    width, height = size
    return (width <= limit[0] and height <= limit[1]) or (width <= limit[1] and height <= limit[0])


def _largest_area(aspect: float, limit: Size) -> float:
    """Area of the largest frame of this aspect ratio within `limit`, in either orientation."""
    ways = (limit, limit[::-1])
    return max(min(w, h * aspect) * min(h, w / aspect) for w, h in ways)
