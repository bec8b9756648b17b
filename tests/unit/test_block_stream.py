"""The schedule of streamed blocks: which copies are made, and that blocks have their own weights.

On the CPU, where copies are immediate; `test_block_stream_on_device.py` has streams.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from onewan.memory.block_order import streamed_blocks
from onewan.memory.block_weights import BlockWeights
from onewan.memory.host_memory import HostMemory
from onewan.memory.streaming import BlockStream, Pass, StreamEvent

CPU = torch.device("cpu")


class Scene:
    """A stream, and blocks that add a number of their own and count in a buffer."""

    def __init__(
        self, count: int, *, experts: int = 1, ring: int = 2, mapped: bool = False
    ) -> None:
        self.host = HostMemory(CPU)
        self.experts = [make_blocks(count, seed) for seed in range(experts)]
        self.values = [
            [[t.detach().clone() for t in tensors(block)] for block in blocks]
            for blocks in self.experts
        ]
        self.weights = [BlockWeights.take(b, self.host, mapped=mapped) for b in self.experts]
        self.log: list[StreamEvent] = []
        self.stream = BlockStream(CPU, ring=ring, host=self.host, recorder=self.log.append)

    def run(self, index: int, current: Pass, expert: int = 0) -> None:
        """Use one block, and check that it has its own weights."""
        self.stream.use(index)
        (event,) = [e for e in self.log[-1:] if e.kind == "use"]
        block = self.experts[expert][index]
        buffers = {b.number: b.memory for b in self.stream.buffers()}
        for tensor, value in zip(tensors(block), self.values[expert][index], strict=True):
            assert torch.equal(tensor, value)
            assert is_within(tensor, buffers[event.buffer])
        self.stream.done(index, current)
        assert self.on_host(expert)

    def on_host(self, expert: int = 0) -> bool:
        return not any(
            is_within(tensor, buffer.memory)
            for block in self.experts[expert]
            for tensor in tensors(block)
            for buffer in self.stream.buffers()
        )

    def forward(self, expert: int = 0, current: Pass = Pass.TRAIN_FORWARD) -> None:
        for index in range(len(self.experts[expert])):
            self.run(index, current, expert)

    def backward(self, expert: int = 0, first: int = 0) -> None:
        for index in reversed(range(first, len(self.experts[expert]))):
            self.run(index, Pass.BACKWARD, expert)

    def step(self, expert: int = 0) -> None:
        self.forward(expert)
        self.backward(expert)


def make_blocks(count: int, seed: int = 0) -> list[nn.Module]:
    """Blocks with weights of several shapes and dtypes, frozen."""
    torch.manual_seed(seed)
    blocks: list[nn.Module] = []
    for _ in range(count):
        block = nn.Sequential(
            nn.Linear(5, 7), nn.Linear(7, 3, dtype=torch.bfloat16), nn.BatchNorm1d(3)
        )
        block.register_parameter(
            "packed", nn.Parameter(torch.randint(-9, 9, (3, 3), dtype=torch.int8), False)
        )
        block.register_buffer("scale", torch.rand(()))
        blocks.append(block.requires_grad_(False))
    return blocks


def tensors(block: nn.Module) -> list[Tensor]:
    return [*block.parameters(), *block.buffers()]


def is_within(tensor: Tensor, memory: Tensor) -> bool:
    return 0 <= tensor.data_ptr() - memory.data_ptr() < memory.numel()


# ---------------------------------------------------------------------- loads


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    ("count", "resident", "ring"),
    [(8, 0, 2), (8, 3, 2), (8, 4, 3), (8, 6, 2), (8, 7, 2), (8, 8, 2), (1, 0, 2), (5, 1, 1)],
)
def test_a_step_loads_twice_what_the_ring_does_not_keep(count, resident, ring, mapped) -> None:
    scene = Scene(count, ring=ring, mapped=mapped)
    scene.stream.select(scene.weights[0], resident)
    scene.step()
    before = scene.stream.loads, scene.stream.bytes_to_device
    scene.step()
    kept = min(ring, count - resident)
    expected = 2 * (count - resident - kept)
    size = scene.weights[0].size(0)
    assert scene.stream.loads - before[0] == expected
    assert scene.stream.bytes_to_device - before[1] == expected * size
    assert scene.stream.misses == 0
    assert scene.stream.bytes_to_host == 0
    assert scene.stream.device_bytes == (kept + resident) * size


def test_every_copy_but_the_first_is_queued_while_an_earlier_block_computes() -> None:
    """Two blocks ahead in both directions, and nothing where the pass turns."""
    scene = Scene(6)
    scene.stream.select(scene.weights[0], 0)
    scene.step()
    schedule = [f"{e.kind} {e.block}" for e in scene.log]
    assert schedule[:2] == ["load 0", "load 1"]
    expected = []
    for index in range(6):
        expected += [f"use {index}", f"done {index}"]
        expected += [f"load {index + 2}"] if index + 2 < 6 else []
    for index in reversed(range(6)):
        expected += [f"use {index}", f"done {index}"]
        expected += [f"load {index - 2}"] if index - 2 >= 0 else []
    assert schedule[2:] == expected


def test_inference_goes_round() -> None:
    scene = Scene(6)
    scene.stream.select(scene.weights[0], 0)
    for _ in range(3):
        before = scene.stream.loads
        scene.forward(current=Pass.INFERENCE)
        assert scene.stream.loads - before == 6
    assert scene.stream.misses == 0
    before = scene.stream.loads
    scene.step()  # training continues
    assert scene.stream.loads - before == 8
    assert scene.stream.misses == 0


def test_a_backward_pass_that_ends_early_prepares_the_next_forward_pass() -> None:
    scene = Scene(8)
    scene.stream.select(scene.weights[0], 0, first_trained=5)
    for _ in range(2):
        scene.forward()
        scene.backward(first=5)
    before = scene.stream.loads
    scene.forward()
    scene.backward(first=5)
    assert scene.stream.loads - before == 6 + 1 + 2
    assert scene.stream.misses == 0


def test_a_block_out_of_order_is_loaded_and_counted() -> None:
    scene = Scene(6)
    scene.stream.select(scene.weights[0], 0)
    scene.forward()
    scene.forward()  # no backward pass came
    assert scene.stream.misses == 1
    scene.run(3, Pass.TRAIN_FORWARD)
    assert scene.stream.misses == 2


# ---------------------------------------------------------------------- resident blocks and experts


def test_another_number_of_resident_blocks_loads_only_the_new_ones() -> None:
    scene = Scene(8)
    size = scene.weights[0].size(0)
    scene.stream.select(scene.weights[0], 2)
    scene.step()
    scene.step()
    before = scene.stream.loads
    scene.stream.select(scene.weights[0], 4)
    scene.step()
    # In place of 2 (6 - 2): those of the ring, one more for each new resident block, and at most
    # the ring's own, whose blocks may be resident now.
    assert scene.stream.loads - before <= 2 * (4 - 2) + 2 + 2
    assert scene.stream.device_bytes == (2 + 4) * size
    before = scene.stream.loads
    scene.stream.select(scene.weights[0], 1)
    assert scene.stream.device_bytes == (2 + 1) * size
    scene.step()
    scene.step()
    assert scene.stream.loads - before <= 2 * 2 * (7 - 2) + 2
    assert scene.stream.misses == 0


def test_a_change_of_experts_that_is_announced_costs_no_copy_after_it() -> None:
    scene = Scene(8, experts=2)
    high, low = scene.weights
    scene.stream.select(high, 3)
    scene.step(0)
    scene.forward(0)
    before = scene.stream.loads
    scene.stream.announce(low)
    scene.backward(0)
    assert scene.stream.is_changing
    # Three streamed blocks of the backward pass, then everything that the other begins with.
    assert scene.stream.loads - before == 3 + 5
    before = scene.stream.loads
    scene.stream.select(low, 3)
    assert scene.stream.loads == before
    scene.step(1)
    assert scene.stream.loads - before == 2 * (5 - 2)
    assert scene.stream.misses == 0
    assert not scene.stream.is_changing


def test_a_change_that_is_not_announced_is_as_correct() -> None:
    scene = Scene(8, experts=2)
    for number, expert in enumerate((0, 1, 0, 0, 1)):
        scene.stream.select(scene.weights[expert], number % 3)
        scene.step(expert)
    assert scene.stream.misses == 0


def test_an_announced_expert_that_does_not_come_costs_loads_only() -> None:
    scene = Scene(6, experts=2)
    scene.stream.select(scene.weights[0], 2)
    scene.forward(0)
    scene.stream.announce(scene.weights[1])
    scene.backward(0)
    scene.stream.select(scene.weights[0], 2)
    scene.step(0)
    assert scene.stream.misses > 0


@pytest.mark.parametrize("total", [30, 40])
def test_streamed_blocks_are_spread_and_nested(total) -> None:
    sets = [set(streamed_blocks(total, resident)) for resident in range(total + 1)]
    assert [len(s) for s in sets] == list(range(total, -1, -1))
    assert all(small < large for large, small in pairwise(sets))
    for chosen in sets[: total - 2]:
        ordered = sorted(chosen)
        distances = [
            b - a for a, b in zip(ordered, [*ordered[1:], ordered[0] + total], strict=True)
        ]
        assert max(distances) <= 2 * min(distances)
    with pytest.raises(ValueError, match="41 resident"):
        streamed_blocks(40, 41)


# ---------------------------------------------------------------------- weights


def test_masters_have_exact_sizes_and_aligned_tensors() -> None:
    (block,) = make_blocks(1)
    weights = BlockWeights.take([block], HostMemory(CPU))
    assert {id(t) for t in weights.tensors()} == {id(t) for t in tensors(block)}
    (master,) = {t.untyped_storage().data_ptr() for t in tensors(block)}
    end = 0
    for tensor in weights.tensors():
        start = -(-end // 256) * 256
        assert tensor.data_ptr() - master == start
        end = start + tensor.nbytes
    assert weights.total_size == weights.size(0) == end


def test_trainable_parameters_are_left_alone() -> None:
    (block,) = make_blocks(1)
    adapter = nn.Parameter(torch.ones(3))
    block.register_parameter("adapter", adapter)
    address = adapter.data_ptr()
    weights = BlockWeights.take([block], HostMemory(CPU))
    stream = BlockStream(CPU)
    stream.select(weights, 0)
    stream.use(0)
    assert adapter.data_ptr() == address
    assert id(adapter) not in {id(t) for t in weights.tensors()}


def test_mapped_weights_stay_where_they_are() -> None:
    (block,) = make_blocks(1)
    addresses = [t.data_ptr() for t in tensors(block)]
    weights = BlockWeights.take([block], HostMemory(CPU), mapped=True)
    stream = BlockStream(CPU)
    stream.select(weights, 0)
    stream.use(0)
    assert [t.data_ptr() for t in tensors(block)] != addresses
    stream.done(0, Pass.INFERENCE)
    assert [t.data_ptr() for t in tensors(block)] == addresses


def test_tensors_may_be_exchanged_between_uses() -> None:
    """As merged and base weights are: the objects are re-bound, wherever modules hold them."""
    (block,) = make_blocks(1)
    other = torch.full((7, 5), 2.0)
    layer: nn.Module = block[0]  # pyright: ignore[reportIndexIssue]
    layer.register_buffer("other", other)
    weight = layer.weight
    stream = BlockStream(CPU)
    stream.select(BlockWeights.take([block], HostMemory(CPU)), 0)
    layer._parameters["weight"], layer._buffers["other"] = layer.other, weight  # pyright: ignore[reportArgumentType]
    stream.use(0)
    assert layer.weight.eq(2).all()
    stream.done(0, Pass.INFERENCE)
    layer._parameters["weight"], layer._buffers["other"] = weight, layer.weight
    stream.use(0)
    assert layer.weight is weight and not layer.weight.eq(2).any()


def test_a_weight_that_was_replaced_is_noticed() -> None:
    (block,) = make_blocks(1)
    weights = BlockWeights.take([block], HostMemory(CPU))
    weights.check_bound_to_host()
    layer: nn.Module = block[0]  # pyright: ignore[reportIndexIssue]
    layer.weight.data = torch.zeros(7, 5)
    with pytest.raises(RuntimeError, match="block 0 was replaced"):
        weights.check_bound_to_host()


# ---------------------------------------------------------------------- wrong use, and no memory


def test_wrong_use_is_refused() -> None:
    scene = Scene(4)
    with pytest.raises(RuntimeError, match="select"):
        scene.stream.use(0)
    scene.stream.select(scene.weights[0], 0)
    scene.stream.use(0)
    with pytest.raises(RuntimeError, match="block 0 is in use"):
        scene.stream.use(0)
    with pytest.raises(RuntimeError, match="block 0 is in use"):
        scene.stream.select(scene.weights[0], 1)
    scene.stream.use(1)
    with pytest.raises(RuntimeError, match="no buffer for block 2"):
        scene.stream.use(2)


def test_release_ends_a_pass_that_an_exception_has_ended() -> None:
    scene = Scene(4)
    scene.stream.select(scene.weights[0], 1)
    scene.stream.use(0)
    scene.stream.release()
    assert scene.on_host()
    assert scene.stream.device_bytes == 0
    scene.stream.select(scene.weights[0], 1)
    scene.step()


def test_fake_tensors_are_streamed_with_the_sizes_of_real_ones() -> None:
    with FakeTensorMode():
        blocks = make_blocks(4)
        weights = BlockWeights.take(blocks, HostMemory(CPU))
        stream = BlockStream(CPU)
        stream.select(weights, 1)
        for index in range(4):
            stream.use(index)
            (memory,) = {t.untyped_storage()._cdata for t in tensors(blocks[index])}
            assert memory in {b.memory.untyped_storage()._cdata for b in stream.buffers()}
            stream.done(index, Pass.TRAIN_FORWARD)
        assert stream.device_bytes == 3 * weights.size(0)
