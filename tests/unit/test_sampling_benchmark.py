"""`benchmarks/sampling.py`, small: it samples both ways, and writes what it measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import sampling
from figures import read_figure


def test_a_preview_is_compared_with_a_full_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ["--width", "64", "--layers", "2", "--side", "32", "--frames", "5", "--steps", "10"]
    sampling.main([*size, "--repeats", "2", "--json", str(tmp_path / "result.json")])
    figure = read_figure(tmp_path / "result.json")
    assert "4 instead of 20" in figure.measured
    for part in ("denoising", "whole sample"):
        full, distilled = (value for value in figure.values if value.case["part"] == part)
        assert len(full.repeats) == len(distilled.repeats) == 2
        assert distilled.ratio is not None and 0 < distilled.ratio < 1
    assert "passes: 4 instead of 20: 0.200" in capsys.readouterr().out
