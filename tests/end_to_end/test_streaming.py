"""Runs with streamed blocks save the states of a plain run, bit for bit, also after they were
killed and resumed with other memory settings."""

from __future__ import annotations

import multiprocessing
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import CLASS_WORD, METHODS, SMALL_SAMPLE, RunFile, layout_of, outcome
from support.slow_run import train_slowly

from onewan.config.schema import ResolvedRun
from onewan.errors import CheckpointError, Interrupted
from onewan.memory import activations
from onewan.memory.execution import BlockExecution, CopiedBytes
from onewan.runs.control import request
from onewan.runs.event_file import read_events
from onewan.runs.events import Event, StepDone
from onewan.train.trainer import WanTrainer

pytestmark = pytest.mark.long

EACH_PHASE = [
    "train.steps=5",
    "train.ema={decay: 0.9}",
    "validation={clips: 1, every: 3}",
    *(f"sample.{name}={value}" for name, value in SMALL_SAMPLE.items()),
]
NUMBERS: dict[str, list[str]] = {
    "as stored": [],
    "fp8": ["memory.weights=fp8"],
    "bf16": ["memory.weights=bf16", "model.dtype=bfloat16"],
    "chunked feed-forward": ["memory.feed_forward_chunks=2"],
    "class word": CLASS_WORD,
}
"""Settings that change the numbers, thus of the plain run too."""
EXECUTED: dict[str, list[str]] = {
    "all blocks": ["memory.resident_blocks=0"],
    "half of the blocks, offloaded inputs and attention": [
        "memory.resident_blocks=1",
        "memory.offload_inputs=true",
        "memory.keep_attention=host",
    ],
}


@pytest.fixture(autouse=True)
def small_tensors_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of tiny models would be too small to be worth a copy."""
    monkeypatch.setattr(activations, "SMALL", 0)


@pytest.fixture
def executions(monkeypatch: pytest.MonkeyPatch) -> list[BlockExecution]:
    """Those of the test's runs: a run on the CPU does not report what it copies."""
    found: list[BlockExecution] = []
    plain = BlockExecution.__init__

    def made(execution: BlockExecution, *arguments: Any, **named: Any) -> None:
        plain(execution, *arguments, **named)
        found.append(execution)

    monkeypatch.setattr(BlockExecution, "__init__", made)
    return found


def validation_losses(config: ResolvedRun) -> dict[tuple[int, str], float]:
    events = read_events(layout_of(config).events)
    return {(e["step"], e["expert"]): e["loss"] for e in events if e["event"] == "validation"}


def assert_the_same(one: ResolvedRun, two: ResolvedRun) -> None:
    """The same losses, norms, weights, averages and optimizer states, bit for bit."""
    (tensors, steps), (others, other_steps) = outcome(one), outcome(two)
    # Steps that were repeated after a kill are in the events twice.
    assert {step[0]: step for step in steps} == {step[0]: step for step in other_steps}
    assert tensors.keys() == others.keys() and len(tensors) > 20
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []


@pytest.mark.parametrize("numbers", NUMBERS)
def test_a_run_with_streamed_blocks_saves_the_states_of_a_plain_one(
    run_file: RunFile, executions: list[BlockExecution], numbers: str
) -> None:
    """With both experts, averages, validation and samples."""
    settings = [*EACH_PHASE, *NUMBERS[numbers]]
    plain = run_file("t2v-a14b", *settings, name="plain")
    WanTrainer(plain).fit()
    assert validation_losses(plain)
    for number, executed in enumerate(EXECUTED.values()):
        streamed = run_file("t2v-a14b", *settings, *executed, name=f"streamed {number}")
        WanTrainer(streamed).fit()
        assert_the_same(plain, streamed)
        assert validation_losses(plain) == validation_losses(streamed)
    whole, all_blocks, half = (execution.copied for execution in executions)
    assert whole == CopiedBytes(to_device=0, to_host=0)
    assert all_blocks.to_device > 0 and all_blocks.to_host == 0
    assert half.to_device > 0 and half.to_host > 0


@pytest.mark.parametrize("method", ["lora", "dora", "fine_tune"])
def test_a_run_may_be_resumed_with_other_memory_settings(run_file: RunFile, method: str) -> None:
    plain = run_file("t2v-a14b", *METHODS[method], name="plain")
    WanTrainer(plain).fit()
    settings: dict[int, list[str]] = {  # by the step behind which the run is stopped
        1: ["memory.resident_blocks=0"],
        3: ["memory.resident_blocks=1", "memory.keep_attention=device"],
        4: ["memory={gradient_checkpointing: false, offload_inactive_expert: false}"],
        6: ["memory.resident_blocks=0", "memory.offload_inputs=true"],
    }
    for last, memory in settings.items():
        config = run_file("t2v-a14b", *METHODS[method], *memory, name="resumed")

        def stop(event: Event, last: int = last, config: ResolvedRun = config) -> None:
            if isinstance(event, StepDone) and event.step == last < 6:
                request(layout_of(config), "stop")

        ends = nullcontext() if last == 6 else pytest.raises(Interrupted)
        with ends:
            WanTrainer(config, listen=stop, resume=last > 1).fit()
    assert_the_same(plain, run_file("t2v-a14b", *METHODS[method], name="resumed"))


def test_a_run_that_was_killed_is_resumed_with_another_number_of_resident_blocks(
    run_file: RunFile, tmp_path: Path
) -> None:
    plain = run_file("t2v-a14b", "train.save_every=1", name="plain")
    WanTrainer(plain).fit()
    killed = ["train.save_every=1", "memory.resident_blocks=0", "memory.offload_inputs=true"]
    layout = layout_of(run_file("t2v-a14b", *killed, name="killed"))
    overrides = [f"output.dir={tmp_path / 'runs'}", *killed]
    process = multiprocessing.get_context("spawn").Process(
        target=train_slowly, args=(tmp_path / "killed.yaml", overrides)
    )
    process.start()
    while not any(e["event"] == "saved" and e["step"] >= 2 for e in events_so_far(layout.events)):
        assert process.is_alive(), "the run ended before it was killed"
        time.sleep(0.01)
    process.kill()
    process.join()
    assert layout.saved_steps()[-1] < 6
    resumed = run_file("t2v-a14b", "train.save_every=1", "memory.resident_blocks=1", name="killed")
    WanTrainer(resumed, resume=True).fit()
    assert_the_same(plain, resumed)


def events_so_far(events: Path) -> list[dict[str, Any]]:
    return list(read_events(events)) if events.exists() else []


@pytest.mark.parametrize("change", ["feed_forward_chunks=2", "weights=fp8", "compile=true"])
def test_memory_settings_that_change_the_numbers_are_not_changed_silently(
    run_file: RunFile, change: str
) -> None:
    WanTrainer(run_file("ti2v-5b", "train.steps=1")).fit()
    changed = run_file("ti2v-5b", "train.steps=2", f"memory.{change}", "memory.resident_blocks=0")
    with pytest.raises(CheckpointError) as refusal:
        WanTrainer(changed, resume=True).fit()
    assert f"memory.{change.partition('=')[0]}: was" in str(refusal.value)
    assert "resident_blocks" not in str(refusal.value)
