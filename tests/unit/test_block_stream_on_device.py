"""Streamed blocks on a device with streams: the same numbers, no wait of the host, no race.

On the simulated accelerator, whose checker reports unordered accesses, and whose late copies arrive
only when something that waits for them starts; or on a real one.
"""

from __future__ import annotations

import copy
import gc
import threading
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from support.accelerator import DEVICE, IS_SIMULATED, MEMORY, checked, simulated_only
from support.adapters import METHODS, attached, inputs, perturb
from support.streamed import assert_missing_call_is_caught, stream_blocks
from support.tiny_models import quantized, tiny_transformer
from torch import Tensor, nn

from onewan.adapters.lora import adapter_parameters
from onewan.memory import copiers
from onewan.memory.block_weights import BlockWeights
from onewan.memory.copiers import StagedCopier
from onewan.memory.copy_queue import StreamQueue
from onewan.memory.host_memory import HostMemory
from onewan.memory.residency import DeviceResidency
from onewan.memory.streamed_transformer import StreamedTransformer
from onewan.memory.streaming import BlockStream
from onewan.model.forward import predict_velocity

if IS_SIMULATED:
    import simulated_gpu

pytestmark = pytest.mark.usefixtures("accelerator")
LAYERS = 6


@pytest.fixture(scope="module")
def base() -> Any:
    """A transformer with a LoRA, in host memory."""
    model, _ = attached(tiny_transformer(LAYERS), METHODS["lora"])
    perturb(model)
    return model


class Scene:
    """A copy of `base` on the device, with streamed blocks."""

    def __init__(
        self, base: Any, *, copier: str = "pinned", resident: int = 0, ring: int = 2
    ) -> None:
        self.model = copy.deepcopy(base)
        self.host = HostMemory(DEVICE, pinned=copier == "pinned")
        self.weights = BlockWeights.take(
            list(self.model.blocks), self.host, mapped=copier == "mapped"
        )
        self.stream = BlockStream(DEVICE, ring=ring, host=self.host)
        self.placement = StreamedTransformer(
            self.model, self.weights, self.stream, resident=resident
        )
        stream_blocks(self.model, self.stream)
        self.placement.enter()


