"""Which spans of a video are its clips, what they are called, and how often they are trained."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onewan.data.clip import Clip, ClipSource, alternatives, count_clips
from onewan.data.clip_notes import taken, used_seconds
from onewan.data.decode import decode
from onewan.data.found_cuts import FoundCuts
from onewan.data.index import index_clips
from onewan.data.report import DatasetReport
from onewan.data.sources.copies import Copies
from onewan.data.validation_split import split_validation_clips
from onewan.errors import DataError
from onewan.media import write_video
from onewan.media.cuts import cut_detector, find_cuts
from tests.support.clips import clip, planner
from tests.support.numbered_video import RATES, steady, write_numbered

STRATEGIES = ("uniform", "middle", "head", "random", "keyframe", "chunks", "sliding", "all")
SIZE = {"min_resolution": (1, 1), "resolutions": ("64x32",)}


def report_of(folder: Path, **settings: object) -> DatasetReport:
    return index_clips([ClipSource(path=folder)], planner(**SIZE | settings), use_masks=False)


def first_frames(clips: Sequence[Clip], fps: float = 16.0) -> list[float]:
    """Where the clips begin, in frames of a file at `fps`."""
    return [clip.start * fps for clip in clips]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a video of 80 frames at 16 fps, with a key frame every 24."""
    folder = tmp_path_factory.mktemp("clips")
    write_numbered(folder / "a.mp4", [k / 16 for k in range(80)])
    return folder


@pytest.mark.parametrize(
    ("settings", "starts"),
    [
        ({"frame_strategy": "head"}, [0]),
        ({"frame_strategy": "middle", "clips_per_video": 3}, [31]),  # 63 frames are left
        ({"frame_strategy": "uniform"}, [31]),
        # In the middle of each third, and overlapping where the parts are shorter than a clip.
        ({"frame_strategy": "uniform", "clips_per_video": 3}, [4, 31, 58]),
        ({"frame_strategy": "uniform", "clips_per_video": 8}, [9 * k for k in range(8)]),
        ({"frame_strategy": "chunks"}, [0, 17, 34, 51]),
        ({"frame_strategy": "all"}, [0, 17, 34, 51, 63]),
        # What is left is 4 frames, or less than a latent frame.
        ({"frame_strategy": "all", "max_frames": 19}, [0, 17, 34, 51, 63]),
        ({"frame_strategy": "all", "max_frames": 77}, [0]),
        ({"frame_strategy": "all", "max_frames": 5}, [5 * k for k in range(16)]),
        ({"frame_strategy": "sliding"}, [0, 8, 17, 25, 34, 42, 51, 59]),
        ({"frame_strategy": "sliding", "stride": 1.25}, [0, 20, 40, 60]),
        ({"frame_strategy": "sliding", "stride": 99.0}, [0]),
        ({"frame_strategy": "chunks", "max_duration": 10 / 16}, [9 * k for k in range(8)]),
    ],
)
def test_where_clips_begin(folder: Path, settings: dict[str, object], starts: list[float]) -> None:
    clips = report_of(folder, **settings).clips
    assert first_frames(clips) == pytest.approx(starts, abs=1e-3)
    assert all(each.takes == 1 for each in clips)


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where PySceneDetect is not installed."""
    for module in ("onewan.media.cuts", "onewan.data.clip", "onewan.data.found_cuts"):
        monkeypatch.setattr(f"{module}.cut_detector", lambda: "FFmpeg's scene score")


@pytest.mark.usefixtures("without_library")
@pytest.mark.parametrize(("number", "starts"), [(1, [48]), (2, [24, 48]), (3, [24, 48, 63])])
def test_without_pyscenedetect_key_frames_begin_clips(
    folder: Path, number: int, starts: list[float]
) -> None:
    """Those nearest to the middles of `number` parts of the file, of 0, 24, 48 and 72."""
    clips = report_of(folder, frame_strategy="keyframe", clips_per_video=number).clips
    assert first_frames(clips) == pytest.approx(starts, abs=1e-3)


def test_a_clip_is_named_by_its_file_and_number(folder: Path) -> None:
    (only,) = report_of(folder, frame_strategy="head").clips
    assert only.name == "a.mp4"
    clips = report_of(folder, frame_strategy="chunks").clips
    assert [each.name for each in clips] == [f"a.mp4 ({n} of 4)" for n in (1, 2, 3, 4)]


def test_several_lengths_give_clips_of_each(folder: Path) -> None:
    settings = {"frame_strategy": "chunks", "clip_lengths": (33, 6, 17, 97)}
    report = report_of(folder, **settings)
    counts = Counter(each.frames for each in report.clips)
    assert counts == {5: 16, 17: 4, 33: 2}
    texts = [warning.text for warning in report.warnings]
    assert "wan_config.clip_lengths is 6; 5 are used, since a clip has 4n+1 frames" in texts
    assert any(text.startswith("no clip of 97 frames at 16 fps: the file or") for text in texts)
    # A file that is shorter than all lengths gives what it has.
    (short,) = report_of(folder, frame_strategy="chunks", clip_lengths=(97, 121)).clips
    assert (short.frames, short.start) == (77, 0.0)


def test_random_spans_are_alternatives_of_one_clip(folder: Path) -> None:
    settings = {"frame_strategy": "random", "clips_per_video": 4}
    clips = report_of(folder, **settings).clips
    assert [(each.take, each.takes) for each in clips] == [(k, 4) for k in range(4)]
    assert count_clips(clips) == 1 and alternatives(clips) == [clips]
    # One in each quarter of the places where a clip can begin.
    for quarter, begin in enumerate(first_frames(clips)):
        assert 63 * quarter / 4 - 1 <= begin <= 63 * (quarter + 1) / 4
    other = report_of(folder, **settings, seed=8).clips
    assert first_frames(other) != first_frames(clips)
    # With one span, it is the one that was taken before there were several.
    (single,) = report_of(folder, frame_strategy="random").clips
    assert single.takes == 1 and single.name == "a.mp4"


def test_a_short_file_gives_one_clip_with_any_strategy(tmp_path: Path) -> None:
    write_numbered(tmp_path / "short.mp4", [k / 16 for k in range(11)])
    for strategy in STRATEGIES:
        (only,) = report_of(
            tmp_path, frame_strategy=strategy, clips_per_video=1, clip_lengths=(17, 33)
        ).clips
        assert only.frames == 9, strategy


# --- Changes of scene ----------------------------------------------------------------------------

SCENES = (20, 47, 9, 30)
"""Frames of the scenes of `film`."""


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a video of scenes in flat colors, with one thing that moves."""
    folder = tmp_path_factory.mktemp("film")
    colors = [(200, 40, 40), (40, 160, 60), (230, 230, 40), (30, 40, 180)]
    frames = list[np.ndarray]()
    for color, number in zip(colors, SCENES, strict=True):
        for k in range(number):
            picture = np.empty((32, 64, 3), np.uint8)
            picture[:] = color
            picture[12:16, k % 56 : k % 56 + 4] = 255
            frames.append(picture)
    write_video(folder / "film.mp4", np.stack(frames), fps=16)
    (folder / "film.txt").write_text("scenes", encoding="utf-8")
    return folder


