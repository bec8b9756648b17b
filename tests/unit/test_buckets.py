"""The arithmetic of training sizes: properties that hold for any clip and any setting."""

from __future__ import annotations

from math import log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onewan.arithmetic.buckets import choose_size, floor_to_4n_plus_1, sizes_for

sides = st.integers(64, 4096)
multiples = st.sampled_from([16, 32])
areas = st.integers(64 * 64, 1280 * 720)


@given(st.integers(1, 10_000), st.integers(1, 8))
def test_frames_down_is_the_largest_that_fits(n: int, temporal: int) -> None:
    frames = floor_to_4n_plus_1(n, temporal)
    assert frames <= n < frames + temporal
    assert frames % temporal == 1 % temporal


def test_frames_down_of_the_documented_default() -> None:
    assert [floor_to_4n_plus_1(n) for n in (1, 4, 5, 16, 81, 83)] == [1, 1, 5, 13, 81, 81]
    with pytest.raises(ValueError, match="at least one"):
        floor_to_4n_plus_1(0)


@given(sides, sides, areas, multiples, st.tuples(st.integers(256, 1536), st.integers(256, 1536)))
def test_a_size_keeps_the_promises(
    width: int, height: int, area: int, multiple: int, limit: tuple[int, int]
) -> None:
    chosen = choose_size(width, height, [area], multiple, limit)
    assert all(side % multiple == 0 and side >= multiple for side in chosen)
    assert chosen[0] * chosen[1] <= 1.05 * area
    assert sorted(chosen) <= sorted(limit)
    assert max(chosen) <= max(limit)
    assert min(chosen) <= min(limit)


@given(st.floats(0.5, 2.0), st.integers(256 * 256, 1024 * 1024), multiples)
def test_a_common_shape_is_kept_and_the_area_met(aspect: float, area: int, multiple: int) -> None:
    width, height = sizes_for(area, aspect, multiple, (4096, 4096))[0]
    assert abs(log(width / height / aspect)) < 1.5 * multiple / min(width, height)
    assert 0.85 * area <= width * height <= 1.05 * area


@given(sides, sides, areas, multiples)
def test_a_turned_clip_has_the_turned_sizes(
    width: int, height: int, area: int, multiple: int
) -> None:
    upright = sizes_for(area, width / height, multiple, (1024, 640))
    turned = sizes_for(area, height / width, multiple, (1024, 640))
    assert {size[::-1] for size in upright} == set(turned)


@given(st.integers(4, 64), st.integers(4, 64), multiples)
def test_a_clip_that_has_the_area_keeps_its_size(columns: int, rows: int, multiple: int) -> None:
    size = columns * multiple, rows * multiple
    assert choose_size(*size, [size[0] * size[1]], multiple, (2048, 2048)) == size


@given(sides, sides, multiples)
def test_an_exact_size_is_itself(width: int, height: int, multiple: int) -> None:
    assert choose_size(width, height, ["832x480"], multiple, (1024, 1024)) == (832, 480)


def test_known_sizes() -> None:
    area = 480 * 832
    assert choose_size(1920, 1080, [area], 16, (1024, 1024)) == (848, 480)
    assert choose_size(1080, 1920, [area], 16, (1024, 1024)) == (480, 848)
    assert choose_size(832, 480, [area], 16, (1024, 1024)) == (832, 480)
    assert choose_size(1000, 1000, [area], 32, (1024, 1024)) == (640, 640)
    # More than the largest size allows: its area shrinks, its shape stays.
    assert choose_size(1920, 1080, [1280 * 720], 16, (1024, 1024)) == (1024, 576)
    assert choose_size(1080, 1920, [1280 * 720], 16, (1280, 720)) == (720, 1280)


def test_choice_among_several() -> None:
    limit = (1280, 1280)
    # No upscaling comes first, then the shape, then the size.
    assert choose_size(700, 400, ["832x480", "480x832", "416x240"], 16, limit) == (416, 240)
    assert choose_size(1920, 1080, ["832x480", "480x832", "416x240"], 16, limit) == (832, 480)
    assert choose_size(1080, 1920, ["832x480", "480x832", "416x240"], 16, limit) == (480, 832)
    # Shapes that differ by rounding only do not decide.
    assert choose_size(1920, 1080, [256 * 256, 480 * 832], 16, limit) == (848, 480)
    # All too large: what needs the least upscaling.
    assert choose_size(200, 120, ["832x480", "416x240"], 16, limit) == (416, 240)
