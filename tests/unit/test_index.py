"""Folders become clips, and every file that can't be used is reported with its reason."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.clips import planner

from onewan.data.clip import Clip, ClipSource
from onewan.data.decode import decode
from onewan.data.index import index_clips
from onewan.data.report import DatasetReport
from onewan.errors import DataError
from onewan.media import probe, read_frames, write_video

SIZE = (96, 64)


def video(path: Path, frames: int = 32, caption: str | None = "a test", fps: float = 16) -> Path:
    """A clip whose frames get brighter by four levels per frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = (np.arange(frames) * 4 % 256).astype(np.uint8)
    width, height = SIZE
    pixels = np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3))
    write_video(path, np.ascontiguousarray(pixels), fps)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def index(*folders: Path | ClipSource, **settings: object) -> DatasetReport:
    """`index_clips`, with `settings` of the planner."""
    named = [f if isinstance(f, ClipSource) else ClipSource(path=f) for f in folders]
    return index_clips(named, planner(**settings), use_masks=False)


def only(report: DatasetReport) -> Clip:
    assert not report.problems
    (clip,) = report.clips
    return clip


# --- Clips ---------------------------------------------------------------------------------------


def test_a_captioned_video_becomes_a_clip(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", caption="one\n\n  two \r\nthree")
    clip = only(index(tmp_path))
    assert (clip.path, clip.name, clip.kind) == (path, "a.mp4", "video")
    assert clip.captions == ("one", "two", "three")
    assert (clip.fps, clip.frames, clip.source_size, clip.repeats) == (16, 17, SIZE, 1)
    assert clip.size == (80, 48)
    assert clip.times() == pytest.approx([clip.start + k / 16 for k in range(17)])


def test_a_clip_decodes_to_a_video_sample_of_its_span(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4", caption="one\ntwo")
    clip = only(index(tmp_path))
    sample = decode(clip, caption_index=1)
    assert (sample.prompt, sample.frame_count, sample.fps) == ("two", 17, 16)
    assert (sample.resolution, sample.duration) == (clip.size, 17 / 16)
    assert sample.frames.shape == (17, clip.size[1], clip.size[0], 3)
    # The middle 17 of 32 frames begin with frame 7 or 8.
    brightness = sample.frames.mean(axis=(1, 2, 3))
    assert brightness[0] in (pytest.approx(28, abs=2), pytest.approx(32, abs=2))
    assert np.diff(brightness) == pytest.approx([4] * 16, abs=2)


def test_order_depends_on_names_alone(tmp_path: Path) -> None:
    for name in ("c.mp4", "sub/b.mp4", "a.mp4", "sub/deep/d.mp4"):
        video(tmp_path / name, frames=5)
    names = [clip.name for clip in index(tmp_path).clips]
    assert names == ["a.mp4", "c.mp4", "sub/b.mp4", "sub/deep/d.mp4"]


def test_two_folders_with_the_same_files_give_equal_clips(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4")
    report = index(tmp_path, tmp_path)
    assert len(report.clips) == 2
    assert report.clips[0] == report.clips[1]


def test_a_folder_sets_the_repeats_of_its_clips(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4")
    folder = ClipSource(path=tmp_path, repeats=3)
    report = index(folder, max_frames=5, resolutions=("64x48",))
    assert (only(report).repeats, only(report).size) == (3, (64, 48))


def test_a_folder_sets_the_loss_weight_and_target_of_its_clips(tmp_path: Path) -> None:
    video(tmp_path / "own" / "a.mp4", frames=5)
    video(tmp_path / "base" / "b.mp4", frames=5)
    report = index(
        ClipSource(path=tmp_path / "own", loss_weight=2.5),
        ClipSource(path=tmp_path / "base", is_prior=True),
    )
    assert [(clip.name, clip.loss_weight, clip.is_prior) for clip in report.clips] == [
        ("a.mp4", 2.5, False),
        ("b.mp4", 1.0, True),
    ]


def test_an_image_is_a_clip_of_one_frame(tmp_path: Path) -> None:
    Image.new("RGB", (200, 100), "red").save(tmp_path / "a.PNG")
    (tmp_path / "a.txt").write_text("red")
    clip = only(index(tmp_path))
    assert (clip.kind, clip.frames, clip.start, clip.times()) == ("image", 1, 0.0, (0.0,))
    sample = decode(clip)
    assert sample.frames.shape == (1, clip.size[1], clip.size[0], 3)
    assert (sample.frames == (255, 0, 0)).all()


# --- Spans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("in_file", "settings", "frames"),
    [
        (32, {}, 17),
        (16, {}, 13),
        (3, {}, 1),
        (32, {"max_frames": 16}, 13),
        (32, {"max_duration": 1.0}, 13),
        (32, {"max_duration": 0.01}, 1),
        (32, {"max_duration": 17 / 16}, 17),
        (32, {"fps": 8}, 13),
    ],
)
def test_the_number_of_frames_is_4n_plus_1_within_all_limits(
    tmp_path: Path, in_file: int, settings: dict[str, float], frames: int
) -> None:
    video(tmp_path / "a.mp4", frames=in_file)
    assert only(index(tmp_path, **settings)).frames == frames


@pytest.mark.parametrize("strategy", ["uniform", "random", "keyframe"])
def test_a_span_is_within_its_file(tmp_path: Path, strategy: str) -> None:
    for frames in (1, 5, 17, 18, 40):
        video(tmp_path / f"{frames}.mp4", frames=frames)
    for clip in index(tmp_path, frame_strategy=strategy).clips:
        info = probe(clip.path)
        assert info.start <= clip.times()[0]
        assert clip.times()[-1] <= info.last + 1e-6


def test_uniform_takes_the_middle_of_the_file(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", frames=40)
    clip, info = only(index(tmp_path)), probe(path)
    # 23 frames of the file are not in the clip: 11 before it and 12 behind it.
    assert (clip.start - info.start) * 16 == pytest.approx(11)
    assert (info.last - clip.times()[-1]) * 16 == pytest.approx(12)


@pytest.mark.parametrize("strategy", ["uniform", "random", "keyframe"])
@pytest.mark.parametrize("kind", ["mp4", "webm"])
@pytest.mark.parametrize("fps", [24, 30])
def test_at_the_files_own_rate_each_frame_is_taken_once(
    tmp_path: Path, fps: float, kind: str, strategy: str
) -> None:
    """Also if the exact middle of the file is between two frames."""
    for frames in (18, 24, 29):
        video(tmp_path / f"{frames}.{kind}", frames=frames, fps=fps)
    report = index(tmp_path, fps=fps, frame_strategy=strategy)
    assert len(report.clips) == 3
    for clip in report.clips:
        levels = decode(clip).frames.mean(axis=(1, 2, 3))
        assert np.round(np.diff(levels) / 4).tolist() == [1] * 16, clip.name


def test_a_random_span_depends_on_seed_and_name_only(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        video(tmp_path / name, frames=60)

    def starts(seed: int) -> list[float]:
        report = index(tmp_path, frame_strategy="random", seed=seed)
        return [clip.start for clip in report.clips]

    assert starts(1) == starts(1) != starts(2)
    assert starts(1)[0] != starts(1)[1]
    video(tmp_path / "0.mp4", frames=60)  # an earlier file changes nothing
    assert starts(1)[1] == pytest.approx(index_of(tmp_path / "a.mp4", seed=1))


def index_of(path: Path, seed: int) -> float:
    report = index(path.parent, frame_strategy="random", seed=seed)
    return next(clip.start for clip in report.clips if clip.path == path)


def test_keyframe_starts_at_the_key_frame_nearest_to_the_middle(clips: Path) -> None:
    folder = clips / "odd"
    report = index(folder, frame_strategy="keyframe")
    clip = next(c for c in report.clips if c.name == "long_gop_with_cuts.mp4")
    assert clip.start == pytest.approx(5.48)  # of 0, 1.2, 3.04, 5.48, 7.48, 9.68; middle 4.98


# --- Files that can't be used --------------------------------------------------------------------


def reasons(report: DatasetReport) -> dict[str, str]:
    return {problem.path.name: problem.reason for problem in report.problems}


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    video(tmp_path / "good.mp4")
    video(tmp_path / "uncaptioned.mp4", caption=None)
    video(tmp_path / "latin.mp4", caption=None).with_suffix(".txt").write_bytes(
        "кот".encode("cp1251")
    )
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "broken.txt").write_text("broken")
    (tmp_path / "film.mkv").write_bytes(b"")
    Image.new("RGB", (16, 200)).save(tmp_path / "narrow.png")
    (tmp_path / "narrow.txt").write_text("narrow")
    (tmp_path / "lonely.txt").write_text("lonely")
    (tmp_path / "data.json").write_text("{}")
    video(tmp_path / ".hidden.mp4")
    video(tmp_path / ".trash" / "a.mp4")

    report = index(tmp_path)
    assert [clip.name for clip in report.clips] == ["good.mp4"]
    found = reasons(report)
    assert sorted(found) == ["broken.mp4", "film.mkv", "latin.mp4", "narrow.png", "uncaptioned.mp4"]
    assert "is not a video that FFmpeg can read" in found["broken.mp4"]
    assert "add mkv there" in found["film.mkv"]
    assert "video_data.supported_formats (mp4, avi, mov, webm)" in found["film.mkv"]
    assert "latin.txt is not UTF-8 text (byte 0, in Windows-1252 'ê')" in found["latin.mp4"]
    assert "is 16x200, smaller than video_data.min_resolution (32x32)" in found["narrow.png"]
    assert "write one into uncaptioned.txt" in found["uncaptioned.mp4"]
    assert all("; " in reason and str(tmp_path) not in reason for reason in found.values())
    assert [warning.path for warning in report.warnings] == [tmp_path / "lonely.txt"]

    text = "\n".join(report.lines())
    assert text.startswith("1 clip (1 video, 0 images), 5 left out\n")
    assert "5 files can't be used:" in text
    assert all(f"{problem.path}: {problem.reason}" in text for problem in report.problems)
    assert "lonely.txt: caption file without a video or image" in text


@pytest.mark.parametrize(
    ("content", "captions"),
    [
        (b"", ("",)),
        (b"\n  \n", ("",)),
        (b"\xef\xbb\xbfbyte order mark", ("byte order mark",)),
        ("é 日本\n".encode(), ("é 日本",)),
    ],
)
def test_each_line_of_the_caption_file_is_a_caption(
    tmp_path: Path, content: bytes, captions: tuple[str, ...]
) -> None:
    video(tmp_path / "a.mp4").with_suffix(".txt").write_bytes(content)
    assert only(index(tmp_path)).captions == captions


def test_a_video_format_that_is_added_is_used(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4").rename(tmp_path / "a.m4v")
    assert "add m4v" in index(tmp_path).problems[0].reason
    assert only(index(tmp_path, video_formats=("m4v",))).name == "a.m4v"


def test_min_resolution_holds_in_either_orientation(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4")
    for least in ((96, 64), (64, 96)):
        only(index(tmp_path, min_resolution=least))
    for least in ((97, 64), (64, 97), (65, 65)):
        assert "min_resolution" in index(tmp_path, min_resolution=least).problems[0].reason


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: is not a folder; correct video_data\.sources"):
        index(tmp_path / "nowhere")


def test_all_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        index(tmp_path / "nowhere", tmp_path, tmp_path / "no-more")
    assert caught.value.message == "2 problems"
    assert [line.partition(": ")[0] for line in caught.value.details] == [
        str(tmp_path / "nowhere"),
        str(tmp_path / "no-more"),
    ]


def test_an_empty_folder_is_a_problem(tmp_path: Path) -> None:
    report = index(tmp_path)
    assert report.clips == ()
    assert report.lines() == [
        "0 clips (0 videos, 0 images), 1 left out",
        "1 file can't be used:",
        f"  {tmp_path}: has no video or image to train on",
    ]


def test_a_link_to_a_parent_folder_is_not_followed(tmp_path: Path) -> None:
    video(tmp_path / "sub" / "a.mp4", frames=5)
    try:
        (tmp_path / "sub" / "up").symlink_to(tmp_path, target_is_directory=True)
    except OSError:
        pytest.skip("this system has no symbolic links")
    assert only(index(tmp_path)).name == "sub/a.mp4"


def link(path: Path, target: Path) -> None:
    try:
        path.symlink_to(target, target_is_directory=True)
    except OSError:
        pytest.skip("this system has no symbolic links")


def test_folders_that_link_one_another_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"folder{number}" for number in range(9)]
    for name in names:
        video(tmp_path / name / "a.mp4", frames=5)
    for name in names:
        for other in names:
            if other != name:
                link(tmp_path / name / f"to_{other}", tmp_path / other)
    listed = list[Path]()
    original = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: listed.append(path) or original(path))
    report = index(tmp_path)
    assert [clip.name for clip in report.clips] == [f"{name}/a.mp4" for name in names]
    assert len(listed) == 1 + 9
    assert not report.problems
    text = (
        "to_folder1, to_folder2, to_folder3 and 69 others: leads to a folder that is read already"
    )
    assert sum(text in line for line in report.lines()) == 1


def test_a_folder_with_two_links_to_it_is_read_once_by_the_first(tmp_path: Path) -> None:
    video(tmp_path / "elsewhere" / "sub" / "x.mp4", frames=5)
    video(tmp_path / "clips" / "c" / "y.mp4", frames=5)
    for name in ("b", "a"):
        link(tmp_path / "clips" / name, tmp_path / "elsewhere")
    link(tmp_path / "clips" / "0", tmp_path / "clips" / "c")
    report = index(tmp_path / "clips")
    # The real folder names its clip, though a link to it comes first.
    assert [clip.name for clip in report.clips] == ["a/sub/x.mp4", "c/y.mp4"]
    assert "  0, b: leads to a folder that is read already, so it is left out" in report.lines()


@contextlib.contextmanager
def folder_of_all_users() -> Iterator[Path]:
    """A folder that every user may read; those of pytest are its user's own."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def without_rights(call: Callable[[], list[str]]) -> list[str]:
    """What `call` returns in a process of a user who may not do everything."""
    if sys.platform == "win32":
        pytest.skip("needs the users and permissions of POSIX")
    if os.geteuid() != 0:
        return call()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setuid(65534)
            result: object = call()
        except Exception as error:  # noqa: BLE001  (the parent has to see it)
            result = [f"{type(error).__name__}: {error}"]
        os.write(writer, json.dumps(result).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        answer = file.read()
    os.waitpid(child, 0)
    return json.loads(answer)


@pytest.mark.parametrize("mode", [0, 0o444])
def test_a_folder_that_can_not_be_read_or_entered_is_named_once(mode: int) -> None:
    """0o444: its files are listed, and none can be opened."""
    with folder_of_all_users() as folder:
        video(folder / "a.mp4", frames=5)
        for name in ("x", "y"):
            video(folder / "locked" / f"{name}.mp4", frames=5)
        (folder / "locked").chmod(mode)

        def lines() -> list[str]:
            report = index(folder)
            return [clip.name for clip in report.clips] + [str(p) for p in report.problems]

        assert without_rights(lines) == [
            "a.mp4",
            f"{folder / 'locked'}: this folder can't be read (Permission denied); check its "
            "permissions",
        ]
        (folder / "locked").chmod(0o755)


def test_files_that_can_not_be_opened_are_named() -> None:
    with folder_of_all_users() as folder:
        for name in ("a.mp4", "b.mp4"):
            video(folder / name, frames=5)
        Image.new("RGB", SIZE).save(folder / "c.png")
        (folder / "c.txt").touch()
        (folder / "a.mp4").chmod(0)
        (folder / "b.txt").chmod(0)
        (folder / "c.png").chmod(0)
        found = without_rights(lambda: [str(problem) for problem in index(folder).problems])
        reason = "can't be opened (Permission denied); allow reading it, or take it out"
        assert found == [
            f"{folder / 'a.mp4'}: {reason}",
            f"{folder / 'b.mp4'}: its caption file b.txt can't be read (Permission denied); "
            "replace it by a text file that you may read",
            f"{folder / 'c.png'}: {reason}",
        ]


def test_a_source_below_a_locked_folder_is_an_error() -> None:
    with folder_of_all_users() as folder:
        video(folder / "locked" / "clips" / "a.mp4", frames=5)
        (folder / "locked").chmod(0)

        def error() -> list[str]:
            try:
                index(folder / "locked" / "clips")
            except DataError as error:
                return [str(error)]
            return []

        (text,) = without_rights(error)
        (folder / "locked").chmod(0o755)
        # From Python 3.14 on, such a folder can't be distinguished from none.
        assert re.search(r"clips: (can't be read \(Permission denied\)|is not a folder); ", text)


def test_names_that_are_not_unicode_are_names(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("needs a file system whose names are any bytes")
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4"))
    video(path, frames=40)
    Image.new("RGB", SIZE).save(path.with_suffix(".mask.png"))
    folder = ClipSource(path=tmp_path)
    report = index_clips([folder], planner(frame_strategy="random"), use_masks=True)
    clip = only(report)
    assert clip.path == path and clip.mask is not None
    assert decode(clip).frame_count == 17
    assert clip.start == pytest.approx(
        only(index_clips([folder], planner(frame_strategy="random"), use_masks=True)).start
    )
    path.write_bytes(b"damaged")
    (problem,) = index(tmp_path).problems
    assert problem.path == path and problem.reason.startswith("is not a video")


def test_captions_that_are_no_text_file_are_reported(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4", caption=None)
    (tmp_path / "a.txt").mkdir()
    video(tmp_path / "b.mp4").with_suffix(".txt").write_bytes(b"x" * (1024**2 + 1))
    names = ["a.mp4", "b.mp4"]
    if hasattr(os, "mkfifo"):
        video(tmp_path / "c.mp4", caption=None)
        os.mkfifo(tmp_path / "c.txt")
        os.mkfifo(tmp_path / "d.mp4")
        (tmp_path / "d.txt").touch()
        names += ["c.mp4", "d.mp4"]
    found = reasons(index(tmp_path))
    assert sorted(found) == names
    assert found["a.mp4"] == (
        "its caption file a.txt can't be read (is a folder, not a file); replace it by a text file "
        "that you may read"
    )
    assert "b.txt can't be read (is larger than 1 MiB)" in found["b.mp4"]


def test_warnings_about_many_files_are_one_line(tmp_path: Path) -> None:
    for name in "abcde":
        video(tmp_path / f"{name}.mp4", frames=5)
    report = index(tmp_path, max_frames=16, resolutions=(480 * 832,))
    lines = report.lines()
    assert sum("max_frames is 16; 13 are used" in line for line in lines) == 1
    scaled = [line for line in lines if "scaled up from 96x64" in line]
    assert len(scaled) == 1
    assert "a.mp4, b.mp4, c.mp4 and 2 others: " in scaled[0]
    assert any("5 frames at 16 fps instead of 13" in line for line in lines)
    assert str(report) == "\n".join(lines)


def test_what_is_not_used_of_a_long_file_is_said(tmp_path: Path) -> None:
    """Of many such files, no two of the same length, in one line."""
    for number, name in enumerate("abcde"):
        video(tmp_path / f"{name}.mp4", frames=36 + 4 * number)
    video(tmp_path / "short.mp4", frames=20)  # 17 of 20 frames: nearly all
    lines = index(tmp_path).lines()
    (line,) = [line for line in lines if "s long" in line]
    assert line == (
        "  a.mp4 and 4 others like it (b.mp4, c.mp4, ...): 2.2 s long; 1.1 s from its middle are "
        "used (wan_config.frame_sample_strategy: all makes clips of all of it)"
    )
    assert not [line for line in lines if "short.mp4" in line and "->" not in line]
    (line,) = [line for line in index(tmp_path, frame_strategy="random").lines() if "long" in line]
    assert "1.1 s from a random place are used" in line


def test_a_size_that_the_limit_cuts_is_said(tmp_path: Path) -> None:
    Image.new("RGB", (640, 320)).save(tmp_path / "wide.png")
    Image.new("RGB", (320, 320)).save(tmp_path / "square.png")
    for name in ("wide", "square"):
        (tmp_path / f"{name}.txt").touch()
    report = index(tmp_path, resolutions=(256 * 256,), max_resolution=(256, 256))
    assert {clip.name: clip.size for clip in report.clips} == {
        "wide.png": (256, 128),
        "square.png": (256, 256),
    }
    (warning,) = report.warnings
    assert warning.path is not None and warning.path.name == "wide.png"
    assert warning.text == (
        "trained at 256x128 instead of 352x176, since video_data.max_resolution is 256x256"
    )
    assert not index(tmp_path, resolutions=(256 * 256,)).warnings
    assert not index(tmp_path, resolutions=("256x128",), max_resolution=(256, 256)).warnings


def test_without_a_smallest_size_it_follows_from_the_training_size(tmp_path: Path) -> None:
    for name, size in (("half", (64, 64)), ("low", (128, 40)), ("tiny", (63, 63))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").touch()
    report = index(tmp_path, min_resolution=None, resolutions=("128x128",))
    assert [clip.name for clip in report.clips] == ["half.png", "low.png"]
    (problem,) = report.problems
    assert problem.path.name == "tiny.png" and problem.reason == (
        "is 63x63, and would be enlarged more than twice, to 128x128; take it out, choose a "
        "smaller video_data.resolution, or allow it with video_data.min_resolution: [1, 1]"
    )
    assert [w.text for w in report.warnings] == [
        "scaled up from 64x64 to 128x128",
        "scaled up from 128x40 to 128x128",
    ]
    assert not index(tmp_path, min_resolution=(1, 1), resolutions=("128x128",)).problems


def test_many_unusable_files_of_one_kind_are_one_line(tmp_path: Path) -> None:
    for number in range(12):
        Image.new("RGB", (10 + number, 200)).save(tmp_path / f"narrow{number:02}.png")
        (tmp_path / f"narrow{number:02}.txt").touch()
        Image.new("RGB", SIZE).save(tmp_path / f"a{number:02}.png")  # without a caption
    for name in ("x", "y"):
        (tmp_path / f"{name}.mp4").write_bytes(b"no video")
        (tmp_path / f"{name}.txt").touch()
    report = index(tmp_path)
    assert len(report.problems) == 26
    everything = [f"  {problem}" for problem in report.problems]
    assert [line for line in report.lines() if line in everything] == everything
    listed = replace(report, problem_list=tmp_path / "list.txt").lines()
    begin = listed.index("26 files can't be used:") + 1
    assert listed[begin:] == [
        f"  {tmp_path / 'a00.png'} and 11 others like it (a01.png, a02.png, ...): has no caption; "
        "write one into a00.txt beside it (an empty file trains without text), or let `onewan "
        "caption` ask a model for it",
        f"  {tmp_path / 'narrow00.png'} and 11 others like it (narrow01.png, narrow02.png, ...): "
        "is 10x200, smaller than video_data.min_resolution (32x32); lower that, or take it out",
        *everything[-2:],
        f"  all are listed in {tmp_path / 'list.txt'}",
    ]


def test_good_and_odd_clips_are_used_and_bad_ones_are_reported(clips: Path) -> None:
    report = index(clips / "good", clips / "bad", clips / "odd")
    assert len(reasons(report)) == 7 + 2
    assert {"animated.gif", "variable_frame_rate.mkv", "corrupt_middle.mp4"} <= set(reasons(report))
    assert len([c for c in report.clips if c.path.parent.name == "good"]) == 6
    turned = next(c for c in report.clips if c.name == "rotated_90.mp4")
    assert turned.size[0] < turned.size[1]
    # Shown 193x144: its pixels are not square, so its shape is 4:3, not 11:9.
    assert next(c for c in report.clips if c.name == "man_in_car.webm").source_size == (193, 144)
    assert read_frames(turned.path, turned.times()).shape[0] == turned.frames


# --- Files of other kinds ------------------------------------------------------------------------


def test_images_of_other_kinds_are_named_with_what_to_do(tmp_path: Path) -> None:
    for name in ("photo.CR3", "scan.TGA", "picture.jxl"):
        (tmp_path / name).write_bytes(b"any")
        (tmp_path / name).with_suffix(".txt").write_text("a caption")
    (tmp_path / "notes.md").write_text("notes")
    (tmp_path / "notes.txt").write_text("notes")
    report = index(tmp_path)
    assert reasons(report) == {
        "photo.CR3": "cr3 is not read; convert it to png",
        "picture.jxl": "jxl is not read; convert it to png",
        "scan.TGA": "tga is not read; convert it to png",
    }
    (warning,) = report.warnings
    assert (warning.path, warning.text) == (
        tmp_path / "notes.txt",
        "caption of a .md file, which is neither a video nor an image that is read; unused",
    )


@pytest.mark.parametrize("name", ["a.bmp", "b.jfif", "c.jpe"])
def test_bmp_and_all_names_of_jpeg_are_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    Image.new("RGB", SIZE, (200, 40, 40)).save(path, "BMP" if name == "a.bmp" else "JPEG")
    path.with_suffix(".txt").write_text("red")
    frames = decode(only(index(tmp_path))).frames
    assert np.abs(frames.astype(int) - (200, 40, 40)).max() <= 2
    path.write_bytes(path.read_bytes()[:-100])
    assert name in reasons(index(tmp_path))


def test_media_as_people_have_them(clips: Path) -> None:
    report = index(clips / "field", min_resolution=(16, 16))
    found = {clip.name: clip.captions for clip in report.clips}
    assert {"bmp.bmp", "j.jfif", "upper.mp4", "anim.webp", "pic.avif", "vp9a.webm"} <= set(found)
    kinds = {clip.name: clip.kind for clip in report.clips}
    assert (kinds["anim.webp"], kinds["pic.avif"]) == ("video", "image")
    notes = {(warning.path.name, warning.text) for warning in report.warnings if warning.path}
    assert {
        ("hdr_pq.mp4", "HDR (PQ) brought to SDR"),
        ("int_h264.mp4", "interlaced video, deinterlaced"),
        ("untagged_hd_709.mp4", "colors without tags, read as BT.709 (by the size)"),
    } <= notes
    assert found["upper.mp4"] != ("",)
    (caption,) = found["u2028.mp4"]
    assert "\u2028" in caption and "\v" in caption
    assert not any("without a video or image" in warning.text for warning in report.warnings)


# --- Interlaced and transparent files ------------------------------------------------------------


def test_interlaced_files_are_used_or_refused(clips: Path, tmp_path: Path) -> None:
    source = clips / "field" / "int_h264.mp4"
    if not source.exists():
        pytest.skip("these clips have no field folder")
    path = tmp_path / "a.mp4"
    shutil.copyfile(source, path)
    path.with_suffix(".txt").write_text("a bar", encoding="utf-8")
    report = index(tmp_path)
    assert len(report.clips) == 1
    assert "  a.mp4: interlaced video, deinterlaced" in report.lines()
    report = index(tmp_path, interlaced="refuse")
    assert not report.clips
    assert str(report.problems[0]) == (
        f"{path}: is interlaced, and video_data.interlaced is refuse; set that to deinterlace, or "
        "take the file out"
    )


def test_all_videos_are_deinterlaced_where_a_source_says_so(tmp_path: Path) -> None:
    for folder in (tmp_path / "woven", tmp_path / "other"):
        folder.mkdir()
        video(folder / "a.mp4")
    Image.new("RGB", SIZE).save(tmp_path / "woven" / "b.png")
    (tmp_path / "woven" / "b.txt").write_text("black", encoding="utf-8")
    source = ClipSource(path=tmp_path / "woven", planning={"interlaced": "bottom_first"})
    report = index(source, tmp_path / "other")
    assert [clip.fields for clip in report.clips] == ["bottom_first", None, None]
    (note,) = [w for w in report.warnings if "deinterlaced" in w.text]
    assert (note.path, note.about) == (tmp_path / "woven" / "a.mp4", "deinterlaced")
    assert "bottom field first" in note.text


def test_the_background_belongs_to_files_with_transparency_only(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4")
    Image.new("RGBA", SIZE, (255, 0, 0, 0)).save(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("nothing", encoding="utf-8")
    opaque, transparent = index(tmp_path, background=(0, 90, 180)).clips
    assert (opaque.background, transparent.background) == ((255, 255, 255), (0, 90, 180))
    assert (decode(transparent).frames == (0, 90, 180)).all()
