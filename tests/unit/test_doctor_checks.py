"""The parts of `onewan doctor` that need no files: pixels, hashes, names, numbers of tokens."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from onewan.devices import torch_build
from onewan.doctor import environment, finding, needs
from onewan.doctor.captions import estimated_tokens
from onewan.doctor.duplicates import alike, same_content
from onewan.doctor.environment import Environment, environment_ahead
from onewan.doctor.finding import without_names
from onewan.doctor.inspection import small_size
from onewan.doctor.packages import OPTIONAL, read_requirements
from onewan.doctor.pixels import HASH_BITS, look_at_pixels
from onewan.doctor.torch_facts import Device, Torch, ask_torch
from onewan.model import device_report

GB = 10**9


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
        devices=(
            Device(
                name="cuda:0",
                kind="CUDA",
                title="NVIDIA GeForce RTX 4090",
                memory=25_400_000_000,
                capability="8.9",
            ),
        ),
        attention={"flash": "", "xformers": "can't be imported: no kernel image"},
    ),
    cards=(),
    driver="570.12",
    packages={"numpy": "2.0.0"},
    optional={"torchao": "0.14", "flash-attn": "", "pyarrow": "", "aiohttp": ""},
    extras={"torchao": "lowbit", "pyarrow": "remote", "aiohttp": "remote"},
    variables={"CUDA_VISIBLE_DEVICES": "0"},
)


def test_the_environment_says_what_absent_packages_would_give() -> None:
    lines = list(ENVIRONMENT.lines())
    assert "attention  flash, xformers (can't be imported: no kernel image)" in lines
    assert "optional   torchao 0.14" in lines
    absent = lines[lines.index("optional   torchao 0.14") + 1 :]
    assert absent == [
        "not there  with pip install flash-attn:",
        f"             flash-attn  {OPTIONAL['flash-attn']}",
        '           with pip install "onewan[remote]":',
        f"             pyarrow     {OPTIONAL['pyarrow']}",
        f"             aiohttp     {OPTIONAL['aiohttp']}",
    ]
    assert not any("not there" in line for line in replace(ENVIRONMENT, optional={}).lines())


def test_every_package_of_an_extra_says_what_it_gives() -> None:
    extras = read_requirements().extras
    assert extras and extras.keys() <= OPTIONAL.keys()


def test_a_package_is_installed_by_the_extra_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "torch>=2.6",
        'bitsandbytes>=0.46; extra == "lowbit"',
        'onewan[lowbit]; extra == "optimizers"',
        "prodigyopt>=1.1.2 ; extra == 'optimizers'",
        "aiohttp; python_version >= '3.10' and extra == 'remote'",
        'prodigyopt>=1.1.2; extra == "all"',
        "ruff; extra == 'dev'",
        "mkdocs-material; extra == 'docs'",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: lines)
    found = read_requirements()
    assert found.required == {"torch": ">=2.6"}
    assert found.extras == {
        "bitsandbytes": "lowbit",
        "prodigyopt": "optimizers",
        "aiohttp": "remote",
    }


@pytest.mark.parametrize(
    ("device", "line"),
    [
        (
            Device(name="cuda:0", kind="ROCm", title="AMD Radeon", capability="gfx1100"),
            "AMD Radeon (cuda:0, ROCm), architecture gfx1100",
        ),
        (
            Device(name="xpu:0", kind="XPU", title="Intel Arc B580", memory=12 * GB, driver="1.6"),
            "Intel Arc B580 (xpu:0, XPU), 12.0 GB, driver 1.6",
        ),
        (
            Device(name="mps:0", kind="MPS", title="Apple GPU", without=("float8_e4m3fn",)),
            "Apple GPU (mps:0, MPS), no float8_e4m3fn",
        ),
    ],
)
def test_a_device_is_described_on_one_line(device: Device, line: str) -> None:
    assert device.line() == line
    torch = replace(ENVIRONMENT.torch, devices=(device,))
    assert f"device     {line}" in [*replace(ENVIRONMENT, torch=torch).lines()]


def test_a_run_is_planned_for_the_device_that_torch_finds_where_nvidias_driver_has_none() -> None:
    radeon = Device(name="cuda:0", kind="ROCm", title="AMD Radeon", memory=24 * GB)
    found = replace(ENVIRONMENT, torch=replace(ENVIRONMENT.torch, devices=(radeon,)))
    config: Any = SimpleNamespace(memory=SimpleNamespace(vram=None, ram="64GB"))
    machine, is_assumed = needs._machine(config, found)
    assert (machine.name, machine.vram, is_assumed) == ("AMD Radeon", 24 * GB, False)
    config.memory.vram = "12GB"
    assert needs._machine(config, found)[0].vram == 12 * GB
    none = replace(ENVIRONMENT, torch=replace(ENVIRONMENT.torch, devices=()))
    config.memory.vram = None
    assert needs._machine(config, none)[1]


def environment_of(
    monkeypatch: pytest.MonkeyPatch, torch: Torch, cards: tuple[str, ...] = ()
) -> Environment:
    monkeypatch.setattr(environment, "ask_torch", lambda: torch)
    monkeypatch.setattr(environment, "_driver", lambda: ("570.12" if cards else "", cards))
    return environment_ahead()()


def test_a_card_that_a_variable_hides_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    torch = Torch(version="2.9.0", build="CUDA 12.8", attention={"flash": ""})
    found = environment_of(monkeypatch, torch, ("RTX 4090",))
    (about_device,) = [f for f in found.findings if f.kind == "device"]
    assert about_device.severity == "note"
    assert about_device.text.startswith("CUDA_VISIBLE_DEVICES=-1 ")
    assert about_device.text.endswith(" hides RTX 4090 from torch")
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    found = environment_of(monkeypatch, torch, ("RTX 4090",))
    assert [f.severity for f in found.findings if f.kind == "device"] == ["problem"]


def test_a_card_that_emulates_bfloat16_and_one_that_fails_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = Device(name="cuda:0", kind="CUDA", title="RTX 2080", emulates_bfloat16=True)
    torch = Torch(version="2.9.0", build="CUDA 12.8", devices=(old,), error="no kernel image")
    texts = [f.text for f in environment_of(monkeypatch, torch).findings]
    assert any(text.startswith("RTX 2080 computes bfloat16 without units") for text in texts)
    assert any("trying to compute ends with an error (no kernel image)" in text for text in texts)


def test_the_environment_has_no_names_of_people_and_machines_and_no_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = Path("/somewhere/maria")
    monkeypatch.setattr(Path, "home", lambda: home)
    monkeypatch.setattr(finding.getpass, "getuser", lambda: "maria")
    monkeypatch.setattr(platform, "node", lambda: "marias-computer")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", f"snapshot:{home}/file")
    torch = Torch(version=None, error=without_names(f"{home}/lib/libtorch.so: undefined symbol"))
    found = environment_of(monkeypatch, torch)
    shown = json.dumps([found.as_data(), [f.text for f in found.findings], [*found.lines()]])
    assert "~/lib/libtorch.so" in shown and "snapshot:~/file" in shown
    assert not re.search("maria|secret", shown)


def test_what_torch_says_is_read_line_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a process that a driver ends, what it had found before is kept."""
    device = {"name": "cuda:0", "kind": "CUDA", "title": "H100", "without": ["bfloat16"]}
    said = json.dumps({"version": "2.9", "build": "CUDA 12.8", "devices": [device]})
    done = subprocess.CompletedProcess("", -11, f"a package says hello\n{said}\n", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    found = ask_torch()
    assert found.version == "2.9" and found.devices[0].without == ("bfloat16",)
    assert found.error == "the process that imports it ends with status -11"


def test_a_backend_whose_package_does_not_suit_torch_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "xformers" / "ops"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    text = "raise OSError('undefined symbol: _ZN2at')"
    (package / "__init__.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    tried = ("flash", "cudnn", "flash_attn", "xformers")
    monkeypatch.setattr(device_report, "fused_attention", lambda _: tried)
    facts, attention = device_report.report()
    assert facts == {"version": torch.__version__, "build": torch_build(), "devices": []}
    assert attention["attention"] == {
        "flash": "",
        "cudnn": "PyTorch has no such kernel for cpu",
        "xformers": "can't be imported: undefined symbol: _ZN2at",
        "math": "",
    }