def scene_of(pixels: np.ndarray) -> int:
    red, green, blue = (int(value) for value in pixels[28, 60])
    return {(1, 0, 0): 0, (0, 1, 0): 1, (1, 1, 0): 2, (0, 0, 1): 3}[
        (red > 120, green > 120, blue > 120)
    ]


@pytest.mark.usefixtures("without_library")
def test_changes_of_scene_are_found(film: Path) -> None:
    cuts = find_cuts(film / "film.mp4")
    after = [round(cut.after * 16) for cut in cuts]
    assert after == [20, 67, 76]
    assert [round(cut.before * 16) for cut in cuts] == [n - 1 for n in after]


def test_an_animated_image_has_changes_of_scene_too(tmp_path: Path) -> None:
    frames = [
        Image.fromarray(np.full((32, 64, 3), color, np.uint8))
        for color, number in (((200, 40, 40), 6), ((40, 160, 60), 9))
        for _ in range(number)
    ]
    # Each frame differs a little, since equal ones would be stored as one.
    for index, frame in enumerate(frames):
        frame.putpixel((index, 5), (255, 255, 255))
    path = tmp_path / "a.webp"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, lossless=True)
    assert [tuple(cut) for cut in find_cuts(path)] == [pytest.approx((0.5, 0.6))]
    frames[0].save(tmp_path / "still.webp")
    assert find_cuts(tmp_path / "still.webp") == ()


needs_library = pytest.mark.skipif(find_spec("scenedetect") is None, reason="needs onewan[cuts]")


@needs_library
def test_pyscenedetect_finds_them_too(film: Path) -> None:
    assert cut_detector() == "PySceneDetect"
    cuts = find_cuts(film / "film.mp4")
    assert [round(cut.after * 16) for cut in cuts] == [20, 67, 76]


@needs_library
def test_with_pyscenedetect_scenes_begin_clips(film: Path) -> None:
    clips = report_of(film, frame_strategy="keyframe", clips_per_video=3).clips
    assert first_frames(clips) == pytest.approx([20, 67, 76], abs=1e-3)


