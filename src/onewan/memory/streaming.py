"""`BlockStream`: brings the weights of transformer blocks to the device ahead of their use.

Some blocks are resident. The others are streamed through a ring of buffers on the device: while one
block computes, the next ones are copied. Frozen weights are never copied back. What is in the ring
is kept where the backward pass turns and from one step to the next, so that a step of S streamed
blocks loads 2 (S - ring) of them, which is the least that a ring of this size allows. (The ring
that turns is musubi-tuner's idea: PR 972, June 2026.)

The order of a step::

    stream.select(weights, resident=10)
    for index in range(blocks):               # the forward pass
        stream.use(index)
        ...                                   # queue the block's kernels
        stream.done(index, Pass.TRAIN_FORWARD)
    for index in reversed(range(blocks)):     # the backward pass
        stream.use(index)
        ...                                   # compute the block again, and its gradients
        stream.done(index, Pass.BACKWARD)

A weight may only be read between `use` and `done`: autograd must keep no block's weights for later,
so each block is computed again in the backward pass, by an autograd function of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

import torch

from onewan.memory.block_order import streamed_blocks
from onewan.memory.block_weights import BlockWeights
from onewan.memory.copiers import Copier, DirectCopier, StagedCopier
from onewan.memory.copy_queue import copy_queue
from onewan.memory.device_buffer import DeviceBuffer
from onewan.memory.host_memory import HostMemory
from onewan.memory.passes import Pass
from onewan.memory.trained_blocks import Traffic, TrainedBlocks


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One entry of the schedule, in the order in which the host queued them."""

    kind: Literal["load", "use", "done"]
    """A copy to the device is queued; the kernels of a block may be; they have been."""
    block: int
    buffer: int
    """The buffer on the device. A copy into it starts after the computations on the block that it
    held before: the latest "done" of the same buffer."""
    size: int
    """Bytes of the block."""
    current: Pass | None = None
    """For "done"."""


Buffer: TypeAlias = DeviceBuffer[tuple[BlockWeights, int]]


