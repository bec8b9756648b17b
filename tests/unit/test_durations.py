"""Durations as text."""

from __future__ import annotations

import pytest

from onewan.arithmetic.durations import format_duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.000027, "0.027 ms"),
        (0.0058, "5.8 ms"),
        (0.00996, "0.01 s"),
        (0.5612, "0.56 s"),
        (9.96, "10 s"),
        (99, "99 s"),
        (100, "2 min"),
        (3569, "59 min"),
        (3571, "1 h"),
        (7500, "2 h 5 min"),
        (47.9 * 3600, "47 h 54 min"),
        (76.4 * 3600, "3 days 4 h"),
        (71.7 * 3600, "3 days"),
    ],
)
def test_a_duration_is_said_in_its_two_largest_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
