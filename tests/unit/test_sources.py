"""Each kind of source becomes the clips that it names, and says what of it can't be used."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from support.clips import planner

from onewan.data.clip import Clip, ClipSource
from onewan.data.index import index_clips
from onewan.data.report import DatasetReport
from onewan.data.sources.names import Patterns, fits
from onewan.media import write_video


def video(path: Path, caption: str | None = "a test", seconds: float = 0.5) -> Path:
    """A small video of 16 frames per second, with its caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.full((round(16 * seconds), 64, 96, 3), 90, np.uint8)
    write_video(path, frames, 16)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def index(path: Path, **settings: object) -> DatasetReport:
    """The clips of one source, with `settings` of it."""
    source = ClipSource(path=path, **settings)  # pyright: ignore[reportArgumentType]
    return index_clips([source], planner(), use_masks=False)


def names(report: DatasetReport) -> list[str]:
    return [clip.name for clip in report.clips]


def only(report: DatasetReport) -> Clip:
    assert not report.problems
    (clip,) = report.clips
    return clip


# --- Folders -------------------------------------------------------------------------------------


def test_a_folder_is_read_without_its_subfolders_if_that_is_wanted(tmp_path: Path) -> None:
    for name in ("a.mp4", "sub/b.mp4"):
        video(tmp_path / name)
    assert names(index(tmp_path)) == ["a.mp4", "sub/b.mp4"]
    assert names(index(tmp_path, recursive=False)) == ["a.mp4"]


def test_patterns_choose_files_and_what_they_leave_out_is_counted(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.webm", "cats/c.mp4", "cats/drafts/d.mp4"):
        video(tmp_path / name)
    chosen = index(tmp_path, patterns=Patterns(include=["*.mp4"], exclude=["drafts", "x*"]))
    assert names(chosen) == ["a.mp4", "cats/c.mp4"]
    assert [warning.text for warning in chosen.warnings if warning.path is None] == [
        f"2 of 4 files in {tmp_path} are left out by include / exclude",
        f"the pattern x* fits no file in {tmp_path}",
    ]
    # The captions of files that are left out on purpose are not stray ones.
    assert not any("caption" in warning.text for warning in chosen.warnings)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("*.mp4", "sub/a.mp4", True),
        ("*.mp4", "a.MP4", False),
        ("sub/*.mp4", "sub/a.mp4", True),
        ("sub/*.mp4", "other/sub/a.mp4", False),
        ("**/sub/*.mp4", "other/sub/a.mp4", True),
        ("**/*.mp4", "a.mp4", True),
        ("drafts/", "x/drafts/y/a.mp4", True),
        ("./sub", "sub/a.mp4", True),
        (unicodedata.normalize("NFD", "é*"), "é.mp4", True),
    ],
)
def test_what_a_pattern_fits(pattern: str, name: str, expected: bool) -> None:
    assert fits(pattern, name) is expected


def test_a_caption_in_the_other_unicode_normalization_belongs_to_its_clip(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "été") for form in ("NFC", "NFD"))
    video(tmp_path / f"{decomposed}.mp4", caption=None)
    (tmp_path / f"{composed}.txt").write_text("summer", encoding="utf-8")
    found = only(index(tmp_path))
    assert (found.captions, found.name) == (("summer",), f"{decomposed}.mp4")
