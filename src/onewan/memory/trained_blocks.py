"""`TrainedBlocks`: trains the weights of streamed blocks, one block at a time.

Behind the backward pass of a block its weights, which are on the device, are updated in place with
the optimizer state, which has come there meanwhile, and both are copied back to host memory while
the next block computes. So the device has the gradients of one block, and weights and state of a
few.

Where the state is: the optimizer creates it on the device in the first step. It then gets a flat
buffer in host memory for each block, as weights have one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from onewan.devices import copy_
from onewan.errors import TrainingError
from onewan.memory.block_weights import BlockInHostMemory, BlockWeights, FlatLayout
from onewan.memory.copiers import Copier, Load
from onewan.memory.copy_queue import InOrderQueue
from onewan.memory.device_buffer import DeviceBuffer
from onewan.memory.host_memory import HostMemory
from onewan.memory.passes import Pass

NUM_BUFFERS = 2
"""For state on the device: of the block that is updated, and of the next one."""

StateBuffer: TypeAlias = DeviceBuffer[int]
WeightBuffer: TypeAlias = DeviceBuffer[tuple[BlockWeights, int]]


@dataclass(slots=True)
class Traffic:
    """Bytes that have been copied."""

    to_device: int = 0
    to_host: int = 0


class TrainedBlocks:
    """Updates the blocks of `weights`, whose `training` is set."""

    def __init__(
        self,
        weights: BlockWeights,
        queue: InOrderQueue,
        host: HostMemory,
        copier: Callable[[bool], Copier],
        traffic: Traffic,
    ) -> None:
        """`copier` returns the one for pinned or unpinned memory."""
        assert weights.training is not None
        self.weights = weights
        self._training = weights.training
        self._queue = queue
        self._host = host
        self._copier = copier
        self._traffic = traffic
        self._states: list[BlockInHostMemory | None] = [None] * len(weights)
        self._buffers: list[StateBuffer] = []
        self._where: dict[int, StateBuffer] = {}
        self._stores: dict[int, Load] = {}
        """The latest copy to host memory of each block and each state, by identity."""
        for block in weights.blocks:
            block.stored = block.stored or queue.event()

    def prefetch(self, index: int, current: Pass) -> None:
        """Queue the copies of the states that are needed next, after a pass of block `index`."""
        last = len(self.weights) - 1
        if current is Pass.BACKWARD:
            window = range(index - 1, max(index - 1 - NUM_BUFFERS, -1), -1)
        elif index == last:
            window = range(last, max(last - NUM_BUFFERS, -1), -1)
        else:
            return
        for needed in window:
            state = self._state(needed)
            if state is None or needed in self._where:
                continue
            buffer = self._free_buffer(state.layout.size, keep=window)
            if buffer is None:
                return
            self._load(needed, state, buffer)

    def finish(self, index: int, buffer: WeightBuffer) -> None:
        """Update block `index`, whose gradients are complete and whose weights are in `buffer`, and
        copy weights and state to host memory behind that."""
        state, used = self._state(index), None
        if state is not None:
            used = self._where.get(index)
            if used is None:
                used = self._free_buffer(state.layout.size, keep=())
                assert used is not None  # none is in use between two updates
                self._load(index, state, used)
            used.wait_until_loaded(self._queue)
            state.bind(used.views_of(state.layout))
        # A former copy to host memory may be reading what is now overwritten.
        buffer.wait_until_stored(self._queue)
        self._training.update(index)
        block = self.weights.blocks[index]
        self._store(block, buffer)
        block.version = block.current_version
        self._store_state(index, state, used)

    @property
    def device_bytes(self) -> int:
        """Bytes of the buffers on the device."""
        return sum(buffer.memory.numel() for buffer in self._buffers)

    def settle(self) -> None:
        """Wait until all copies to host memory have been made."""
        for store in self._stores.values():
            store.wait_until_queued()
        for block in (*self.weights.blocks, *self._states):
            if block is not None and block.stored is not None:
                self._queue.host_after(block.stored)

    def release(self) -> None:
        """Free the buffers on the device."""
        for buffer in self._buffers:
            buffer.retire(self._queue)
        self._buffers.clear()
        self._where.clear()

    # ---------------------------------------------------------------------- state

    def _state(self, index: int) -> BlockInHostMemory | None:
        """The state of a block in host memory; None if there is none yet."""
        tensors = self._training.state(index)
        state = self._states[index]
        if not tensors:
            return None
        if state is None or not _are_same(tensors, state.tensors):
            # It has been loaded from a checkpoint, or is there before the first update.
            state = self._to_host(index, tensors)
        return state

    def _store_state(
        self, index: int, state: BlockInHostMemory | None, used: StateBuffer | None
    ) -> None:
        tensors = self._training.state(index)
        if state is not None and used is not None and _are_same(tensors, state.tensors):
            self._store(state, used)
            state.unbind()
            return
        if state is not None and len(tensors) == len(state.tensors):
            raise TrainingError(
                "this optimizer makes new state tensors in every step, so that they can't be kept "
                "in host memory; choose another optimizer"
            )
        if tensors:
            self._to_host(index, tensors)
        if used is not None:
            self._queue.computed(used.free)
            self._where.pop(index, None)
            used.holds = None

    def _to_host(self, index: int, tensors: Sequence[Tensor]) -> BlockInHostMemory:
        """Move state tensors into a flat buffer in host memory."""
        layout = FlatLayout.of(tensors)
        master = self._host.allocate(layout.size)
        views = layout.views(master.tensor)
        event = self._queue.event()
        self._queue.computed(event)
        self._queue.copy_out_after(event)
        with self._queue.copying_out():
            for view, tensor in zip(views, tensors, strict=True):
                copy_(view, tensor)
        self._queue.copied_out(event)
        # What is freed now is reused in the order of the computing stream.
        self._queue.compute_after(event)
        state = BlockInHostMemory(
            tensors=list(tensors),
            layout=layout,
            host=views,
            sources=[(0, master.tensor)],
            is_pinned=master.is_pinned,
            stored=event,
        )
        state.unbind()
        self._states[index] = state
        self._where.pop(index, None)
        return state

    # ---------------------------------------------------------------------- copies

    def _free_buffer(self, size: int, keep: Sequence[int]) -> StateBuffer | None:
        """A buffer of at least `size` bytes that holds none of the states `keep`."""
        for buffer in self._buffers:
            if buffer.holds is not None and buffer.holds in keep:
                continue
            if buffer.memory.numel() >= size:
                return buffer
            buffer.retire(self._queue)
            self._buffers.remove(buffer)
            break
        if len(self._buffers) == NUM_BUFFERS:
            return None
        buffer: StateBuffer = DeviceBuffer.allocate(-1, size, self._queue)
        self._buffers.append(buffer)
        return buffer

    def _load(self, index: int, state: BlockInHostMemory, buffer: StateBuffer) -> None:
        if buffer.holds is not None:
            del self._where[buffer.holds]
        buffer.holds = index
        self._where[index] = buffer
        size = state.layout.size
        buffer.load = self._copier(state.is_pinned).load(
            state, buffer.memory[:size], buffer.before_loading(), buffer.ready
        )
        self._traffic.to_device += size

    def _store(self, block: BlockInHostMemory, buffer: StateBuffer | WeightBuffer) -> None:
        size = block.layout.size
        self._queue.computed(buffer.free)
        buffer.store = self._copier(block.is_pinned).store(block, buffer.memory[:size], buffer.free)
        buffer.stored = block.stored
        self._stores[id(block)] = buffer.store
        self._traffic.to_host += size


def _are_same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return [id(tensor) for tensor in some] == [id(tensor) for tensor in others]