class BlockStream:
    """The buffers on one device and the copies into them; one per run, for all of its experts."""

    def __init__(
        self,
        device: torch.device,
        *,
        ring: int = 2,
        host: HostMemory | None = None,
        recorder: Callable[[StreamEvent], None] | None = None,
    ) -> None:
        """`ring` is the number of buffers that streamed blocks share, at least 2 for copies beside
        computations; `host` allocates pinned memory for weights that are not pinned themselves;
        `recorder` is told every entry of the schedule."""
        # As tensors name it: cuda is cuda:0, and the two don't compare equal.
        self.device = device = torch.empty(0, device=device).device
        self.ring = ring
        self.recorder = recorder
        self.traffic = Traffic()
        self.loads = 0
        """Blocks that have been copied to the device."""
        self.misses = 0
        """Those of them that were not there when they were needed: the computations waited."""
        self._queue = copy_queue(device)
        self._host = host or HostMemory(device)
        self._direct = DirectCopier(self._queue)
        self._staged: StagedCopier | None = None
        self._weights: BlockWeights | None = None
        self._announced: BlockWeights | None = None
        self._resident = 0
        self._first_trained = 0
        self._residents: dict[int, Buffer] = {}
        """Buffers of resident blocks by index; both experts use the same ones."""
        self._ring: list[Buffer] = []
        self._where: dict[tuple[BlockWeights, int], Buffer] = {}
        self._used: dict[int, tuple[BlockWeights, Buffer]] = {}
        self._num_buffers = 0
        self._trained: dict[BlockWeights, TrainedBlocks] = {}

    @property
    def bytes_to_device(self) -> int:
        return self.traffic.to_device

    @property
    def bytes_to_host(self) -> int:
        return self.traffic.to_host

    # ---------------------------------------------------------------------- which weights

    @property
    def weights(self) -> BlockWeights | None:
        """The weights that are selected."""
        return self._weights

    @property
    def is_changing(self) -> bool:
        """Whether other weights have been announced, and not been selected yet."""
        return self._announced is not None

    def select(self, weights: BlockWeights, resident: int, *, first_trained: int = 0) -> None:
        """The blocks that are used from now on are those of `weights`.

        `resident` of them stay on the device. The copies of the first blocks are queued at once
        where they are missing. `first_trained` is the block at which the backward pass ends. Cheap
        without a change. RuntimeError while a block is in use.
        """
        resident = min(resident, len(weights))
        self._announced = None
        self._first_trained = first_trained
        if weights is self._weights and resident == self._resident:
            return
        if self._used:
            raise RuntimeError(f"block {next(iter(self._used))} is in use; call done() before")
        for other, trained in self._trained.items():
            if other is not weights:
                trained.release()
        # None in between, so that a call after one that ran out of memory starts again.
        self._weights, self._resident = None, resident
        self._fit_buffers(weights)
        self._weights = weights
        self._prefetch(weights, self._window(weights).first)

    def announce(self, weights: BlockWeights) -> None:
        """The weights of the step after this one, called before the last backward pass.

        Behind it, each buffer that is no longer needed gets the block of `weights` that is needed
        first, so that the change costs no time. If they are not selected afterwards, blocks are
        missing and loaded again.
        """
        self._announced = None if weights is self._weights else weights

    # ---------------------------------------------------------------------- the blocks

    def begin(self, first: int) -> None:
        """Nothing has to be waited for."""
        del first

    def use(self, index: int) -> None:
        """Bind the weights of block `index` to memory on the device, and make the stream of the
        computations wait for their copy.

        A block that is not there is loaded first. RuntimeError without `select`, or if there are
        more blocks in use than buffers.
        """
        weights = self._weights
        if weights is None:
            raise RuntimeError("no weights are selected; call select() first")
        if index in self._used:
            raise RuntimeError(f"block {index} is in use already; call done() before")
        buffer = self._where.get((weights, index))
        if buffer is not None and weights.training is not None:
            buffer = self._unless_changed(weights, index, buffer)
        if buffer is None:
            self.misses += 1
            buffer = self._buffer_for(weights, index, keep=())
            if buffer is None:
                raise RuntimeError(
                    f"there is no buffer for block {index}: {len(self._used)} blocks are in use, "
                    f"and the ring has {len(self._ring)}"
                )
            self._load(weights, index, buffer)
        buffer.wait_until_loaded(self._queue)
        block = weights.blocks[index]
        block.bind(buffer.views_of(block.layout))
        buffer.in_use = True
        self._used[index] = weights, buffer
        self._record("use", weights, index, buffer)

    def done(self, index: int, current: Pass) -> None:
        """The kernels that use block `index` are queued: bind its weights to host memory again, and
        let its buffer be refilled behind the kernels. Queues the copies of the next blocks."""
        weights, buffer = self._used.pop(index)
        trained = self._trained_blocks(weights)
        if trained is not None and current is Pass.BACKWARD:
            trained.finish(index, buffer)
        weights.blocks[index].unbind()
        buffer.in_use = False
        self._queue.computed(buffer.free)
        self._record("done", weights, index, buffer, current)
        window = self._window(weights)
        if trained is not None and current is not Pass.INFERENCE:
            trained.prefetch(index, current)
        if current is Pass.INFERENCE:
            self._prefetch(weights, window.cyclic[index])
        elif current is Pass.TRAIN_FORWARD:
            self._prefetch(weights, window.forward[index])
        elif self._announced is None:
            self._prefetch(weights, window.backward[index])
        else:
            self._prefetch(weights, window.last_backward[index])
            self._change_over(weights, index, self._announced)

    # ---------------------------------------------------------------------- memory

    @property
    def device_bytes(self) -> int:
        """Bytes of all buffers on the device."""
        states = sum(trained.device_bytes for trained in self._trained.values())
        return states + sum(buffer.memory.numel() for buffer in self.buffers())

    def buffers(self) -> tuple[Buffer, ...]:
        """The buffers of weights on the device."""
        return (*self._ring, *self._residents.values())

    def release(self) -> None:
        """Free the buffers on the device; `select` allocates them again. A block that is in use,
        since an exception ended its pass, is bound to host memory."""
        for index, (weights, buffer) in self._used.items():
            weights.blocks[index].unbind()
            buffer.in_use = False
        self._used.clear()
        for buffer in self.buffers():
            self._retire(buffer)
        for trained in self._trained.values():
            trained.release()
        self._ring.clear()
        self._residents.clear()
        self._weights = self._announced = None

    def settle(self) -> None:
        """Wait until host memory has the present values of weights and state that are trained.
        Needed before they are read there."""
        for trained in self._trained.values():
            trained.settle()

    def close(self) -> None:
        """Free the buffers, and end the thread of the staged copies, if there is one."""
        self.release()
        if self._staged is not None:
            self._staged.close()
            self._staged = None

    def _fit_buffers(self, weights: BlockWeights) -> None:
        """Allocate what `weights` need beyond the buffers that there are, and free the rest."""
        streamed = streamed_blocks(len(weights), self._resident)
        wanted = {index: weights.size(index) for index in range(len(weights))}
        for index in streamed:
            del wanted[index]
        for index, buffer in list(self._residents.items()):
            if buffer.memory.numel() != wanted.get(index):
                self._retire(self._residents.pop(index))
        size = max(map(weights.size, streamed), default=0)
        count = min(self.ring, len(streamed))
        kept = [b for b in self._ring if b.memory.numel() == size][:count]
        for buffer in self._ring:
            if buffer not in kept:
                self._retire(buffer)
        # Allocated only now, so that the peak is that of the larger configuration.
        self._ring = kept + [self._new_buffer(size) for _ in range(count - len(kept))]
        for index, needed in wanted.items():
            if index not in self._residents:
                self._residents[index] = self._new_buffer(needed)

    def _new_buffer(self, size: int) -> Buffer:
        self._num_buffers += 1
        return DeviceBuffer.allocate(self._num_buffers, size, self._queue)

    def _retire(self, buffer: Buffer) -> None:
        if buffer.holds is not None:
            del self._where[buffer.holds]
        buffer.retire(self._queue)

    # ---------------------------------------------------------------------- copies

    def _window(self, weights: BlockWeights) -> _Windows:
        return _windows(len(weights), self._resident, self.ring, self._first_trained)

    def _prefetch(self, weights: BlockWeights, window: tuple[int, ...]) -> None:
        """Queue the copies of those blocks of `window` that are missing, as far as buffers are
        free. Blocks of the window remain where they are."""
        for index in window:
            if (weights, index) not in self._where:
                buffer = self._buffer_for(weights, index, keep=window)
                if buffer is not None:
                    self._load(weights, index, buffer)

    def _buffer_for(
        self, weights: BlockWeights, index: int, keep: tuple[int, ...]
    ) -> Buffer | None:
        """The buffer to load a block into: its own if it is resident, otherwise one of the ring
        that is not in use and holds none of `weights`' blocks `keep`."""
        if (own := self._residents.get(index)) is not None:
            return None if own.in_use else own
        for buffer in self._ring:
            if buffer.in_use:
                continue
            if buffer.holds is None or buffer.holds[0] is not weights:
                return buffer
            if buffer.holds[1] not in keep:
                return buffer
        return None

    def _change_over(self, weights: BlockWeights, index: int, following: BlockWeights) -> None:
        """Refill buffers that the rest of the backward pass does not need, after block `index`."""
        if len(following) != len(weights):
            return  # other blocks would be resident; `select` sorts them out
        own = self._residents.get(index)
        if own is not None:
            if own.memory.numel() == following.size(index):
                self._load(following, index, own)
            return
        keep = self._window(weights).last_backward[index]
        for block in self._window(following).first:
            if block in self._residents or (following, block) in self._where:
                continue
            for buffer in self._ring:
                holds = buffer.holds
                is_needed = holds is not None and (
                    holds[0] is following or (holds[0] is weights and holds[1] in keep)
                )
                fits = following.size(block) <= buffer.memory.numel()
                if fits and not (buffer.in_use or is_needed):
                    self._load(following, block, buffer)
                    break

    def _load(self, weights: BlockWeights, index: int, buffer: Buffer) -> None:
        if buffer.holds is not None:
            del self._where[buffer.holds]
        buffer.holds = weights, index
        self._where[buffer.holds] = buffer
        block = weights.blocks[index]
        size = block.layout.size
        copier = self._copier(block.is_pinned)
        target = buffer.memory[:size]
        buffer.load = copier.load(block, target, buffer.before_loading(), buffer.ready)
        block.version = block.current_version
        self.loads += 1
        self.traffic.to_device += size
        self._record("load", weights, index, buffer)

    def _unless_changed(self, weights: BlockWeights, index: int, buffer: Buffer) -> Buffer | None:
        """`buffer`, unless the host has written the block's weights since they were copied."""
        block = weights.blocks[index]
        if block.version == block.current_version:
            return buffer
        del self._where[weights, index]
        buffer.holds = None
        return None

    def _trained_blocks(self, weights: BlockWeights) -> TrainedBlocks | None:
        """What updates `weights`, if they are trained."""
        if weights.training is None:
            return None
        if weights not in self._trained:
            self._trained[weights] = TrainedBlocks(
                weights, self._queue, self._host, self._copier, self.traffic
            )
        return self._trained[weights]

    def _copier(self, is_pinned: bool) -> Copier:
        if is_pinned or not self._queue.is_async:
            return self._direct
        if self._staged is None:
            self._staged = StagedCopier(self._queue, self._host)
        return self._staged

    def _record(
        self,
        kind: Literal["load", "use", "done"],
        weights: BlockWeights,
        index: int,
        buffer: Buffer,
        current: Pass | None = None,
    ) -> None:
        if self.recorder is not None:
            size = weights.size(index)
            self.recorder(StreamEvent(kind, index, buffer.number, size, current))


