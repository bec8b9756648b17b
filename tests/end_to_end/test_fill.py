"""Filling the cache: the same bytes with any number of workers, and after whatever goes wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.runs import RunFile

from onewan.data.dataset import Dataset
from onewan.data.encode import no_progress
from onewan.train.setup import WanModelSetup


def settings(folder: Path, cache: str) -> list[str]:
    return [
        f"video_data.sources=[{{path: {(folder / 'clips').as_posix()}}}]",
        f"video_data.cache_dir={folder / cache}",
        "video_data.min_resolution=[1,1]",
    ]


@pytest.fixture
def own(workshop: Path, tmp_path: Path) -> Path:
    """A folder with a copy of the clips, which the test may change."""
    shutil.copytree(workshop / "clips", tmp_path / "clips")
    return tmp_path


def filled(run_file: RunFile, folder: Path, cache: str, *overrides: str) -> Dataset:
    config = run_file("t2v-a14b", *settings(folder, cache), *overrides)
    return WanModelSetup(config).dataset([], no_progress)


def entries(cache: Path) -> dict[str, bytes]:
    """The content of all entries by their place in the cache."""
    return {
        path.relative_to(cache).as_posix(): path.read_bytes()
        for path in sorted(cache.rglob("*.safetensors"))
    }


@pytest.mark.parametrize("workers", ["1", "4", "auto"])
def test_entries_and_report_are_the_same_with_any_number_of_workers(
    run_file: RunFile, own: Path, clips: Path, workers: str
) -> None:
    for file in [*(clips / "bad").iterdir(), *(clips / "good").iterdir()]:
        shutil.copy(file, own / "clips" / file.name)
    for name in ("truncated", "again"):  # copies, which fail one by one
        shutil.copy(clips / "bad" / "corrupt_middle.mp4", own / "clips" / f"{name}.mp4")
        (own / "clips" / f"{name}.txt").write_text(name, encoding="utf-8")
    in_turn = filled(run_file, own, "in_turn", "video_data.workers=0")
    ahead = filled(run_file, own, "ahead", f"video_data.workers={workers}")
    assert entries(own / "ahead") == entries(own / "in_turn")
    assert ahead.report.problems == in_turn.report.problems
    assert {p.path.name for p in ahead.report.problems} >= {"truncated.mp4", "again.mp4"}
    assert ahead.report.warnings == in_turn.report.warnings
    assert ahead.digest == in_turn.digest and ahead.encoded == in_turn.encoded > 20


def test_another_precision_of_the_vae_encodes_the_clips_again_and_only_them(
    run_file: RunFile, own: Path
) -> None:
    exact = filled(run_file, own, "cache")
    rounded = filled(run_file, own, "cache", "video_data.vae_dtype=bfloat16")
    assert rounded.encoded == len(rounded.clips) == 5
    for clip in rounded.clips:
        a, b = exact.source.video(clip)["latents"], rounded.source.video(clip)["latents"]
        assert a.dtype == b.dtype == torch.float32
        assert 0 < float((a - b).norm() / a.norm()) < 2e-2
    assert filled(run_file, own, "cache").encoded == 0
    online = filled(
        run_file, own, "cache", "video_data.vae_dtype=bfloat16", "video_data.cache=false"
    )
    for clip in online.clips:
        expected = rounded.source.video(clip)["latents"]
        assert torch.equal(online.source.video(clip)["latents"], expected)
