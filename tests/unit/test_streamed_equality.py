"""However blocks are executed, a step has the loss, gradients and update of the plain one.

Every combination of {storage of the weights} x {number of streamed blocks} x {what is kept for the
backward pass} x {the same expert again, a switch of experts} x {LoRA, DoRA, LoKr, OFT, embeddings}
x {CPU, accelerator}, bit for bit. The plain step is that of diffusers' own blocks, resident,
with PyTorch's checkpointing. Chunks of the feed-forward layer sum gradients in another order: these
are compared bit for bit with those of chunks of resident blocks, and within rounding with the plain
ones.

A test is one storage and device; the four kinds of adapters are trained together. For each number
of streamed blocks it trains two new experts through `STEPS`, and the blocks of both share one
stream.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from support.accelerator import IS_SIMULATED, checked
from support.streamed_equality import (
    ADAPTERS,
    HOST,
    LAYERS,
    NAMES,
    STORAGES,
    Case,
    Executed,
    Name,
    differences,
    distance,
    plain_training,
)

from onewan.memory import activations
from onewan.memory.plan import Settings

if IS_SIMULATED:
    import simulated_gpu

pytestmark = pytest.mark.long

CHUNKS = 3
KEPT: dict[str, dict[str, Any]] = {
    "checkpointing alone": {},
    "offloaded inputs": {"offload_inputs": True},
    "kept attention": {"keep_attention": "device"},
    "chunked feed-forward": {"feed_forward_chunks": CHUNKS},
}
STREAMED = {"none": 0, "one block": 1, "half": (LAYERS + 1) // 2, "all": LAYERS}
RING = 2
STEPS: list[tuple[str, Name]] = [
    ("checkpointing alone", "high"),
    ("checkpointing alone", "low"),
    ("offloaded inputs", "low"),
    ("offloaded inputs", "high"),
    ("kept attention", "high"),
    ("kept attention", "low"),
    ("chunked feed-forward", "low"),
    ("chunked feed-forward", "high"),
]
"""Each way of keeping trains the expert of the step before, and after a switch the other one. The
first switch comes unannounced. Chunks come last, since both experts' weights differ from those of
plain training behind them."""
SWITCHES = [one != two for (_, one), (_, two) in pairwise(STEPS)]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 5e-3}
"""By what chunks may change all gradients of a step, relative to their norm. A fused step, whose
gradients are gone, is measured by the changes of the weights."""


@pytest.fixture(autouse=True)
def small_tensors_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of tiny models would be too small to be worth a copy."""
    monkeypatch.setattr(activations, "SMALL", 0)


def train_and_compare(case: Case, device: torch.device, streamed: int) -> None:
    """Train through `STEPS` with `streamed` streamed blocks; AssertionError names the step."""
    run = Executed(case, device, Settings(resident_blocks=LAYERS - streamed))
    for number, (kept, name) in enumerate(STEPS):
        run.execution.configure(Settings(resident_blocks=LAYERS - streamed, **KEPT[kept]))
        announced = number > 0 and SWITCHES[number : number + 1] == [True]
        expert = run.use(name, following=STEPS[number + 1][1] if announced else None)
        plain = plain_training(case, name, device, steps=len(STEPS) // len(NAMES), chunks=CHUNKS)
        step = expert.steps
        expected = plain.steps[step]
        found = expert.step()
        where = f"{streamed} streamed blocks, {kept}, step {number}, the {name} expert"
        if kept == "chunked feed-forward":
            found = {key: found[key] for key in plain.chunked}
            before = plain.steps[step - 1] if case.is_fused else None
            assert distance(found, expected, before) <= ROUNDING[case.dtype], where
            expected = plain.chunked
        assert differences(found, expected) == [], where
    run.execution.close()
    if case.is_fused:
        return  # weights and optimizer states go both ways
    in_ring = min(streamed, RING)
    filled = (LAYERS - streamed + in_ring) * (1 + sum(SWITCHES))
    reloaded = 2 * (streamed - in_ring) * len(STEPS)
    assert run.stream.loads == filled + reloaded
    assert run.stream.bytes_to_device == run.block_size * run.stream.loads
    assert run.stream.bytes_to_host == 0


@pytest.mark.parametrize("trained", ["all adapters", "embeddings"])
@pytest.mark.parametrize("storage", STORAGES)
def test_on_the_cpu(storage: str, trained: str) -> None:
    for streamed in STREAMED.values():
        train_and_compare(Case(storage, trained), HOST, streamed)


@pytest.mark.parametrize("trained", ["all adapters", "embeddings"])
@pytest.mark.parametrize("storage", STORAGES)
def test_on_an_accelerator(accelerator: torch.device, storage: str, trained: str) -> None:
    for streamed in STREAMED.values():
        with checked(where=False):
            train_and_compare(Case(storage, trained), accelerator, streamed)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_one_kind_of_adapter_alone(kind: str) -> None:
    """Other layers of the blocks have no gradients then."""
    for streamed in STREAMED.values():
        train_and_compare(Case("float32", kind), HOST, streamed)


IN_HOST_MEMORY = {"offload_inputs": True, "keep_attention": "host"}


@pytest.mark.parametrize(
    "kept", [*KEPT.values(), IN_HOST_MEMORY], ids=[*KEPT, "all in host memory"]
)
def test_copies_of_a_step(sim: torch.device, kept: dict[str, Any]) -> None:
    """By the device's own count: what is streamed comes twice, except for what the ring holds when
    passes turn, and no weight goes back."""
    case = Case("bfloat16", "all adapters")
    for streamed in STREAMED.values():
        run = Executed(case, sim, Settings(resident_blocks=LAYERS - streamed, **kept))
        expert = run.use("high")
        with checked(where=False):
            expert.step()
            weights = run.stream.bytes_to_device
            simulated_gpu.reset_counters()
            loss = expert.backward()
            counters = simulated_gpu.counters()
        weights = run.stream.bytes_to_device - weights
        assert weights == 2 * max(0, streamed - RING) * run.block_size
        assert counters.keys() <= {"to_device_pinned", "from_device_pinned", "on_device"}
        _, to_device = counters.get("to_device_pinned", (0, 0))
        _, from_device = counters.get("from_device_pinned", (0, 0))
        if "offload_inputs" in kept:
            assert 0 < to_device - weights < from_device  # the last blocks' are still there
        else:
            assert to_device == weights and from_device == 0
        if "feed_forward_chunks" not in kept:
            plain = plain_training(case, "high", sim, steps=len(STEPS) // 2, chunks=CHUNKS)
            found = expert.gradients(loss)
            assert differences(found, {key: plain.steps[1][key] for key in found}) == []
        run.execution.close()


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_full_fine_tuning_on_the_cpu(storage: str) -> None:
    """Of all weights of the blocks, against a fused step of resident weights."""
    for streamed in STREAMED.values():
        train_and_compare(Case(storage, "fine-tuning"), HOST, streamed)


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_full_fine_tuning_on_an_accelerator(accelerator: torch.device, storage: str) -> None:
    for streamed in STREAMED.values():
        with checked(where=False):
            train_and_compare(Case(storage, "fine-tuning"), accelerator, streamed)
