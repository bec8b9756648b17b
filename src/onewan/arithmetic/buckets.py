"""Frames and size that a clip is trained at, which decide its bucket.

A run file may name an area in pixels; this module finds the width and height for it that suit the
clip's aspect ratio and that the model accepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

Size = tuple[int, int]
"""(width, height) in pixels."""

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


def parse_sizes(
    value: int | str | tuple[int | str, ...] | None,
) -> tuple[int | str, ...] | None:
    """One or several training sizes, each as an area in pixels or as "WxH"; ValueError if one is
    neither."""
    if value is None or isinstance(value, tuple):
        return None if value is None else tuple(map(_parse_size, value))
    return (_parse_size(value),)


def _parse_size(value: int | str) -> int | str:
    """`value` as an area in pixels or as "WxH"; ValueError when it is neither."""
    text = str(value).lower().replace(" ", "")
    width, cross, height = text.partition("x")
    if width.isdecimal() and int(width) and not cross:
        return int(width)
    if width.isdecimal() and height.isdecimal() and int(width) and int(height):
        return text
    raise ValueError(f"{value!r} is neither an area in pixels (399360) nor a size ('832x480')")


def size_error(size: int | str, multiple: int, max_resolution: Size) -> str | None:
    """An error message about a training size (an area in pixels, or "WxH"); None if it fits."""
    if isinstance(size, int):
        least = 2 * multiple
        why = f"is an area in pixels, and {size} is less than {least}x{least}"
        return None if size >= least**2 else f"{why}; for 480p write 399360 or '832x480'"
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


def _shape_error(size: Size, aspect: float) -> float:
    return abs(log(size[0] / size[1] / aspect))


def _within(size: Size, limit: Size) -> bool:
    width, height = size
    return (width <= limit[0] and height <= limit[1]) or (width <= limit[1] and height <= limit[0])


def _largest_area(aspect: float, limit: Size) -> float:
    """Area of the largest frame of this aspect ratio within `limit`, in either orientation."""
    ways = (limit, limit[::-1])
    return max(min(w, h * aspect) * min(h, w / aspect) for w, h in ways)
