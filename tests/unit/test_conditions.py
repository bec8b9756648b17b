"""Condition images and control videos of clips: which files they are, and what is read of them."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.clips import planner
from support.numbered_video import SIZE, number_of, steady, write_numbered

from onewan.data.augment import Variation
from onewan.data.clip import Clip, ClipPlanner, ClipSource
from onewan.data.conditions import FIRST_FRAME, Conditions
from onewan.data.decode import condition_image, control_frames, decode, start_image
from onewan.data.index import index_clips
from onewan.data.report import DatasetReport
from onewan.errors import DataError
from onewan.media import write_video

GIVEN = planner(
    resolutions=("64x32",), max_frames=9, takes_condition_image=True, takes_control=True
)


def index(path: Path, chooser: ClipPlanner = GIVEN, **settings: object) -> DatasetReport:
    source = ClipSource(path=path, **settings)  # pyright: ignore[reportArgumentType]
    return index_clips([source], chooser, use_masks=False)


def only(report: DatasetReport) -> Clip:
    assert not report.problems
    (clip,) = report.clips
    return clip


def numbered(path: Path, seconds: float = 2.0) -> Path:
    return write_numbered(path, steady(Fraction(25), seconds))


def picture(path: Path, color: tuple[int, int, int] = (250, 20, 30)) -> Path:
    pixels = np.full((32, 64, 3), 90, np.uint8)
    pixels[:, :16] = color
    Image.fromarray(pixels).save(path)
    return path


def table(path: Path, *rows: dict[str, str]) -> Path:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


# --- Which files they are ------------------------------------------------------------------------


def test_files_beside_a_clip_are_its_conditions_and_no_clips(tmp_path: Path) -> None:
    numbered(tmp_path / "a.mp4")
    image = picture(tmp_path / "a.condition.png")
    control = numbered(tmp_path / "a.control.mp4")
    numbered(tmp_path / "b.mp4")
    picture(tmp_path / "other.Condition.JPG")
    control.with_suffix(".txt").unlink()
    report = index(tmp_path)
    assert [clip.name for clip in report.clips] == ["a.mp4", "b.mp4"]
    a, b = report.clips
    assert a.conditions.image and a.conditions.image.path == image
    assert a.conditions.control and a.conditions.control.path == control
    assert a.files == (tmp_path / "a.mp4", image, control)
    assert b.conditions == FIRST_FRAME and b.files == (tmp_path / "b.mp4",)
    lines = report.lines()
    assert "  with a condition image of their own: 1 clip" in lines
    assert "  with a control video: 1 clip" in lines
    unused = "condition image without a video or image of its name; unused"
    assert f"  other.Condition.JPG: {unused}" in lines


def test_the_condition_image_of_fun_control_is_its_reference_image(tmp_path: Path) -> None:
    """Samples start from the clip's own first frame, as those without a reference image."""
    for name in ("a", "b"):
        numbered(tmp_path / f"{name}.mp4")
    image = picture(tmp_path / "a.condition.png")
    referenced = replace(GIVEN, condition_is_reference=True)
    report = index(tmp_path, referenced)
    a, b = report.clips
    assert a.conditions.as_reference and a.conditions.image and a.conditions.image.path == image
    assert b.conditions == FIRST_FRAME
    assert a.conditions.has_own_image and not a.conditions.starts_elsewhere
    assert np.array_equal(start_image(a), decode(a).frames[0])
    assert not np.array_equal(condition_image(a), start_image(a))
    assert "  with a reference image of their own: 1 clip" in report.lines()
    drawn = index(tmp_path, referenced, condition="random_frame").clips[1].conditions
    assert drawn.as_reference and drawn.has_own_image and drawn.image is None


