"""The parts of `onewan doctor` that need no files: pixels, hashes, names, numbers of tokens."""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onewan.doctor import finding
from onewan.doctor.captions import estimated_tokens
from onewan.doctor.duplicates import alike, same_content
from onewan.doctor.environment import OPTIONAL, Environment, Torch
from onewan.doctor.finding import without_names
from onewan.doctor.inspection import small_size
from onewan.doctor.pixels import HASH_BITS, look_at_pixels


def scene(frames: int, *, step: int = 2, seed: int = 0) -> np.ndarray:
    """A bright picture of soft shapes that moves by `step` pixels a frame: [F, 60, 100, 3]."""
    random = np.random.default_rng(seed)
    shapes = Image.fromarray(random.integers(70, 255, (6, 12, 3), np.uint8))
    picture = np.asarray(shapes.resize((300, 60), Image.Resampling.BICUBIC))
    return np.stack([picture[:, step * k : step * k + 100] for k in range(frames)])


def kinds(frames: np.ndarray) -> list[str]:
    return [kind for kind, _ in look_at_pixels(frames).notes()]


def texts(frames: np.ndarray) -> str:
    return " ".join(text for _, text in look_at_pixels(frames).notes())


def test_an_ordinary_clip_and_an_image_have_no_notes() -> None:
    assert kinds(scene(9)) == [] and kinds(scene(1)) == []


def test_black_frames_are_counted() -> None:
    frames = scene(20)
    assert kinds(np.zeros_like(frames) + 16) == ["near black"]
    frames[:2] = 5
    assert "2 of its 20 frames are black" in texts(frames)
    frames[1] = frames[9]
    assert kinds(frames) == []  # a single one may be a fade
    night = scene(20) // 20
    night[:, 20:30, 40:50] = 200  # a dark scene with a lamp in it
    assert "near black" not in kinds(night)


def test_a_clip_in_which_nothing_moves_is_frozen_in_spite_of_noise() -> None:
    random = np.random.default_rng(1)
    still = np.repeat(scene(1), 9, axis=0).astype(np.int16)
    noisy = np.clip(still + random.integers(-3, 4, still.shape), 0, 255).astype(np.uint8)
    assert kinds(noisy) == ["frozen"]
    noisy[4:, 30:34, 40:44] = 255  # something small appears
    assert kinds(noisy) == ["frozen"] and "7 of its 9 frames are as the one before" in texts(noisy)
    doubled = np.repeat(scene(5), 2, axis=0)[:9]  # a file of half the frame rate
    assert "4 of its 9 frames are as the one before" in texts(doubled)


@pytest.mark.parametrize(("axis", "sides"), [(1, "top (10 %) and bottom (5 %)"), (2, "left (6 %)")])
def test_bars_are_measured_on_both_sides(axis: int, sides: str) -> None:
    frames = scene(9)
    view = np.moveaxis(frames, axis, 1)
    view[:, :6] = 17
    assert kinds(frames) == []  # at one side only: a dark floor, for instance
    view[:, -3:] = 17
    assert kinds(frames) == ["letterboxed"] and sides in texts(frames)


def test_hashes_differ_in_few_bits_for_another_size_and_in_many_for_another_scene() -> None:
    def hashed(frames: np.ndarray) -> bytes:
        found = look_at_pixels(frames).hash
        assert found is not None
        return found

    frames = scene(9)
    smaller = np.stack([np.asarray(Image.fromarray(f).resize((70, 40))) for f in frames])
    brighter = np.clip(frames * 0.9 + 20, 0, 255).astype(np.uint8)
    others = [hashed(scene(9, seed=seed)) for seed in range(1, 30)]
    assert len(hashed(frames)) * 8 == 3 * HASH_BITS
    table = dict(enumerate([*others, hashed(frames), hashed(smaller), hashed(brighter)]))
    assert alike(table) == {30: 29, 31: 29}
    assert alike({0: hashed(frames), 1: hashed(scene(1))}) == {}  # a video and an image
    assert look_at_pixels(np.full((9, 60, 100, 3), 128, np.uint8)).hash is None


def test_the_first_of_several_equal_hashes_is_named_over_the_whole_table() -> None:
    random = np.random.default_rng(2)
    hashes = {index: random.bytes(24) for index in range(700)}
    hashes[650], hashes[699] = hashes[3], hashes[3]
    assert alike(hashes) == {650: 3, 699: 3}
    assert same_content(["a", "b", "a", "c", "b", "a"]) == {2: 0, 4: 1, 5: 0}


def test_names_of_users_are_not_in_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/maria"))
    monkeypatch.setattr(finding.getpass, "getuser", lambda: "maria")
    assert without_names("/home/maria/clips/a.mp4: is empty") == "~/clips/a.mp4: is empty"
    assert without_names("/home/other/x, C:\\Users\\Jo Smith\\y") == "~/x, ~\\y"
    assert without_names("/data/maria/x of maria") == "/data/USER/x of maria"
    assert without_names("'/data/maria', /data/mariachi") == "'/data/USER', /data/mariachi"
    assert without_names("/srv/clips") == "/srv/clips"


def test_tokens_are_estimated_for_words_and_for_scripts_without_spaces() -> None:
    assert estimated_tokens("") == 1
    assert 12 <= estimated_tokens("a cyclist in dark clothes waits between two cars") <= 20
    assert 8 <= estimated_tokens("一只兔子从洞里爬出来伸懒腰") <= 14


@pytest.mark.parametrize(
    ("size", "small"),
    [((832, 480), (288, 166)), ((480, 832), (166, 288)), ((80, 48), (80, 48))],
)
def test_small_frames_have_even_sides(size: tuple[int, int], small: tuple[int, int]) -> None:
    assert small_size(size) == small


ENVIRONMENT = Environment(
    onewan="0.1.0",
    python="3.12.0",
    system="Linux",
    processor="8 CPU cores",
    memory=64 * 10**9,
    disk_free=10**12,
    torch=Torch(
        version="2.9.0",
        build="CUDA 12.8",
        devices=("NVIDIA GeForce RTX 4090, 25.4 GB, compute capability 8.9",),
        attention={"flash": "", "xformers": "can't be imported: no kernel image"},
    ),
    cards=(),
    driver="570.12",
    packages={"numpy": "2.0.0"},
    optional={"torchao": "0.14", "flash-attn": "", "pyarrow": ""},
)


def test_the_environment_says_what_absent_packages_would_give() -> None:
    lines = list(ENVIRONMENT.lines())
    assert "attention  flash, xformers (can't be imported: no kernel image)" in lines
    assert "optional   torchao 0.14" in lines
    absent = lines[lines.index("optional   torchao 0.14") + 1 :]
    assert absent == [
        f"not there  flash-attn would give {OPTIONAL['flash-attn']}",
        f"           pyarrow    would give {OPTIONAL['pyarrow']}",
    ]
    assert not any("not there" in line for line in replace(ENVIRONMENT, optional={}).lines())


def test_every_package_of_an_extra_says_what_it_gives() -> None:
    requirements = importlib.metadata.requires("onewan") or []
    extras = {
        re.split(r"[\s<>=;\[]", line)[0]
        for line in requirements
        if "extra ==" in line and not re.search(r"extra == ['\"]dev['\"]", line)
    }
    assert extras and extras <= OPTIONAL.keys()
