"""`benchmarks/sampling.py`, small: it samples both ways, and writes what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sampling


def test_a_preview_is_compared_with_a_full_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ["--width", "64", "--layers", "2", "--side", "32", "--frames", "5", "--steps", "10"]
    sampling.main([*size, "--repeats", "2", "--json", str(tmp_path / "result.json")])
    found = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert found["passes"] == {"full": 20, "distilled": 4}
    for part in ("denoising", "whole"):
        assert [len(found[part][kind]) for kind in sampling.KINDS] == [2, 2]
        assert 0 < found["ratio"][part] < 1
    assert "passes: 4 instead of 20: 0.200" in capsys.readouterr().out
