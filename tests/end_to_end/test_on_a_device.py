"""Whole runs on an accelerator: its results are the CPU's, and the host hardly waits.

The simulated one refuses operators on tensors of the host and of the device together, so that a run
which ends has had none on the wrong side, and has the bits of the CPU's. A real one rounds in
another way.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.accelerator import (
    DEVICE,
    IS_SIMULATED,
    MEMORY,
    assert_near,
    checked,
    waits_of_the_host,
)
from support.other_program_files import as_gguf, fp8
from support.runs import CLASS_WORD, METHODS, RunFile, layout_of, outcome
from support.tiny_models import TinyModels

from onewan.cli import main
from onewan.config.schema import ResolvedRun
from onewan.errors import Interrupted
from onewan.media import read_frames
from onewan.runs.control import order, request
from onewan.runs.event_file import read_events
from onewan.runs.events import Event, StepDone
from onewan.train import steps
from onewan.train.run import Run
from onewan.train.setup import WanModelSetup
from onewan.train.trainer import WanTrainer

pytestmark = pytest.mark.long

EACH_PHASE = [
    "wan_config.max_frames=5",
    "train.switch_expert_every=2",
    "train.save_every=2",
    "validation.clips=2",
    "sample={prompts: [a red square], width: 64, height: 64, frames: 5, steps: 2}",
]
LOSSES_WITHIN = 1e-4
WEIGHTS_WITHIN = 0.1
"""By which share of their norm the results of a real accelerator may differ from the CPU's. An
adaptive optimizer makes full steps of gradients that are nothing but rounding (on an H200, up to
0.03 of a bias in bfloat16 that began at zero)."""
SHORT = [
    "wan_config.max_frames=5",
    "train.switch_expert_every=2",
    "train.steps=4",
]


@pytest.fixture(autouse=True)
def aligned(accelerator: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights begin at multiples of 64 bytes on the CPU too, as they do on the device.

    In the memory of a file they begin anywhere, and matrix products may round differently then.
    """
    del accelerator
    plain = WanModelSetup.build

    def build(setup: WanModelSetup, *arguments: Any, **named: Any) -> Run:
        run = plain(setup, *arguments, **named)
        if run.device.type == "cpu":
            for expert in run.state.experts.values():
                for tensor in [*expert.transformer.parameters(), *expert.transformer.buffers()]:
                    tensor.data = tensor.data.clone()
        return run

    monkeypatch.setattr(WanModelSetup, "build", build)


Waits = list[list[str]]
"""For each optimizer step on the device: the places of the host's waits."""


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """Filled by each optimizer step of the test."""
    found: Waits = []
    plain = steps.train_step

    def counted(run: Run, step: Any) -> Any:
        if run.device.type == "cpu":
            return plain(run, step)
        with waits_of_the_host() as places:
            metrics = plain(run, step)
        found.append(places)
        return metrics

    monkeypatch.setattr(steps, "train_step", counted)
    return found


def assert_the_same(here: ResolvedRun, there: ResolvedRun) -> None:
    """The same losses, norms, weights, averages and optimizer states; bit for bit on the simulated
    accelerator."""
    (tensors, steps), (tensors_there, steps_there) = outcome(here), outcome(there)
    for step, step_there in zip(steps, steps_there, strict=True):
        number, expert, *numbers, t = step
        assert (number, expert, t) == (*step_there[:2], step_there[-1])
        expected, found = (torch.tensor(each) for each in (numbers, step_there[2:-1]))
        assert_near(found, expected, f"step {number}", within=LOSSES_WITHIN)
    assert tensors.keys() == tensors_there.keys() and tensors
    assert all(t.device.type == "cpu" for t in tensors_there.values())
    for name, tensor in tensors.items():
        assert_near(tensors_there[name], tensor, name, within=WEIGHTS_WITHIN)


def validation_losses(config: ResolvedRun) -> dict[tuple[int, str], float]:
    events = read_events(layout_of(config).events)
    return {(e["step"], e["expert"]): e["loss"] for e in events if e["event"] == "validation"}


def last_sample(config: ResolvedRun) -> np.ndarray:
    """Frames of the last sample, as integers that can be subtracted."""
    path = layout_of(config).samples(config.train.steps) / "0.mp4"
    return read_frames(path, [0.0, 0.1, 0.2]).astype(int)


def stop_after(step: int, config: ResolvedRun) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            request(layout_of(config), "stop")

    return listen


@pytest.mark.parametrize("more", [[], CLASS_WORD], ids=["plain", "class word"])
def test_a_run_with_every_phase_is_the_cpus(
    run_file: RunFile, tmp_path: Path, waits: Waits, more: list[str]
) -> None:
    """Both experts, averages, validation, samples, a stop and a resume by the command line."""
    gc.collect()  # what earlier tests left on the device
    start = MEMORY.memory_allocated()
    settings = [*EACH_PHASE, "train.steps=6", "train.ema={decay: 0.9, offload: false}", *more]
    here = run_file("t2v-a14b", *settings, name="here")
    there = run_file("t2v-a14b", *settings, f"model.device={DEVICE.type}", name="there")
    WanTrainer(here).fit()
    with pytest.raises(Interrupted):
        WanTrainer(there, listen=stop_after(3, there)).fit()
    overrides = [f"output.dir={tmp_path / 'runs'}", *settings, f"model.device={DEVICE.type}"]
    assert main(["train", str(tmp_path / "there.yaml"), "--resume", *overrides]) == 0
    assert_the_same(here, there)
    losses, losses_there = validation_losses(here), validation_losses(there)
    assert losses and losses.keys() == losses_there.keys()
    expected, found = (torch.tensor([*each.values()]) for each in (losses, losses_there))
    assert_near(found, expected, "validation", within=LOSSES_WITHIN)
    assert np.abs(last_sample(here) - last_sample(there)).mean() < 1
    check_waits(waits)
    gc.collect()
    if IS_SIMULATED:  # a real one keeps workspaces of its libraries
        assert MEMORY.memory_allocated() == start
    assert MEMORY.max_memory_allocated() > start + 100_000