@dataclass(frozen=True, slots=True)
class _Windows:
    """The blocks to have on the device next, in the order of their use: up to the last one that the
    ring can hold, with the resident blocks among them."""

    first: tuple[int, ...]
    """Before a forward pass."""
    forward: tuple[tuple[int, ...], ...]
    """After each block of a forward pass that a backward pass follows."""
    backward: tuple[tuple[int, ...], ...]
    """After each block of a backward pass that a forward pass follows."""
    last_backward: tuple[tuple[int, ...], ...]
    """After each block of a backward pass that a forward pass with other weights follows."""
    cyclic: tuple[tuple[int, ...], ...]
    """After each block of a forward pass that another one follows."""


@cache
def _windows(total: int, resident: int, ring: int, first_trained: int) -> _Windows:
    streamed = frozenset(streamed_blocks(total, resident))

    def up_to_ring(order: list[int]) -> tuple[int, ...]:
        window: dict[int, None] = {}  # an ordered set
        room = ring
        for index in order:
            if index in streamed and index not in window:
                room -= 1
            if room < 0:
                break
            window[index] = None
        return tuple(window)

    everything = list(range(total))
    return _Windows(
        first=up_to_ring(everything),
        forward=tuple(up_to_ring(everything[i + 1 :]) for i in everything),
        backward=tuple(
            up_to_ring(everything[first_trained:i][::-1] + everything) for i in everything
        ),
        last_backward=tuple(up_to_ring(everything[first_trained:i][::-1]) for i in everything),
        cyclic=tuple(up_to_ring(everything[i + 1 :] + everything[: i + 1]) for i in everything),
    )
