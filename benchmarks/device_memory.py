"""The peak of device memory in each phase of whole runs, beside the memory plan.

A run encodes its clip, validates, trains both experts in turn and samples a video,
with all blocks resident and with everything streamed or offloaded. Between two events of the run
(an encoded clip, a step, a denoising step, a video) the device's peak is read, and belongs to the
phase that ends there. On the CPU the device is the simulated accelerator of
``tests/simulated_gpu``, which counts what PyTorch allocates; kernels have no workspaces there, and
the composite of RMSNorm takes the place of the fused kernel that CUDA and ROCm have.

    python benchmarks/device_memory.py [--json FILE]
    python benchmarks/device_memory.py --device cuda --true-size --size 33x480x832
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from figures import Chart, Figure, Value, add_output_options, measured_here, on_its_device, save
from measuring import release, simulated_device
from small_runs import SmallRuns, add_scale_options, scale_in_words, write_runs

from onewan.devices import device_memory, reset_peak
from onewan.runs.events import (
    Encoding,
    Event,
    MemoryPlanned,
    Sampled,
    Sampling,
    StepDone,
    Validated,
)
from onewan.train.trainer import WanTrainer

COMMON = (
    "train.steps=4",
    "train.save_every=100",
    "validation={clips: 1, timesteps: 1}",
    "logging.tensorboard=false",
    "memory.attention=flash",
    "memory.feed_forward_chunks=1",
)
SETTINGS: dict[str, tuple[str, ...]] = {
    "all resident": (
        "memory.resident_blocks={all}",
        "memory.offload_inputs=false",
        "memory.keep_attention=no",
    ),
    "all streamed, block inputs and attention on the host": (
        "memory.resident_blocks=0",
        "memory.offload_inputs=true",
        "memory.keep_attention=host",
    ),
    "the same with weights in fp8": (
        "memory.weights=fp8",
        "memory.resident_blocks=0",
        "memory.offload_inputs=true",
        "memory.keep_attention=host",
    ),
}


class PhasePeaks:
    """Listens to a run, and keeps the device's highest peak of each phase."""

    def __init__(self, device: torch.device) -> None:
        self.peaks: dict[str, int] = {}
        self.planned: dict[str, int] = {}
        self._device = device
        self._before = device_memory(device)[0] or 0

    def __call__(self, event: Event) -> None:
        _, peak = device_memory(self._device)
        if isinstance(event, MemoryPlanned):
            phases: Any = event.plan["phases"]
            self.planned = {phase["phase"]: phase["device_bytes"] for phase in phases}
        phase = phase_that_ends(event)
        if phase is not None and peak is not None:
            self.peaks[phase] = max(self.peaks.get(phase, 0), peak - self._before)
        reset_peak(self._device)


def phase_that_ends(event: Event) -> str | None:
    """By its name in the plan; None for an event that ends none."""
    if isinstance(event, Encoding):
        # The plan's figures for captions are those of UMT5's width, and this model's is tiny.
        return None if event.what == "encoding captions" else event.what
    if isinstance(event, Sampling) and event.done == 1:
        return None  # what training needs leaves the device before the first denoising step
    names: Mapping[type[Event], str] = {
        Validated: "validation",
        StepDone: "training",
        Sampling: "sampling: denoising",
        Sampled: "sampling: decoding",
    }
    return names.get(type(event))


def measured(runs: SmallRuns, name: str) -> list[Value]:
    """The phases of a run with one of `SETTINGS`."""
    release(runs.device)
    frames, height, width = runs.size
    folder = runs.folder / f"run_{list(SETTINGS).index(name)}"
    config = runs.config(
        *COMMON,
        "sample.prompts=[a gradient]",
        f"sample.width={width}",
        f"sample.height={height}",
        f"sample.frames={frames}",
        "sample.steps=3",
        f"output.dir={folder.as_posix()}",
        f"video_data.cache_dir={(folder / 'cache').as_posix()}",
        *(setting.format(all=runs.layers) for setting in SETTINGS[name]),
        both_experts=True,
    )
    listener = PhasePeaks(runs.device)
    WanTrainer(config, listen=listener).fit()
    return [
        Value(
            case={"phase": phase, "settings": name},
            measure="device peak",
            unit="MB",
            repeats=(listener.peaks[phase] / 1e6,),
            expected=planned / 1e6,
        )
        for phase, planned in listener.planned.items()
        if phase in listener.peaks
    ]


def figure_of(values: Sequence[Value], runs: SmallRuns, what: str) -> Figure:
    phases = list(dict.fromkeys(value.case["phase"] for value in values))
    simulated = "The device is the simulated accelerator, which counts what PyTorch allocates. "
    return measured_here(
        name="device_memory",
        title="Peak of device memory by phase of a run",
        measured=(
            f"Whole runs: {what}, both experts in turn, with validation and a sample video. "
            + (simulated if runs.device.type == "sim" else "")
            + "The tiny VAE's figures in the plan are scaled from those of the real one."
        ),
        values=sorted(values, key=lambda value: phases.index(value.case["phase"])),
        charts=[Chart(measure="device peak", series="settings")],
        arithmetic="plan",
        device=str(runs.device),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_scale_options(parser, size=(9, 128, 128))
    add_output_options(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device = simulated_device() if options.device == "cpu" else None
    values: list[Value] = []
    with tempfile.TemporaryDirectory() as folder:
        runs = write_runs(options, Path(folder), device)
        for name in SETTINGS:
            values += measured(runs, name)
        figure = figure_of(values, runs, scale_in_words(runs, options))
    if options.device != "cpu":
        figure = on_its_device(figure)
    for value in figure.values:
        phase, settings = value.case["phase"], value.case["settings"]
        print(f"{phase}, {settings}: {value.median:.1f} MB, plan {value.expected:.1f}")
    save(figure, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
