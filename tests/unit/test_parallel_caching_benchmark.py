"""The benchmark of filling a cache with several processes."""

from __future__ import annotations

from pathlib import Path

import parallel_caching
import pytest
from figures import read_figure


@pytest.mark.long
def test_it_compares_the_caches_and_both_times(tmp_path: Path) -> None:
    file = tmp_path / "figure.json"
    # A missed limit, which so few clips may well have, is status 1.
    arguments = ["--clips", "3", "--size", "1x64x64", "--repeats", "1", "--json", str(file)]
    assert parallel_caching.main(arguments) in {0, 1}
    found = {(v.measure, v.case["processes"]): v.median for v in read_figure(file).values}
    for measure in ("time", "busiest process"):
        one, two = (found[measure, count] for count in (1, 2))
        assert found[f"speed by {measure}", 2] == pytest.approx(one / two, rel=1e-3)


def test_caches_that_differ_are_no_result(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "video" / "ab").mkdir(parents=True)
        (tmp_path / name / "video" / "ab" / "abc.safetensors").write_bytes(b"latents")
    caches = tmp_path / "one", tmp_path / "two"
    once = {"entries": ["video abc"], "encoded": 1}
    parallel_caching.compare(*caches, [[once]])
    with pytest.raises(RuntimeError, match="made twice"):
        parallel_caching.compare(*caches, [[once, once]])
    with pytest.raises(RuntimeError, match="count other entries"):
        parallel_caching.compare(*caches, [[{**once, "encoded": 2}]])
    (caches[1] / "video" / "ab" / "abc.safetensors").write_bytes(b"others")
    with pytest.raises(RuntimeError, match="content"):
        parallel_caching.compare(*caches, [[once]])