def test_clips_without_a_control_video_are_counted(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        numbered(tmp_path / f"{name}.mp4")
    numbered(tmp_path / "b.control.mp4")
    (warning,) = [w.text for w in index(tmp_path).warnings if "control video" in w.text]
    assert warning.startswith(f"2 of 3 files of {tmp_path} have no control video")
    assert "such as a" in warning
    for name in ("a", "c"):
        numbered(tmp_path / f"{name}.control.mp4")
    assert not [w.text for w in index(tmp_path).warnings if "control video" in w.text]
    (tmp_path / "a.control.mp4").unlink()
    texts = [w.text for w in index(tmp_path, replace(GIVEN, takes_control=False)).warnings]
    assert not [text for text in texts if "have no control video" in text]


def test_what_a_model_has_no_use_for_is_said(tmp_path: Path) -> None:
    for name in ("a", "b"):
        numbered(tmp_path / f"{name}.mp4")
        picture(tmp_path / f"{name}.condition.png")
    numbered(tmp_path / "b.control.mp4").with_suffix(".txt").unlink()
    plain = replace(GIVEN, takes_condition_image=False, takes_control=False)
    report = index(tmp_path, plain)
    assert [clip.conditions for clip in report.clips] == [FIRST_FRAME] * 2
    texts = [warning.text for warning in report.warnings]
    assert any(t.startswith("2 condition images are not used, since the model") for t in texts)
    assert any(t.startswith("1 control video is not used, since the model") for t in texts)


def test_a_table_names_conditions(tmp_path: Path) -> None:
    numbered(tmp_path / "a.mp4")
    for name in ("images", "controls"):
        (tmp_path / name).mkdir()
    image = picture(tmp_path / "images" / "start.png")
    control = numbered(tmp_path / "controls" / "a.mp4")
    rows = [
        {"condition": "images/start.png"},
        {"control": "controls/a.mp4"},
        {"condition": "random_frame", "start": "0.5"},
        {"condition": "first_frame", "start": "1"},
        {"condition": "first", "start": "0.2"},
    ]
    file = table(tmp_path / "t.csv", *({"path": "a.mp4", "caption": "x", **row} for row in rows))
    report = index(file, condition="random_frame")
    (problem,) = report.problems
    assert problem.reason.startswith(
        "line 6: condition must be first_frame, random_frame or the path of an image ("
    )
    by_start = {clip.item_name: clip.conditions for clip in report.clips}
    assert len(report.clips) == 4
    given = [clip.conditions for clip in report.clips if clip.item_name == "a.mp4"]
    assert {each.image and each.image.path for each in given} == {None, image}
    assert {each.control and each.control.path for each in given} == {None, control}
    assert by_start["a.mp4@0.5-"].frame > 0 and by_start["a.mp4@1-"] == FIRST_FRAME
    # Of a model that takes none, the wish for another frame is said to have no effect.
    plain = replace(GIVEN, takes_condition_image=False)
    texts = [warning.text for warning in index(file, plain).warnings]
    assert any(t.startswith("condition: random_frame has no effect on 1 of 4") for t in texts)


def test_a_random_frame_is_drawn_once_by_the_seed_and_the_name(tmp_path: Path) -> None:
    numbered(tmp_path / "a.mp4")
    long = table(
        tmp_path / "t.csv", *({"path": "a.mp4", "start": f"{n / 1000}"} for n in range(300))
    )
    source = {"condition": "random_frame"}
    clips = index(long, **source).clips
    assert clips == index(long, **source).clips
    frames = [clip.conditions.frame for clip in clips]
    counts = Counter(frames)
    assert counts.keys() == set(range(9)) and min(counts.values()) > 15
    other = index(long, replace(GIVEN, seed=8), **source).clips
    assert [clip.conditions.frame for clip in other] != frames
    # A picture of its own comes before it.
    picture(tmp_path / "a.condition.png")
    clip = only(index(tmp_path, **source))
    assert clip.conditions.image and clip.conditions.frame == 0
    report = index(long, **source)
    line = f"  with a random frame as their condition image: {300 - counts[0]} clips"
    assert line in report.lines()


def spoiled(folder: Path, name: str) -> None:
    """Write the companion `name` of a clip in a way in which it can't be used."""
    numbered(folder / "a.mp4")
    file = folder / name
    if name == "a.control.mp4":
        numbered(file, 0.2).with_suffix(".txt").unlink()
    elif name == "a.control.webm":
        write_video(file, np.zeros((60, 64, 64, 3), np.uint8), 25)
    elif name == "a.condition.gif":
        frames = [Image.new("RGB", (64, 32), (n, 0, 0)) for n in (0, 200)]
        frames[0].save(file, save_all=True, append_images=frames[1:])
    elif name == "a.condition.png":
        file.write_bytes(b"no picture")
    elif name == "a.condition.jpg":
        picture(file)
        picture(folder / "a.condition.webp")
    else:
        picture(file)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.control.mp4", "its control video a.control.mp4 is too short (its last frame is at"),
        ("a.control.webm", "its control video a.control.webm has another aspect ratio (shown"),
        ("a.control.png", "its control video a.control.png is an image, and the clip is a video"),
        ("a.condition.gif", "its condition image a.condition.gif is not an image"),
        ("a.condition.png", "its condition image a.condition.png"),
        ("a.condition.jpg", "has 2 condition images (a.condition.jpg, a.condition.webp)"),
    ],
)
def test_a_condition_that_cannot_be_used_leaves_its_clip_out(
    tmp_path: Path, name: str, reason: str
) -> None:
    spoiled(tmp_path, name)
    report = index(tmp_path)
    (problem,) = report.problems
    assert not report.clips and problem.path == tmp_path / "a.mp4"
    assert problem.reason.startswith(reason)


