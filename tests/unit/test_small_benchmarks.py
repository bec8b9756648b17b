"""The benchmarks of memory by phase, batching, offloading and batch scaling, small: each runs to
its end, and what it counts agrees with the memory plan."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean
from types import ModuleType

import batch_scaling
import batching
import device_memory
import gpu_settings
import offloading
import pytest
import scaling
import simulated_gpu  # registers the device
import torch
import vae_memory
from figures import Figure, Value, read_figure
from plots import draw

from onewan.data.clip import Clip

assert simulated_gpu

SMALL = ("--width", "128", "--blocks", "2")


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Figure]:
    """Runs a benchmark; returns its figure, whose charts can be drawn."""

    def run(benchmark: ModuleType, *arguments: str) -> Figure:
        threads = torch.get_num_threads()
        try:
            assert benchmark.main([*SMALL, *arguments, "--json", str(tmp_path / "it.json")]) == 0
        finally:
            torch.set_num_threads(threads)
        figure = read_figure(tmp_path / "it.json")
        assert len(draw(figure)) == len(figure.charts) > 0
        return figure

    return run


def by_measure(figure: Figure, **case: str | int) -> Mapping[str, Value]:
    wanted = {key.replace("_", " "): part for key, part in case.items()}
    return {v.measure: v for v in figure.values if wanted.items() <= dict(v.case).items()}


@pytest.mark.long
def test_batch_scaling(run: Callable[..., Figure]) -> None:
    figure = run(batch_scaling, "--batch", "1", "2", "--steps", "1", "--size", "5x96x96")
    one, two = (by_measure(figure, batch_size=size) for size in (1, 2))
    assert one["samples per second"].ratio == 1
    assert two["samples per second"].expected == pytest.approx(one["samples per second"].median)
    for found in (one, two):
        peak = found["device peak"]
        assert peak.expected == pytest.approx(peak.median, rel=0.25)
    assert two["device peak"].median > 1.1 * one["device peak"].median


@pytest.mark.long
def test_offloading(run: Callable[..., Figure]) -> None:
    # Block inputs of smaller clips are too small to leave the device.
    figure = run(offloading, "--size", "17x128x128")
    names = list(offloading.SETTINGS)
    found = [by_measure(figure, settings=name) for name in names]
    for measures in found:
        assert measures["waits of the host per step"].median == 1
        assert measures["blocks waited for"].median == 0
        for direction in ("device", "host"):
            copied = measures[f"to the {direction} per step"]
            assert copied.expected == pytest.approx(copied.median, rel=0.05)
    resident, *_, last = found
    assert resident["to the device per step"].median == 0
    assert last["to the host per step"].median > 0
    assert last["device peak"].median < resident["device peak"].median
    hidden = [v for v in figure.values if v.measure == "copy time hidden (predicted)"]
    assert len(hidden) == len(offloading.PREDICTED) * len(offloading.MACHINES)
    assert all(0 <= value.median <= 1 for value in hidden)


@pytest.mark.long
def test_device_memory(run: Callable[..., Figure]) -> None:
    figure = run(device_memory, "--size", "5x96x96")
    phases = {
        "encoding clips",
        "validation",
        "sampling: denoising",
        "sampling: decoding",
        "training",
    }
    for name in device_memory.SETTINGS:
        own = [value for value in figure.values if value.case["settings"] == name]
        assert {value.case["phase"] for value in own} == phases
        for value in own:
            assert value.expected == pytest.approx(value.median, rel=0.35), value.case


@pytest.mark.long
def test_memory_settings(run: Callable[..., Figure]) -> None:
    names = ["attention computed again", "without gradient checkpointing", "weights in nf4"]
    size = ["--size", "5x64x64", "--steps", "1", "--width", "256"]
    figure = run(gpu_settings, *size, "--only", gpu_settings.PLAIN, *names)
    for name in names[:2]:
        duration = by_measure(figure, settings=name)["duration of a step"]
        assert duration.median > 0 and duration.ratio and duration.baseline == gpu_settings.PLAIN
    assert set(by_measure(figure, settings=names[2])) == {"duration of a step"}


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux counts what is sent")
def test_scaling(run: Callable[..., Figure]) -> None:
    figure = run(scaling, "--gpus", "1", "8", "16")
    for processes, parts, of_gradients in [(2, "2 parts", 1), (4, "4 parts", 1.5)]:
        found = by_measure(figure, processes=processes, counted=parts)
        collectives = found["collectives in a step"]
        assert set(collectives.repeats) == {collectives.expected}
        sent = found["sent by each in a step"]
        assert len(sent.repeats) == processes
        assert sent.expected == pytest.approx(mean(sent.repeats), rel=scaling.TOLERANCE)
        assert found["difference"].limit == scaling.TOLERANCE
        # Gradients are almost all of it: two matrices of rank 32 for each linear layer.
        widths = [128 + 128] * 8 + [128 + 345] * 2
        assert sent.median == pytest.approx(of_gradients * 4 * 32 * 2 * sum(widths) / 1e3, rel=0.02)
    for processes, counted in [
        *((2, "2 parts, sharded"), (4, "4 parts, sharded"), (4, "4 parts, sharded within 2")),
        *((2, "2 of a clip"), (4, "4 of a clip")),
    ]:
        found = by_measure(figure, processes=processes, counted=counted)
        collectives = found["collectives in a step"]
        assert set(collectives.repeats) == {collectives.expected}
        assert found["difference"].keeps_limit
    side_by_side = by_measure(figure, processes=4, counted="2 experts x 2 parts")
    two = by_measure(figure, processes=2, counted="2 parts")["sent by each in a step"]
    assert side_by_side["sent by each in a step"].median == pytest.approx(two.median, rel=0.01)
    one, eight, sixteen = (
        by_measure(figure, simulated="TI2V-5B, H100", GPUs=gpus) for gpus in (1, 8, 16)
    )
    by_nvlink, by_ethernet = (f"efficiency, {n}" for n in (scaling.NVLINK, scaling.ETHERNET))
    assert one[by_nvlink].median == 100 > eight[by_nvlink].median > sixteen[by_nvlink].median
    assert sixteen[by_nvlink].median > 1.1 * sixteen[by_ethernet].median
    assert eight["device memory of each"].median == one["device memory of each"].median
    goal = by_measure(figure, simulated="T2V-A14B, H100", GPUs=8)[by_nvlink]
    assert goal.at_least and goal.limit == scaling.GOAL and goal.keeps_limit
    for kind in ("FSDP2", "HSDP"):
        name = f"T2V-A14B, H100, full fine-tuning, {kind}"
        assert not by_measure(figure, simulated=name, GPUs=1)  # where it does not fit
        goal = by_measure(figure, simulated=name, GPUs=8)[by_nvlink]
        assert goal.at_least and goal.limit == scaling.FINE_TUNING_GOAL and goal.keeps_limit
    clip = "T2V-A14B, H100, one clip, Ulysses"
    one, eight = (by_measure(figure, simulated=clip, GPUs=gpus) for gpus in (1, 8))
    assert 6 < one["a step"].median / eight["a step"].median < 8
    assert not by_measure(figure, simulated=clip, GPUs=16)  # on one machine


@pytest.mark.long
def test_the_vae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny one in place of the true size, whose figures are only for that."""
    small = {"t2v-a14b": {"base_dim": 8}}
    monkeypatch.setattr(vae_memory, "TRUE_SIZE", small)
    file = tmp_path / "it.json"
    arguments = ["--device", "sim", "--size", "9x64x64", "--json", str(file)]
    assert vae_memory.main(arguments) == 0
    figure = read_figure(file)
    for what in ("encoding", "decoding", vae_memory.EXACT):
        found = by_measure(figure, what=what, size="9x64x64")
        assert found["duration"].median > 0
        assert found["device peak"].expected == pytest.approx(found["device peak"].median, rel=0.3)


