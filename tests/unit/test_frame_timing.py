"""Which frames of a video a clip has: those nearest to the wanted instants, at any rates."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from onewan.data.clip import Clip, ClipSource
from onewan.data.decode import decode
from onewan.data.index import index_clips
from onewan.media import probe
from tests.support.clips import planner
from tests.support.numbered_video import (
    RATES,
    are_nearest,
    number_of,
    steady,
    variable,
    write_numbered,
)

SECONDS = 2.5
STRATEGIES = ("uniform", "middle", "head", "random", "keyframe", "chunks", "sliding", "all")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    """A folder of a video for each rate, and the times of their frames by name."""
    folder = tmp_path_factory.mktemp("rates")
    times = {f"{name}.mp4": steady(rate, SECONDS) for name, rate in RATES.items()}
    times["variable.mp4"] = variable(SECONDS)
    for name, each in times.items():
        write_numbered(folder / name, each)
    return folder, times


def clips_of(folder: Path, **settings: object) -> tuple[Clip, ...]:
    settings = {"min_resolution": (1, 1), "resolutions": ("64x32",)} | settings
    report = index_clips([ClipSource(path=folder)], planner(**settings), use_masks=False)
    assert not report.problems
    return report.clips


def numbers_of(clip: Clip) -> list[int]:
    return [number_of(frame) for frame in decode(clip).frames]


@pytest.mark.parametrize("fps", [8.0, 16.0, 24.0, 30.0])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_clip_has_the_frames_nearest_to_its_instants(
    sources: tuple[Path, dict[str, list[float]]], strategy: str, fps: float
) -> None:
    folder, times = sources
    clips = clips_of(folder, frame_strategy=strategy, fps=fps, max_frames=9, clips_per_video=2)
    assert {clip.path.name for clip in clips} == set(times)
    for clip in clips:
        instants = [clip.start + k / fps for k in range(9)]
        assert are_nearest(numbers_of(clip), times[clip.path.name], instants), clip.name
        # The whole clip is within the file, to half a frame.
        info = probe(clip.path)
        assert instants[0] >= info.start - 1e-6
        assert instants[-1] <= info.last + info.frame_interval / 2 + 1e-6, clip.name


@pytest.mark.parametrize("rate", ["25", "29.97", "50"])
def test_at_its_own_rate_or_half_of_it_no_frame_comes_twice(
    sources: tuple[Path, dict[str, list[float]]], rate: str
) -> None:
    folder, _ = sources
    for divisor in (1, 2):
        for strategy in STRATEGIES:
            fps = float(RATES[rate]) / divisor
            for clip in clips_of(folder, frame_strategy=strategy, fps=fps, max_frames=9):
                if clip.path.name == f"{rate}.mp4":
                    numbers = numbers_of(clip)
                    assert numbers == list(range(numbers[0], numbers[0] + 9 * divisor, divisor))


def test_ten_minutes_do_not_drift(tmp_path: Path) -> None:
    times = steady(Fraction(12), 600)
    write_numbered(tmp_path / "long.mp4", times, key_frame_every=120)
    clips = clips_of(tmp_path, frame_strategy="chunks", fps=16.0, max_frames=81)
    assert len(clips) == 600 * 16 // 81
    for index, clip in enumerate(clips):
        # On the frame of the file at or before the exact place, however far from the beginning.
        late = index * 81 / 16 - clip.start
        assert -1e-6 <= late < 1 / 12, clip.name
    for clip in (clips[0], clips[len(clips) // 2], clips[-1]):
        instants = [clip.start + k / 16 for k in range(81)]
        assert are_nearest(numbers_of(clip), times, instants)
    (last,) = clips_of(tmp_path, frame_strategy="uniform", fps=12.0, max_frames=81)
    assert numbers_of(last) == list(range(3559, 3559 + 81))


def test_a_faster_speed_takes_frames_further_apart(tmp_path: Path) -> None:
    times = steady(Fraction(32), 2.5)
    write_numbered(tmp_path / "a.mp4", times)
    settings = planner(frame_strategy="head", max_frames=9, resolutions=("64x32",))
    for speed, step in ((1.0, 2), (2.0, 4), (0.5, 1)):
        folder = ClipSource(path=tmp_path, speed=speed)
        (clip,) = index_clips([folder], settings, use_masks=False).clips
        assert numbers_of(clip) == list(range(0, 9 * step, step))


def test_a_part_of_a_table_has_no_frame_from_outside_at_a_variable_rate(tmp_path: Path) -> None:
    # Two shots that meet at 2.0 s, where the gaps between frames are long.
    times = [k / 20 for k in range(30)] + [2.0, 2.4, 2.8] + [3 + k / 20 for k in range(30)]
    write_numbered(tmp_path / "a.mp4", times)
    cut, table = times.index(2.0), tmp_path / "t.csv"
    table.write_text("path,caption,start,end\na.mp4,x,,2\na.mp4,y,2,\n", encoding="utf-8")
    settings = planner(frame_strategy="all", max_frames=17, resolutions=("64x32",))
    report = index_clips([ClipSource(path=table)], settings, use_masks=False)
    for clip in report.clips:
        numbers = numbers_of(clip)
        assert (max(numbers) < cut) if clip.captions == ("x",) else (min(numbers) >= cut), clip.name
    assert {clip.captions for clip in report.clips} == {("x",), ("y",)}


def test_the_longest_duration_is_that_of_the_clip_at_any_speed(tmp_path: Path) -> None:
    write_numbered(tmp_path / "a.mp4", steady(Fraction(32), 2.5))
    settings = planner(max_frames=17, max_duration=17 / 16, resolutions=("64x32",))
    for speed in (0.5, 1.0, 2.0):
        folder = ClipSource(path=tmp_path, speed=speed)
        (clip,) = index_clips([folder], settings, use_masks=False).clips
        assert (clip.frames, clip.fps) == (17, 16 / speed)


def test_a_slow_video_comes_as_it_was_chosen(tmp_path: Path) -> None:
    write_numbered(tmp_path / "slow.mp4", steady(Fraction(8), 3))
    write_numbered(tmp_path / "film.mp4", steady(RATES["23.976"], 3))
    found = dict[str, tuple[list[int] | None, list[str]]]()
    for choice in ("repeat", "keep_rate", "skip"):
        settings = planner(
            frame_strategy="head", max_frames=9, resolutions=("64x32",), slow_video=choice
        )
        report = index_clips([ClipSource(path=tmp_path)], settings, use_masks=False)
        clips = {clip.name: clip for clip in report.clips}
        assert clips["film.mp4"].fps == 16.0  # faster than the 16 that are wanted
        slow = clips.get("slow.mp4")
        texts = [w.text for w in report.warnings if w.path and w.path.name == "slow.mp4"]
        texts += [problem.reason for problem in report.problems]
        found[choice] = (
            slow and numbers_of(slow),
            [t for t in texts if " fps " in t or "per second" in t],
        )
    less = "8 fps is less than the 16 that are trained on, so"
    assert found["repeat"] == (
        # Between two frames, the earlier one.
        [0, 0, 1, 1, 2, 2, 3, 3, 4],
        [f"{less} some frames come twice (see video_data.slow_video)"],
    )
    assert found["keep_rate"] == (
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
        [
            f"{less} it is taken at its own rate and seems 2.00 times as fast "
            "(see video_data.slow_video)"
        ],
    )
    numbers, (reason,) = found["skip"]
    assert numbers is None
    assert reason.startswith("has 8 frames per second, fewer than the 16 that are trained on")


def test_a_rate_that_is_nearly_the_wanted_one_is_not_slow(tmp_path: Path) -> None:
    write_numbered(tmp_path / "film.mp4", steady(RATES["23.976"], 2.5))
    report = index_clips(
        [ClipSource(path=tmp_path)],
        planner(fps=24.0, max_frames=57, slow_video="skip", resolutions=("64x32",)),
        use_masks=False,
    )
    assert not report.problems
    assert not [warning for warning in report.warnings if "fps" in warning.text]
