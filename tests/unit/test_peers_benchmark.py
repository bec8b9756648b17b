"""`benchmarks/peers_data.py`: frames are checked by their numbers, and what is missed is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from decode import make_clip, numbers_of
from peers_data import Measured, figure_of, misses, results_of, right_frames
from peers_readers import Reader, Request, bare_pyav, onewan
from tables import tables_of

ROW = "17 frames from five short clips"


@pytest.mark.parametrize("reader", [onewan, bare_pyav])
@pytest.mark.parametrize("place", ["head", "middle"])
def test_readers_return_the_frames_that_are_asked_for(
    tmp_path: Path, reader: Reader, place: str
) -> None:
    path = tmp_path / "clip.mp4"
    make_clip(path, 3, 24, fps=50, size=(320, 192), numbered=True)
    request = Request(path, 17, "head" if place == "head" else "middle", (208, 96), 50)
    frames = reader(request)
    assert frames.shape == (17, 96, 208, 3)
    numbers = numbers_of(frames)
    assert numbers == [round(time * 50 - 1e-6) for time in request.times()]
    assert right_frames(numbers, 50) == 17
    assert numbers[0] == (0 if place == "head" else 49)


def test_wrong_frames_are_counted() -> None:
    at_25 = [int(np.floor(k * 25 / 16 + 0.5)) for k in range(17)]
    assert right_frames(at_25, 25) == 17
    assert right_frames([number + 100 for number in at_25], 25) == 17
    assert right_frames(list(range(17)), 25) == 2  # the rate of the file taken for 16
    assert right_frames([*at_25[:8], at_25[8] + 1, *at_25[9:]], 25) == 16


def test_slower_and_wrong_readings_are_misses() -> None:
    ours = [Measured(1.0, 2.0, right=85, frames=85)]
    fast = [Measured(0.5, 0.6, right=9, frames=85, first=3.5)]
    assert misses({ROW: {"onewan": ours, "bare PyAV loop": fast, "other": "failed: why"}}) == []
    assert misses({ROW: {"onewan": ours, "other": fast}}) == [f"{ROW}: other takes less CPU time"]
    assert misses({ROW: {"onewan": fast}}) == [f"{ROW}: onewan has {fast}"]


def test_trainers_that_did_not_run_have_no_numbers() -> None:
    ours = [Measured(seconds, 2.0, right=85, frames=85) for seconds in (1.0, 3.0, 2.0)]
    fast = [Measured(0.5, 0.6, right=9, frames=85, first=3.5)]
    results = {"onewan": ours, "other": fast, "third": "failed: why", "fourth": results_of(())}
    (table,) = tables_of(figure_of({ROW: results}))
    lines = table.markdown().splitlines()
    assert lines[2:] == [
        f"| {ROW} | onewan | 2.00 (1.00 to 3.00) | - | 2.00 (2.00 to 2.00) | 85 | 85 | 0 |",
        f"| {ROW} | other | 0.50 | 0.25 | 0.60 | 9.00 | 85 | 3.50 |",
        f"| {ROW} | third | failed: why | - | - | - | - | - |",
        f"| {ROW} | fourth | not run | - | - | - | - | - |",
    ]
    assert results_of([*ours, "killed"]) == "killed"