def train(model: Any, steps: int = 2) -> list[Tensor]:
    """Losses and weights of `steps` optimizer steps on the adapter of `model`."""
    parameters = list(adapter_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    x, t, text = (tensor.to(DEVICE) for tensor in inputs())
    losses = []
    for _ in range(steps):
        loss = predict_velocity(model, x, t, text, dtype=torch.float32).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [t.detach().cpu() for t in (*losses, *parameters)]


@pytest.fixture(scope="module")
def resident_result(base) -> list[Tensor]:
    return train(copy.deepcopy(base).to(DEVICE))


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize("copier", ["pinned", "staged", "mapped"])
@pytest.mark.parametrize("resident", [0, 1, LAYERS // 2, LAYERS])
def test_streamed_training_has_the_bits_of_resident_training(
    base, resident_result, copier, resident, monkeypatch
) -> None:
    monkeypatch.setattr(copiers, "PIECE_SIZE", 4096)  # several pieces per block
    scene = Scene(base, copier=copier, resident=resident)
    with checked():
        result = train(scene.model)
    assert all(torch.equal(a, b) for a, b in zip(result, resident_result, strict=True))
    scene.stream.close()


@pytest.mark.parametrize("how", ["fp8", "gguf"])
def test_quantized_blocks_are_streamed_as_they_are_stored(how) -> None:
    packed = quantized(tiny_transformer(LAYERS), how)
    model, _ = attached(packed, METHODS["dora"])
    perturb(model)
    expected = train(copy.deepcopy(model).to(DEVICE))
    scene = Scene(model, resident=1)
    assert scene.weights.total_size < 0.4 * sum(
        p.numel() * 4 for block in tiny_transformer(LAYERS).blocks for p in block.parameters()
    )
    with checked():
        result = train(scene.model)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@simulated_only
def test_a_step_copies_what_it_must_and_never_waits(base) -> None:
    scene = Scene(base, resident=2)
    train(scene.model)
    x, t, text = (tensor.to(DEVICE) for tensor in inputs())
    before = scene.stream.loads
    simulated_gpu.reset_counters()
    predict_velocity(scene.model, x, t, text, dtype=torch.float32).square().mean().backward()
    counted = simulated_gpu.counters()
    loads = 2 * (LAYERS - 2 - 2)
    assert scene.stream.loads - before == loads
    assert counted["to_device_pinned"] == (loads, loads * scene.weights.size(0))
    assert not [kind for kind in counted if kind.startswith(("wait", "from_device"))]


@simulated_only  # which allocates exactly what it is asked for
def test_device_memory_is_the_ring_and_the_resident_blocks(base) -> None:
    scene = Scene(base, resident=2, ring=3)
    size = -(-scene.weights.size(0) // 512) * 512  # the device's granularity
    scene.stream.release()
    start = MEMORY.memory_allocated()
    for resident, buffers in ((2, 5), (4, 6), (0, 3), (LAYERS, LAYERS)):
        scene.placement.resident = resident
        scene.placement.enter()
        assert MEMORY.memory_allocated() - start == buffers * size
    scene.stream.release()
    assert MEMORY.memory_allocated() == start


# ---------------------------------------------------------------------- two experts, and moves


def other_expert(base: Any) -> Any:
    other = copy.deepcopy(base)
    for parameter in other.parameters():
        parameter.data = parameter.data * 0.9
    return other


def loss_and_gradients(model: Any) -> list[Tensor]:
    """Of one step, in host memory."""
    x, t, text = (tensor.to(DEVICE) for tensor in inputs())
    loss = predict_velocity(model, x, t, text, dtype=torch.float32).square().mean()
    loss.backward()
    results = [loss.detach().cpu()]
    for parameter in adapter_parameters(model).values():
        assert parameter.grad is not None
        results.append(parameter.grad.cpu())
        parameter.grad = None
    return results


class Pair:
    """Two experts that alternate on the device."""

    def __init__(self, base: Any, **given: Any) -> None:
        self.first = Scene(base, **given)
        other = other_expert(base)
        self.models = [self.first.model, other]
        self.stream = self.first.stream
        self.placements = [
            self.first.placement,
            StreamedTransformer(
                other,
                BlockWeights.take(list(other.blocks), self.first.host),
                self.stream,
                resident=given.get("resident", 0),
            ),
        ]
        stream_blocks(other, self.stream)
        self.residency = DeviceResidency(DEVICE)
        for model, placement in zip(self.models, self.placements, strict=True):
            self.residency.manage(model, alternating=True, placement=placement)

    def step(self, expert: int, following: int | None = None) -> list[Tensor]:
        self.residency.bring(self.models[expert])
        if following is not None:
            self.placements[expert].announce(self.placements[following])
        return loss_and_gradients(self.models[expert])


@pytest.mark.parametrize("announced", [False, True])
def test_experts_share_the_buffers_and_keep_their_own_weights(base, announced) -> None:
    order = [0, 1, 1, 0, 1]
    pair = Pair(base, resident=2)
    plain = [copy.deepcopy(base).to(DEVICE), other_expert(base).to(DEVICE)]
    expected = [loss_and_gradients(plain[expert]) for expert in order]
    results = []
    with checked():
        for expert, following in zip(order, [*order[1:], None], strict=True):
            results.append(pair.step(expert, following if announced else None))
    assert pair.stream.misses == 0
    for got, want in zip(results, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_an_announced_change_copies_no_block_after_the_backward_pass(base) -> None:
    pair = Pair(base, resident=2)
    pair.step(0)
    pair.step(0, following=1)
    before = pair.stream.loads
    buffers = [b.memory.data_ptr() for b in pair.stream.buffers()]
    pair.residency.bring(pair.models[1])
    assert pair.stream.loads == before
    assert [b.memory.data_ptr() for b in pair.stream.buffers()] == buffers


def test_sampling_takes_turns_and_everything_returns(base) -> None:
    pair = Pair(base, resident=2)
    vae = nn.Linear(4, 4)
    pair.residency.bring(pair.models[1])
    x, t, text = (tensor.to(DEVICE) for tensor in inputs())
    gc.collect()
    allocated = MEMORY.memory_allocated()
    with torch.no_grad(), pair.residency.taking_turns([*pair.models, vae]) as bring, checked():
        results = []
        for expert in (0, 0, 1):
            bring(pair.models[expert])
            assert pair.stream.weights is pair.placements[expert].weights
            results.append(predict_velocity(pair.models[expert], x, t, text, dtype=torch.float32))
        bring(vae)
        assert pair.stream.device_bytes == 0
        del results
    gc.collect()
    assert [p.is_ready for p in pair.placements] == [False, True]
    assert MEMORY.memory_allocated() == allocated
    assert {p.device.type for p in pair.models[0].parameters()} == {"cpu"}
    assert {p.device.type for p in adapter_parameters(pair.models[1]).values()} == {DEVICE.type}
    assert {t.device.type for t in pair.placements[1].weights.tensors()} == {"cpu"}


@simulated_only
def test_a_transformer_that_does_not_fit_can_be_sent_back_and_tried_again(base) -> None:
    scene = Scene(base, resident=2)
    scene.placement.leave()
    used = MEMORY.memory_allocated()
    scene.placement.resident = LAYERS
    simulated_gpu.set_capacity(used + 3 * scene.weights.size(0))
    try:
        with pytest.raises(torch.OutOfMemoryError):
            scene.placement.enter()
    finally:
        simulated_gpu.set_capacity(None)
    scene.placement.leave()
    assert MEMORY.memory_allocated() == used
    scene.placement.enter()
    assert scene.stream.device_bytes == LAYERS * scene.weights.size(0)


# ---------------------------------------------------------------------- every wait is needed


def exercise(base: Any, copier: str) -> tuple[list[Tensor], list[str]]:
    """Everything that needs order: training, other residents, a release while copies are made."""
    problems: list[str] = []
    with ExitStack() as stack:
        found = stack.enter_context(simulated_gpu.sanitizer())
        stack.enter_context(simulated_gpu.late_copies())
        # The buffers are allocated where kernels have just used memory.
        garbage = [torch.ones(1 << 14, device=DEVICE) for _ in range(8)]
        garbage = [g * 2 for g in garbage]
        del garbage
        scene = Scene(base, copier=copier, resident=1)
        result = train(scene.model, steps=1)
        scene.placement.resident = LAYERS
        scene.placement.resident = 0
        result += train(scene.model, steps=1)
        scene.stream.release()
        reused = [
            torch.ones(scene.weights.size(0), dtype=torch.uint8, device=DEVICE) for _ in range(4)
        ]
        del reused
        scene.stream.close()
    problems += found
    return result, problems


@simulated_only
@pytest.mark.parametrize(
    ("owner", "method", "caller", "copier"),
    [
        (StreamQueue, "copy_in_after", "load", "pinned"),
        (StreamQueue, "copy_in_after", "_copy_in", "staged"),
        (StreamQueue, "compute_after", "wait_until_loaded", "pinned"),
        (StreamQueue, "compute_after", "wait_until_loaded", "staged"),
        (StreamQueue, "compute_after", "retire", "pinned"),
        (StreamQueue, "computed", "done", "pinned"),
        (StreamQueue, "computed", "allocate", "pinned"),
        (StreamQueue, "copied_in", "load", "pinned"),
        (StreamQueue, "copied_in", "_copy_in", "staged"),
        (copiers.Piece, "wait_until_copied", "_free_piece", "staged"),
    ],
)
def test_a_missing_wait_is_caught(base, monkeypatch, owner, method, caller, copier) -> None:
    monkeypatch.setattr(copiers, "PIECE_SIZE", 4096)
    assert_missing_call_is_caught(
        monkeypatch, lambda: exercise(base, copier), owner, method, caller
    )


# ---------------------------------------------------------------------- the thread


def test_an_error_in_the_thread_reaches_the_training_thread(base, monkeypatch) -> None:
    scene = Scene(base, copier="staged")
    scene.stream.release()

    def fails(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(copiers, "_gather", fails)
    with pytest.raises(OSError, match="the disk is gone"):
        scene.placement.enter()
        train(scene.model)
    monkeypatch.undo()
    scene.stream.release()
    scene.placement.enter()
    train(scene.model, steps=1)
    (thread,) = [t for t in threading.enumerate() if t.name == copiers.THREAD_NAME]
    scene.stream.close()
    assert not thread.is_alive()
    assert isinstance(scene.stream._copier(is_pinned=False), StagedCopier)
    scene.stream.close()
