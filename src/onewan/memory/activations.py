"""`KeptActivations`: where a block's kept tensors are between its forward and its backward pass.

Tensors that are to leave the device are copied to pinned host memory behind the forward pass, and
back ahead of the backward pass, on streams of their own. The device memory that this takes is
bounded without any wait of the host: a tensor is held until its copy is `DEPTH` blocks old, when
the compute stream waits for the copy and the tensor is dropped. The allocator may then reuse its
memory in the order of the compute stream, however far the host runs ahead of the device. (Without
that order, a host that runs ahead allocates memory for blocks whose predecessors have not left yet,
and nothing is saved.) On the way back, memory is taken for the next block only, once the largest
tensors of the present one, those of its feed-forward layer, are gone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onewan.devices import copy_
from onewan.memory.copy_queue import Event, copy_queue

DEPTH = 1
"""Blocks whose tensors are still on the device while they are copied to host memory."""

SMALL = 64 * 1024
"""Bytes below which a tensor is not worth a copy."""

AllocateHost = Callable[[int], Tensor]
"""Returns a host buffer of so many bytes, uint8."""


@dataclass
class _Kept:
    """The tensors of one block and batch, of which small ones stay where they are."""

    tensors: list[Tensor | None]
    """On the device; None for those that are in host memory only."""
    buffers: list[Tensor | None]
    """In host memory; None for those that stay."""
    written: Event = None
    """The copies to host memory have ended; None if there are none."""
    arrived: Event = None
    """The copies back have ended."""
    is_back: bool = False
    """Whether the copies back have been queued."""


class KeptActivations:
    """The tensors of each block and batch, by key.

    Host buffers are allocated once for each key and kept, since pinning memory takes seconds; a
    larger bucket replaces them.
    """

    def __init__(self, device: torch.device, allocate: AllocateHost) -> None:
        # As tensors name it: cuda is cuda:0, and the two don't compare equal.
        self._device = torch.empty(0, device=device).device
        self._allocate = allocate
        self._queue = copy_queue(device)
        self._flat: dict[tuple[Hashable, int], Tensor] = {}
        self._kept: dict[Hashable, _Kept] = {}
        self._leaving: deque[Hashable] = deque()
        self.bytes_to_host = 0
        self.bytes_to_device = 0

    def put(self, key: Hashable, tensors: Sequence[Tensor], leave: Sequence[bool]) -> None:
        """Keep `tensors`, which nobody changes afterwards; those marked in `leave` go to host
        memory."""
        buffers = [
            self._buffer((key, number), tensor) if leaves else None
            for number, (tensor, leaves) in enumerate(zip(tensors, leave, strict=True))
        ]
        if not any(buffer is not None for buffer in buffers):
            self._kept[key] = _Kept([*tensors], buffers)
            return
        queue, computed, written = self._queue, self._queue.event(), self._queue.event()
        queue.computed(computed)
        queue.copy_out_after(computed)
        with queue.copying_out():
            for buffer, tensor in zip(buffers, tensors, strict=True):
                if buffer is not None:
                    copy_(buffer, tensor)
                    self.bytes_to_host += tensor.nbytes
        queue.copied_out(written)
        self._kept[key] = _Kept([*tensors], buffers, written)
        self._leaving.append(key)
        if len(self._leaving) > DEPTH:
            self._drop(self._leaving.popleft())

    def prefetch(self, key: Hashable) -> None:
        """`take(key)` comes soon. Ignored for keys that are not kept."""
        kept = self._kept.get(key)
        if kept is None or None not in kept.tensors:
            return
        missing = [n for n, tensor in enumerate(kept.tensors) if tensor is None]
        for n in missing:
            kept.tensors[n] = torch.empty_like(kept.buffers[n], device=self._device)  # pyright: ignore[reportCallIssue, reportArgumentType]
        queue, computed, arrived = self._queue, self._queue.event(), self._queue.event()
        # That memory may have been freed by kernels that are still queued.
        queue.computed(computed)
        queue.copy_in_after(computed)
        queue.copy_in_after(kept.written)
        with queue.copying_in():
            for n in missing:
                tensor, buffer = kept.tensors[n], kept.buffers[n]
                assert tensor is not None and buffer is not None
                copy_(tensor, buffer)
                self.bytes_to_device += tensor.nbytes
        queue.copied_in(arrived)
        kept.arrived, kept.is_back = arrived, True

    def take(self, key: Hashable) -> list[Tensor]:
        """What `put` got, ready on the compute stream; it is no longer kept."""
        self.prefetch(key)
        kept = self._kept.pop(key)
        if key in self._leaving:
            # Freed in the order of the compute stream later, thus after the copy.
            self._leaving.remove(key)
            self._queue.compute_after(kept.written)
        elif kept.is_back:
            self._queue.compute_after(kept.arrived)
        return [tensor for tensor in kept.tensors if tensor is not None]

    def clear(self) -> None:
        """Drop everything, after a pass that was not finished."""
        for kept in self._kept.values():
            if any(buffer is not None for buffer in kept.buffers):
                self._queue.compute_after(kept.written)
            if kept.is_back:
                self._queue.compute_after(kept.arrived)
        self._leaving.clear()
        self._kept.clear()

    def _drop(self, key: Hashable) -> None:
        """Free the device memory of what is in host memory, in the order of the compute stream."""
        kept = self._kept[key]
        self._queue.compute_after(kept.written)
        pairs = zip(kept.tensors, kept.buffers, strict=True)
        kept.tensors = [tensor if buffer is None else None for tensor, buffer in pairs]

    def _buffer(self, key: tuple[Hashable, int], tensor: Tensor) -> Tensor | None:
        """Host memory in the shape, strides and type of `tensor`; None if it is to stay."""
        if tensor.nbytes < SMALL or tensor.device != self._device:
            return None
        flat = self._flat.get(key)
        if flat is None or flat.nbytes < tensor.nbytes:
            flat = self._flat[key] = self._allocate(tensor.nbytes)
        # Without memory, to get the strides that PyTorch chooses for a copy of the tensor.
        like = torch.empty_like(tensor, device="meta")
        return flat[: tensor.nbytes].view(tensor.dtype).as_strided(like.shape, like.stride())