@pytest.mark.parametrize("fps", [8.0, 16.0, 24.0])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_clip_crosses_a_cut(film: Path, strategy: str, fps: float) -> None:
    settings = {"frame_strategy": strategy, "fps": fps, "max_frames": 9, "clips_per_video": 3}
    report = report_of(film, avoid_cuts=True, **settings)
    assert report.clips
    for each in report.clips:
        assert len({scene_of(frame) for frame in decode(each).frames}) == 1, each
    # Otherwise some do, so that the test can fail.
    if strategy in ("chunks", "all", "sliding"):
        crossing = [
            each
            for each in report_of(film, **settings).clips
            if len({scene_of(frame) for frame in decode(each).frames}) > 1
        ]
        assert crossing


def test_scenes_give_as_many_clips_as_fit(film: Path) -> None:
    clips = report_of(film, avoid_cuts=True, frame_strategy="chunks").clips
    assert first_frames(clips) == pytest.approx([0, 20, 37, 76], abs=1e-3)  # the third is short
    # Where no scene is long enough, the longest one gives a shorter clip.
    report = report_of(film, avoid_cuts=True, frame_strategy="chunks", max_frames=81)
    (only,) = report.clips
    assert (only.frames, round(only.start * 16)) == (45, 20)
    assert any("the file, each of its scenes or" in w.text for w in report.warnings)


def test_the_middle_moves_into_a_scene(film: Path) -> None:
    """From 36.5 of 106 frames on, a clip of 33 would cross the cut at 67."""
    (only,) = report_of(film, avoid_cuts=True, frame_strategy="middle", max_frames=33).clips
    assert round(only.start * 16) == 67 - 33


def test_changes_of_scene_are_remembered(film: Path, tmp_path: Path) -> None:
    file, video = tmp_path / "cuts.jsonl", film / "film.mp4"
    assert FoundCuts(file, search=False).of(video) == () and not FoundCuts(file).knows(video)
    cuts = FoundCuts(file).of(video)
    again = FoundCuts(file, search=False)
    assert again.of(video) == cuts and again.knows(video)
    copy = tmp_path / "film.mp4"
    copy.write_bytes(video.read_bytes())
    assert not again.knows(copy)
    FoundCuts(file).of(copy)
    copy.write_bytes(video.read_bytes() + b"\0")
    assert not FoundCuts(file).knows(copy)
    with file.open("a", encoding="utf-8") as lines:
        lines.write('["half a li')
    assert FoundCuts(file, search=False).of(video) == cuts