# --- What is read of them ------------------------------------------------------------------------


def test_the_condition_image_is_the_frame_or_the_file(tmp_path: Path) -> None:
    numbered(tmp_path / "a.mp4")
    clip = only(index(tmp_path, condition="random_frame"))
    frames = decode(clip).frames
    for frame in (0, 3, 8):
        other = replace(clip, conditions=Conditions(frame=frame))
        assert np.array_equal(condition_image(other), frames[frame])
    picture(tmp_path / "a.condition.png")
    given = only(index(tmp_path))
    image = condition_image(given)
    assert image.shape == frames.shape[1:] and tuple(image[16, 4]) == (250, 20, 30)
    # It is varied like its clip.
    mirrored = condition_image(replace(given, variation=Variation(mirrored=True)))
    assert np.array_equal(mirrored, image[:, ::-1])
    dark = condition_image(replace(given, variation=Variation(brightness=0.5)))
    assert np.abs(dark.astype(int) - image // 2).max() <= 1


def test_a_transparent_condition_image_lies_over_the_background(tmp_path: Path) -> None:
    numbered(tmp_path / "a.mp4")
    Image.new("RGBA", (64, 32), (0, 0, 0, 0)).save(tmp_path / "a.condition.png")
    for background in ((255, 255, 255), (20, 30, 40)):
        clip = only(index(tmp_path, replace(GIVEN, background=background)))
        assert (condition_image(clip) == background).all()


@pytest.mark.parametrize("strategy", ["head", "middle", "random"])
def test_a_control_video_is_read_at_the_instants_of_its_clip(tmp_path: Path, strategy) -> None:
    """Also if its frame rate and its clock are others."""
    numbered(tmp_path / "a.mp4", 3.0)
    times = [1.0 + time for time in steady(Fraction(50), 3.0)]
    control = write_numbered(tmp_path / "a.control.mp4", times)
    control.with_suffix(".txt").unlink()
    clip = only(index(tmp_path, replace(GIVEN, frame_strategy=strategy, fps=5.0), speed=2.0))
    assert clip.fps == 2.5 and clip.conditions.control
    own = [number_of(frame) for frame in decode(clip).frames]
    found = control_frames(clip, clip.conditions.control, range(clip.frames))
    assert found.shape[1:] == (SIZE[1], SIZE[0], 3)
    assert all(abs(number_of(frame) - 2 * n) <= 1 for frame, n in zip(found, own, strict=True))
    (last,) = control_frames(clip, clip.conditions.control, [clip.frames - 1])
    assert np.array_equal(last, found[-1])


def test_a_control_video_is_cropped_and_mirrored_like_its_clip_and_keeps_its_colors(
    tmp_path: Path,
) -> None:
    pattern = np.zeros((9, 64, 96, 3), np.uint8)
    pattern[:, :, :40] = 200
    pattern[:, :20] = 90
    for name in ("a.mp4", "a.control.mp4"):
        write_video(tmp_path / name, pattern, 16)
    (tmp_path / "a.txt").write_text("a test", encoding="utf-8")
    clip = only(index(tmp_path, replace(GIVEN, resolutions=("64x48",))))
    variation = Variation(mirrored=True, kept=0.8, left=0.2, top=0.9)
    clip = replace(clip, variation=variation)
    assert clip.conditions.control
    control = control_frames(clip, clip.conditions.control, range(9))
    assert np.array_equal(control, decode(clip).frames)
    dark = replace(clip, variation=replace(variation, brightness=0.5))
    assert np.array_equal(control_frames(dark, clip.conditions.control, range(9)), control)
    assert not np.array_equal(decode(dark).frames, control)


def test_a_damaged_condition_names_its_clip(tmp_path: Path) -> None:
    numbered(tmp_path / "a.mp4")
    image = picture(tmp_path / "a.condition.png")
    clip = only(index(tmp_path))
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(DataError, match=r"a\.mp4: its condition image a\.condition\.png "):
        condition_image(clip)
