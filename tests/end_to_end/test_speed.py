"""What step events say of speed and memory, on the CPU and on the simulated accelerator."""

from __future__ import annotations

import pytest
import torch
from support.runs import RunFile

from onewan.runs.events import Event, StepDone
from onewan.train.trainer import WanTrainer

TOKENS_OF_A_FRAME = 4 * 4
"""128 x 128 pixels are 8 x 8 latent cells, of which a token covers 2 x 2. Clips have up to three
latent frames."""


def steps_of(run_file: RunFile, *settings: str) -> list[StepDone]:
    received: list[Event] = []
    config = run_file("ti2v-5b", "train.steps=3", "train.batch_size=2", *settings)
    WanTrainer(config, listen=received.append).fit()
    return [event for event in received if isinstance(event, StepDone)]


def test_a_step_on_the_cpu_has_a_speed_but_no_share_of_the_devices(run_file: RunFile) -> None:
    for step in steps_of(run_file, "model.device=cpu"):
        assert step.tokens_per_second is not None and step.tflops is not None
        frames = step.tokens_per_second * step.seconds / TOKENS_OF_A_FRAME / len(step.t)
        assert frames == pytest.approx(round(frames)) and 1 <= round(frames) <= 3
        assert 0 < step.tflops < 10
        assert step.mfu is None and step.step_memory_peak is None and step.memory_peak is None


def test_a_step_on_an_accelerator_has_its_own_peak_and_a_share(
    run_file: RunFile, sim: torch.device
) -> None:
    steps = steps_of(run_file, f"model.device={sim}")
    for step in steps:
        assert step.mfu is not None and 0 < step.mfu < 2
        assert step.memory_allocated is not None and step.step_memory_peak is not None
        assert step.step_memory_peak > step.memory_allocated
    peaks = [step.step_memory_peak for step in steps if step.step_memory_peak is not None]
    assert [step.memory_peak for step in steps] == [max(peaks[: n + 1]) for n in range(len(peaks))]