def test_files_are_searched_several_at_a_time_and_each_once(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["a", "b", "c"]
    for name in names:
        for suffix in ("mp4", "txt"):
            shutil.copy(film / f"film.{suffix}", tmp_path / f"{name}.{suffix}")
    (tmp_path / "small.mp4").write_bytes((film / "film.mp4").read_bytes()[:2000])
    (tmp_path / "small.txt").write_text("damaged", encoding="utf-8")
    searched, told, meeting = list[str](), list[tuple[str, int, int]](), threading.Barrier(2)

    def find(path: Path) -> Any:
        searched.append(path.name)
        if len(searched) <= 2:
            meeting.wait(20)  # BrokenBarrierError unless two files are searched at a time
        return find_cuts(path)

    monkeypatch.setattr("onewan.data.found_cuts.find_cuts", find)
    monkeypatch.setattr("onewan.data.found_cuts.usable_cores", lambda: 2)
    copies = Copies(tmp_path / "cache", progress=lambda *done: told.append(done))
    own = planner(**SIZE, avoid_cuts=True, max_frames=33, cuts=FoundCuts(tmp_path / "cuts.jsonl"))
    report = index_clips([ClipSource(path=tmp_path)], own, use_masks=False, copies=copies)
    assert [clip.name for clip in report.clips] == ["a.mp4", "b.mp4", "c.mp4"]
    assert sorted(searched) == ["a.mp4", "b.mp4", "c.mp4"]
    assert told == [("searching for changes of scene", done, 3) for done in (1, 2, 3)]


def test_a_file_that_can_not_be_searched_is_a_problem_of_its_own(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> Any:
        refused.append(path)
        raise DataError(f"{path}: is damaged at 1.0 s")

    refused = list[Path]()
    monkeypatch.setattr("onewan.data.found_cuts.find_cuts", refuse)
    for suffix in ("mp4", "txt"):
        shutil.copy(film / f"film.{suffix}", tmp_path / f"film.{suffix}")
    report = report_of(tmp_path, avoid_cuts=True, max_frames=33)
    assert [problem.reason for problem in report.problems] == ["is damaged at 1.0 s"]
    assert len(refused) == 1 and report.clips == ()


# --- What the report says ------------------------------------------------------------------------


def test_the_report_says_what_is_taken_of_a_video(tmp_path: Path) -> None:
    write_numbered(tmp_path / "a.mp4", steady(RATES["29.97"], 2.9))
    report = report_of(tmp_path, max_frames=81)
    lines = report.lines()
    assert lines[0] == "1 clip (1 video, 0 images)"
    assert "Taken of the videos, 2.8 s of 2.9 s:" in lines
    assert "  a.mp4: 87 frames at 29.97 fps -> 45 at 16 fps, 2.8 s of 2.9 s" in lines
    several = report_of(tmp_path, frame_strategy="chunks", max_frames=9).lines()
    assert several[0] == "5 clips (5 from 1 video, 0 images)"
    assert "  a.mp4: 87 frames at 29.97 fps -> 5 clips of 9 at 16 fps, 2.8 s of 2.9 s" in several
    spans = report_of(tmp_path, frame_strategy="random", max_frames=9, clips_per_video=3)
    assert spans.lines()[0] == "1 clip (1 video, 0 images)"
    assert "  64x32, 9 frames: 1 clip" in spans.lines()
    (line,) = [line for line in spans.lines() if "->" in line]
    assert "-> one of 3 spans of 9 at 16 fps in each pass, " in line


def test_each_video_has_its_own_line_and_of_many_the_rest_are_counted() -> None:
    def video(number: int, frames: int) -> Clip:
        seconds = frames / 30
        return clip(f"{number:02}.mp4", frames=17, source_seconds=seconds, source_fps=30.0)

    report = DatasetReport(
        clips=tuple(video(number, 36 + number // 2) for number in range(10)),
        problems=(),
        warnings=(),
    )
    lines = report.lines()
    at = lines.index("Taken of the videos, 10.6 s of 12.7 s:")
    assert lines[at + 1 :] == [
        f"  {2 * k:02}.mp4, {2 * k + 1:02}.mp4: {36 + k} frames at 30 fps -> 17 at 16 fps, "
        f"1.1 s of {(36 + k) / 30:.1f} s"
        for k in range(5)
    ]
    twice = (video(1, 36), replace(video(1, 36), fps=8.0, frames=9))
    assert replace(report, clips=twice).lines()[-2:] == [
        "  01.mp4: 36 frames at 30 fps -> 17 at 16 fps, 1.1 s of 1.2 s",
        "  01.mp4: 36 frames at 30 fps -> 9 at 8 fps, 1.1 s of 1.2 s",
    ]
    many = replace(report, clips=tuple(video(number, 36 + number) for number in range(25)))
    *_, last, rest = many.lines()
    assert last.startswith("  19.mp4: 55 frames at 30 fps -> ")
    assert rest == "  and 5 other videos, which `onewan doctor` lists"


def test_what_several_clips_cover_counts_once() -> None:
    def span(start: float) -> Clip:
        return clip("a", start=start, frames=17, source_seconds=10.0, source_fps=16.0)

    assert used_seconds([span(0.0), span(1.0)]) == pytest.approx(33 / 16)
    assert used_seconds([span(5.0), span(0.0)]) == pytest.approx(34 / 16)
    assert used_seconds([span(2.0), span(2.0)]) == pytest.approx(17 / 16)
    assert taken([span(0.0), span(5.0)]).startswith("160 frames at 16 fps -> 2 clips of 17 at 16")


# --- Validation ----------------------------------------------------------------------------------


def test_all_clips_of_a_file_are_on_one_side() -> None:
    clips = [
        replace(clip(f"{name} ({part})", start=float(part)), path=Path(name))
        for name in "abcdefgh"
        for part in range(3)
    ]
    content = {each.path: f"content of {each.path}" for each in clips}
    training, held_out = split_validation_clips(clips, 0.25, 7, content)
    assert {each.path for each in training}.isdisjoint(each.path for each in held_out)
    assert len(held_out) == 6 and len(training) == 18
    assert sorted(each.start for each in held_out) == [0, 0, 1, 1, 2, 2]


def test_of_alternatives_the_first_is_validated_on() -> None:
    clips = [
        replace(clip(f"{name} ({k})", start=float(k), take=k, takes=3), path=Path(name))
        for name in "ab"
        for k in range(3)
    ]
    content = {each.path: str(each.path) for each in clips}
    training, (held_out,) = split_validation_clips(clips, 0.5, 7, content)
    assert held_out.take == 0 and len(training) == 3
