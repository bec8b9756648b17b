"""The contact sheet beside the cache shows the frames that are trained, without a second pass."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.runs import RunFile

from onewan.config.schema import ResolvedRun
from onewan.data import cached_latents
from onewan.data.cached_latents import CachedLatents
from onewan.data.clip import Clip
from onewan.data.contact_sheet import preview_frames, preview_indices
from onewan.data.dataset import Dataset
from onewan.data.decode import decode, frames_at
from onewan.data.encode import no_progress
from onewan.media import probe, write_video
from onewan.train.setup import WanModelSetup


def prepared(config: ResolvedRun) -> Dataset:
    return WanModelSetup(config).dataset([], no_progress)


def settings(folder: Path) -> list[str]:
    return [
        f"video_data.sources=[{{path: {(folder / 'clips').as_posix()}}}]",
        f"video_data.cache_dir={folder / 'cache'}",
        "video_data.min_resolution=[16, 16]",
    ]


def shown(clip: Clip) -> np.ndarray:
    """The frames that the sheet should show, from the decoded clip."""
    frames = decode(clip).frames
    return preview_frames([frames[index] for index in preview_indices(clip.frames)])


def assert_previews_are_right(data: Dataset) -> None:
    assert isinstance(data.source, CachedLatents)
    for clip in (*data.clips, *data.validation_clips):
        assert np.array_equal(data.source.preview(clip).frames, shown(clip)), clip.name


def numbered_video(path: Path, size: tuple[int, int]) -> None:
    """A video of 40 frames, each of which is as bright as its number says, with its caption."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = (6 * np.arange(40)).astype(np.uint8)[:, None, None, None]
    write_video(path, np.tile(levels, (1, size[1], size[0], 3)), 16)
    path.with_suffix(".txt").write_text("a gray area", encoding="utf-8")


def test_the_frames_of_a_sheet_are_those_that_are_trained(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[Path]()

    def watched(clip: Clip, times: Sequence[float]) -> np.ndarray:
        read.append(clip.path)
        return frames_at(clip, times)

    monkeypatch.setattr(cached_latents, "frames_at", watched)
    numbered_video(tmp_path / "clips" / "wide.mp4", (128, 64))
    numbered_video(tmp_path / "clips" / "tall.mp4", (64, 128))
    Image.new("RGB", (64, 64), "red").save(tmp_path / "clips" / "still.png")
    (tmp_path / "clips" / "still.txt").write_text("red", encoding="utf-8")
    config = run_file("t2v-a14b", *settings(tmp_path), "wan_config.max_frames=17")
    data = prepared(config)
    entries = sorted((tmp_path / "cache" / "preview").rglob("*.safetensors"))
    assert len(entries) == 3 and read == []  # taken while the clips were encoded
    assert_previews_are_right(data)
    assert isinstance(data.source, CachedLatents)
    for clip in data.clips:
        if clip.kind == "video":
            levels = data.source.preview(clip).frames.mean(axis=(1, 2, 3)) / 6
            numbers = np.rint(16 * clip.start) + np.array([0, 8, 16])
            assert levels == pytest.approx(numbers, abs=0.5)
    sheet = tmp_path / "cache" / "contact_sheet_run.jpg"
    assert str(sheet) in data.report.lines()[-1]
    before = sheet.read_bytes()

    # Of a cache that has no previews, or a damaged one: from the files, with the same frames.
    for entry in entries[:2]:
        entry.unlink()
    entries[2].write_bytes(entries[2].read_bytes()[:-1] + b"x")
    sheet.unlink()
    again = prepared(config)
    assert again.encoded == 0 and sheet.read_bytes() == before
    assert len(read) == 3
    assert_previews_are_right(again)


def test_masks_and_validation_clips_are_on_the_sheet(
    run_file: RunFile, workshop: Path, tmp_path: Path
) -> None:
    shutil.copytree(workshop / "clips", tmp_path / "clips")
    config = run_file("t2v-a14b", *settings(tmp_path), "validation.share=0.3")
    sheet = tmp_path / "cache" / "contact_sheet_run.jpg"
    assert len(prepared(config).validation_clips) == 2
    plain = np.asarray(Image.open(sheet)).astype(int)
    video = tmp_path / "clips" / "blue_circle.webm"
    Image.new("L", probe(video).shown_size, "black").save(video.with_suffix(".mask.png"))
    data = prepared(run_file("t2v-a14b", *settings(tmp_path), "video_data.masks=true"))
    assert len(data.clips) == 5
    assert_previews_are_right(data)
    masked = np.asarray(Image.open(sheet)).astype(int)
    # Red lies over the three frames of one clip.
    reddened = (masked[..., 0] - masked[..., 1]) - (plain[..., 0] - plain[..., 1]) > 40
    assert masked.shape == plain.shape and reddened.sum() > 3 * 170 * 170


def test_a_sheet_that_can_not_be_written_is_a_warning(run_file: RunFile, tmp_path: Path) -> None:
    numbered_video(tmp_path / "clips" / "wide.mp4", (128, 64))
    (tmp_path / "cache" / "contact_sheet_run.jpg").mkdir(parents=True)
    data = prepared(run_file("t2v-a14b", *settings(tmp_path)))
    assert len(data.clips) == 1
    assert any("the contact sheet can't be written: " in line for line in data.report.lines())


def test_real_clips_are_shown_as_they_are_trained(
    run_file: RunFile, clips: Path, tmp_path: Path
) -> None:
    for name in ("good", "odd"):
        shutil.copytree(clips / name, tmp_path / "clips" / name)
    data = prepared(
        run_file(
            "t2v-a14b",
            *settings(tmp_path),
            "video_data.supported_formats=[mp4, avi, mov, webm, mkv, gif]",
        )
    )
    assert len(data.clips) == 16
    assert_previews_are_right(data)