@pytest.mark.long
def test_batching(run: Callable[..., Figure]) -> None:
    figure = run(batching, "--batch", "1", "4", "--resolution", "64", "--size", "17x64x64")
    one, four = (by_measure(figure, batch_size=size) for size in (1, 4))
    assert one["batches per epoch"].median == 32
    assert one["places taken"].median == 1
    assert four["places taken"].median < 1
    assert four["padding"].median == 0
    assert 0 < four["padding, clips in order"].median < four["padding, clips in any order"].median
    assert four["device peak / batch size"].median < one["device peak / batch size"].median


# --------------------------------------------------------------------------------- waste by hand


def clip(frames: int, width: int, height: int) -> Clip:
    return Clip(
        path=Path("a.mp4"), name=f"{frames}", captions=("a",), kind="video", start=0.0, fps=16.0,
        frames=frames, size=(width, height), source_size=(width, height), repeats=1,
    )  # fmt: skip


def test_padding_and_empty_places_of_two_shapes() -> None:
    wide, tall = clip(17, 128, 64), clip(17, 64, 128)
    clips = [wide, wide, wide, tall]
    # Batches of two of one shape: two full ones of three places taken, and one of two.
    assert batching.waste(clips, 2).empty == pytest.approx(1 - 4 / 6)
    # Both together are padded to 128 x 128, of which each fills a half.
    assert batching.padding([wide, tall], 2) == pytest.approx(0.5)
    assert batching.padding([wide, wide], 2) == 0
    assert batching.padding([wide, tall], 1) == 0
    longer = replace(wide, frames=33)
    # 5 and 9 latent frames: 4 of 18 are padding.
    assert batching.padding([wide, longer], 2) == pytest.approx(4 / 18)
