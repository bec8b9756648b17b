"""What only a real accelerator has: several attention kernels, compiled code, 8-bit optimizers.

Small runs on the device that ``ONEWAN_TEST_DEVICE`` names (`make test-gpu`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.accelerator import DEVICE, real_only
from support.optimizers import CHOICES, uncompiled
from support.runs import (
    METHODS,
    RunFile,
    assert_the_same_six_steps,
    outcome,
    recorder,
    stopped_and_resumed,
)

from onewan.config.schema import ResolvedRun
from onewan.train.trainer import WanTrainer

__all__ = ["uncompiled"]
pytestmark = [pytest.mark.long, pytest.mark.usefixtures("accelerator"), real_only]

HERE = f"model.device={DEVICE.type}"
HALF = [HERE, "model.dtype=bfloat16", "wan_config.max_frames=5"]
FLASH = "memory.attention=flash"
"""Named, since the fastest one of such small clips is another one each time."""
STREAMED = ["memory.resident_blocks=0", "memory.offload_inputs=true", "memory.keep_attention=host"]
BFLOAT16 = 1e-2
"""What kernels in bfloat16 may differ by, relative."""


def losses(config: ResolvedRun) -> torch.Tensor:
    return torch.tensor([step[2] for step in outcome(config)[1]])


def distance(found: ResolvedRun, expected: ResolvedRun) -> float:
    """Between the losses of two runs, relative."""
    assert len(losses(found)) == len(losses(expected)) > 0
    return float((losses(found) - losses(expected)).norm() / losses(expected).norm())


@pytest.mark.parametrize("name", ["flash", "efficient", "cudnn"])
def test_each_attention_kernel_trains_as_the_plain_formula(run_file: RunFile, name: str) -> None:
    plain = run_file("t2v-a14b", *HALF, "memory.attention=math", name="plain")
    WanTrainer(plain).fit()
    for number, memory in enumerate(([], STREAMED)):
        settings = [*HALF, *memory, f"memory.attention={name}"]
        chosen = run_file("t2v-a14b", *settings, name=f"chosen {number}")
        WanTrainer(chosen).fit()
        assert distance(chosen, plain) < BFLOAT16


def test_the_fastest_attention_kernel_is_measured_and_kept(run_file: RunFile) -> None:
    events: list[dict[str, Any]] = []
    WanTrainer(run_file("t2v-a14b", *HALF, "train.steps=1"), listen=recorder(events)).fit()
    (event,) = [event for event in events if event["event"] == "attention"]
    assert event["backend"] in event["milliseconds"] and len(event["milliseconds"]) > 1
    again: list[dict[str, Any]] = []
    longer = run_file("t2v-a14b", *HALF, "train.steps=2")
    WanTrainer(longer, listen=recorder(again), resume=True).fit()
    (kept,) = [event for event in again if event["event"] == "attention"]
    assert kept["backend"] == event["backend"]


@pytest.mark.parametrize("memory", [[], STREAMED], ids=["resident", "streamed"])
def test_compiled_blocks_train_as_plain_ones(run_file: RunFile, memory: list[str]) -> None:
    plain = run_file("t2v-a14b", *HALF, FLASH, name="plain")
    WanTrainer(plain).fit()
    settings = [*HALF, FLASH, "memory.compile=true", *memory]
    compiled = run_file("t2v-a14b", *settings, name="compiled")
    WanTrainer(compiled).fit()
    assert distance(compiled, plain) < BFLOAT16


@pytest.mark.parametrize("method", ["lora", "fine_tune"])
@pytest.mark.parametrize("memory", [[], STREAMED], ids=["resident", "streamed"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(
    run_file: RunFile, method: str, memory: list[str]
) -> None:
    """With PyTorch's deterministic kernels."""
    settings = [*METHODS[method], *HALF, FLASH, *memory]
    whole = run_file("t2v-a14b", *settings, name="whole")
    WanTrainer(whole).fit()
    resumed = run_file("t2v-a14b", *settings, name="resumed")
    stopped_and_resumed(resumed)
    assert_the_same_six_steps(whole, resumed)


OPTIMIZERS = {
    **{choice.name: f"{{name: {choice.name}}}" for choice in CHOICES.values()},
    "adamw_cpu_offload": "{name: adamw_cpu_offload}",
    "adamw_low_bit of 4": '{name: adamw_low_bit, bits: "4"}',
    "adamw_low_bit of fp8": "{name: adamw_low_bit, bits: fp8}",
    "custom": "{name: custom, class_path: pytorch_optimizer.StableAdamW}",
}
JOINT = {"prodigy", "prodigy_plus_schedule_free", "adamw_cpu_offload"}
"""Those that update all weights together."""


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_resumes_with_the_same_bits(run_file: RunFile, name: str) -> None:
    """All weights of a transformer: its matrices are large enough for states of 8 bits."""
    weights = "float32" if name in JOINT else "stochastic"
    settings = [
        f"optimizer={OPTIMIZERS[name]}",
        f"method={{kind: fine_tune, weights: {weights}}}",
        FLASH,
        *HALF,
    ]
    whole = run_file("ti2v-5b", *settings, name="whole")
    WanTrainer(whole).fit()
    resumed = run_file("ti2v-5b", *settings, name="resumed")
    stopped_and_resumed(resumed)
    assert_the_same_six_steps(whole, resumed)