def test_the_order_of_streams_is_right_in_every_phase(run_file: RunFile) -> None:
    """With averages in host memory, and with copies that arrive as late as they may."""
    settings = [*EACH_PHASE, "train.steps=3", "train.ema={decay: 0.9, offload: true}"]
    here = run_file("t2v-a14b", *settings, name="here")
    there = run_file("t2v-a14b", *settings, f"model.device={DEVICE.type}", name="there")
    WanTrainer(here).fit()
    with checked():
        WanTrainer(there).fit()
    assert_the_same(here, there)


def test_what_is_ordered_from_a_run_is_done_as_on_the_cpu(run_file: RunFile) -> None:
    """Changed settings, and a video of a prompt for which the text encoder is loaded and freed."""
    gc.collect()
    start = MEMORY.memory_allocated()
    settings = [*EACH_PHASE, "train.steps=4", "train.ema={decay: 0.9}"]

    def ordering(config: ResolvedRun) -> Callable[[Event], None]:
        def listen(event: Event) -> None:
            if isinstance(event, StepDone) and event.step == 1:
                order(layout_of(config), "sample", {"prompt": f"a square, {config.output.name}"})
                changed = {"optimizer.lr": 0.001, "train.ema.decay": 0.5}
                order(layout_of(config), "settings", changed)

        return listen

    # Where weights are streamed, the text encoder takes the place of the experts.
    there_too = [f"model.device={DEVICE.type}", "memory.resident_blocks=1"]
    here = run_file("t2v-a14b", *settings, name="here")
    there = run_file("t2v-a14b", *settings, *there_too, name="there")
    WanTrainer(here, listen=ordering(here)).fit()
    with checked():
        WanTrainer(there, listen=ordering(there)).fit()
    assert_the_same(here, there)
    for config in (here, there):
        events = [*read_events(layout_of(config).events)]
        assert [e["prompt"] for e in events if e.get("requested")]
        assert len([e for e in events if e["event"] == "settings"]) == 2
        assert not [e for e in events if e["event"] == "rejected" or "failed" in str(e)]
    gc.collect()
    if IS_SIMULATED:
        assert MEMORY.memory_allocated() == start


def check_waits(waits: Waits) -> None:
    """Each step waits once, also one before which the expert changes."""
    assert len(waits) >= 4
    assert [len(found) for found in waits] == [1] * len(waits), waits


@pytest.mark.parametrize("method", [name for name in METHODS if name != "lora"])
def test_each_method_trains_as_on_the_cpu(
    run_file: RunFile, workshop: Path, waits: Waits, method: str
) -> None:
    settings = [*METHODS[method], *SHORT]
    if method == "embedding":
        settings.append(f"video_data.sources=[{{path: {workshop / 'named clips'}}}]")
    here = run_file("t2v-a14b", *settings, name="here")
    there = run_file("t2v-a14b", *settings, f"model.device={DEVICE.type}", name="there")
    WanTrainer(here).fit()
    WanTrainer(there).fit()
    assert_the_same(here, there)
    check_waits(waits)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Settings of a model whose high-noise expert is quantized, in its file or while loading."""
    folder = tmp_path_factory.mktemp("quantized")
    # As wide as an attention head of Wan, which the reader of a single file goes by.
    model = TinyModels(folder, width=128, layers=2)("t2v-a14b")
    (file,) = (model / "transformer").glob("*.safetensors")
    weights = load_file(file)
    fp8(weights, folder / "high_noise_fp8.safetensors", "new")
    as_gguf(weights, folder / "high_noise.gguf")
    path = f"model.path={model.as_posix()}"
    return {
        "fp8 file": [path, f"model.transformer={folder / 'high_noise_fp8.safetensors'}"],
        "gguf file": [path, f"model.transformer={folder / 'high_noise.gguf'}"],
        "nf4": [path, "memory.weights=nf4"],
    }


@pytest.mark.parametrize("storage", ["fp8 file", "gguf file", "nf4"])
def test_a_quantized_base_trains_as_on_the_cpu(
    run_file: RunFile, quantized: dict[str, list[str]], waits: Waits, storage: str
) -> None:
    settings = [*quantized[storage], *SHORT]
    here = run_file("t2v-a14b", *settings, name="here")
    there = run_file("t2v-a14b", *settings, f"model.device={DEVICE.type}", name="there")
    WanTrainer(here).fit()
    WanTrainer(there).fit()
    assert_the_same(here, there)
    check_waits(waits)
