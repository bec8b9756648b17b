"""`BlockWeights`: the weights of all blocks of a transformer, in host memory, ready to be copied.

Each block has one flat buffer, its master, so that a single copy brings it to the device. The
tensors of its modules are views of the master, and of a buffer on the device while the block is in
use (`onewan.memory.streaming`). The objects stay the same: parameters are re-bound through
``data``, so that whoever holds them, or exchanges them between modules, needs to know nothing of
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from onewan.memory.copy_queue import Event
from onewan.memory.host_memory import HostBuffer, HostMemory

ALIGNMENT = 256
"""Bytes at whose multiples tensors start in a buffer, as in PyTorch's own allocations (512):
kernels load 16 bytes at once, and tensor cores prefer 128."""


@dataclass(frozen=True, slots=True)
class Part:
    """Where a tensor is in a flat buffer."""

    offset: int
    size: int
    """In bytes, as `offset`."""
    dtype: torch.dtype
    shape: torch.Size

    def view(self, flat: Tensor) -> Tensor:
        """The tensor, contiguous, as a view of the uint8 tensor `flat`."""
        return flat[self.offset : self.offset + self.size].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class FlatLayout:
    """Places for tensors one after another in a flat buffer. Blocks with tensors of the same shapes
    and dtypes have equal layouts."""

    parts: tuple[Part, ...]

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> FlatLayout:
        """For `tensors` in their order, each aligned to `ALIGNMENT`."""
        parts: list[Part] = []
        end = 0
        for tensor in tensors:
            offset = -(-end // ALIGNMENT) * ALIGNMENT
            size = tensor.numel() * tensor.element_size()
            parts.append(Part(offset, size, tensor.dtype, tensor.shape))
            end = offset + size
        return FlatLayout(tuple(parts))

    @cached_property
    def size(self) -> int:
        """Bytes that a buffer needs."""
        return self.parts[-1].offset + self.parts[-1].size if self.parts else 0

    def views(self, flat: Tensor) -> list[Tensor]:
        return [part.view(flat) for part in self.parts]


class BlockTraining(Protocol):
    """Trains the weights of blocks, one block at a time."""

    def state(self, index: int) -> list[Tensor]:
        """The tensors that a block's update needs besides its weights, on the device or in host
        memory: optimizer state, once there is some. They are re-bound through ``data``."""
        ...

    def update(self, index: int) -> None:
        """Update the weights of a block whose gradients are complete, and drop these. Weights and
        state are on the device."""
        ...


@dataclass(slots=True, eq=False)
class BlockInHostMemory:
    """The weights of one block."""

    tensors: list[Tensor]
    """Parameters and buffers of the modules: the objects that are re-bound."""
    layout: FlatLayout
    host: list[Tensor]
    """What `tensors` are bound to while the block is not in use: views of the master, or of the
    file."""
    sources: list[tuple[int, Tensor]]
    """What is copied to the device: (offset, bytes as uint8). One, if there is a master."""
    is_pinned: bool
    stored: Event = None
    """Behind the latest copy from the device; None for what is never copied back."""
    version: int = 0
    """`current_version` when the device had the same values."""

    @property
    def current_version(self) -> int:
        """Changes with every operation on the tensors that writes to them."""
        return sum(tensor._version for tensor in self.tensors)

    def bind(self, views: Sequence[Tensor]) -> None:
        """Make `views` the values of the modules' tensors."""
        for tensor, view in zip(self.tensors, views, strict=True):
            tensor.data = view

    def unbind(self) -> None:
        """Bind the modules' tensors to host memory again."""
        self.bind(self.host)


class BlockWeights:
    """The weights and the buffers of the blocks of one transformer.

    `len` is the number of blocks. Made by `take`.
    """

    training: BlockTraining | None = None
    """Updates the weights in the backward pass, if they are trained; otherwise they are frozen."""

    def __init__(self, blocks: Sequence[BlockInHostMemory]) -> None:
        self.blocks = list(blocks)

    @classmethod
    @torch.no_grad()
    def take(
        cls,
        blocks: Sequence[nn.Module],
        host: HostMemory,
        *,
        mapped: bool = False,
        trained: bool = False,
    ) -> BlockWeights:
        """Move the frozen parameters and the buffers of `blocks` into one master each.

        Block by block, so that what they held before is freed meanwhile, and memory never holds two
        copies of the model. Trainable parameters are left alone, but with `trained` they belong to
        the masters, too; `training` has to be set then. With `mapped` there is no master: tensors
        stay where they are, such as in a file that is mapped into memory, and are gathered at each
        copy. Where `host` has memory that the processes of a machine have in common, the masters of
        frozen weights are in it: one of the processes writes them, and all take the same blocks.
        Whatever replaces tensors of the blocks (adapters, merged differences) has to come before.
        TypeError for a tensor that consists of several ones, ValueError for both options together.
        """
        if mapped and trained:
            raise ValueError("weights that are trained need masters: a mapped file is not written")
        if mapped:
            return cls([_take_mapped(block) for block in blocks])
        layouts = [FlatLayout.of(_tensors_of(block, trained=trained)) for block in blocks]
        sizes = [-(-layout.size // ALIGNMENT) * ALIGNMENT for layout in layouts]
        shared = None if trained else host.shared(sum(sizes))
        if shared is None:
            return cls([_take(block, host.allocate, trained=trained) for block in blocks])
        parts = iter(shared.tensor.split(sizes))

        def part(size: int) -> HostBuffer:
            return HostBuffer(next(parts)[:size], is_pinned=shared.is_pinned)

        taken = [_take(block, part, writes=shared.is_writer) for block in blocks]
        shared.written()
        return cls(taken)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def total_size(self) -> int:
        """Bytes of all blocks."""
        return sum(self.size(index) for index in range(len(self)))

    def size(self, index: int) -> int:
        """Bytes of a block in its flat buffer."""
        return self.blocks[index].layout.size

    def tensors(self) -> Iterator[Tensor]:
        """All parameters and buffers that belong to the masters."""
        for block in self.blocks:
            yield from block.tensors

    def check_bound_to_host(self) -> None:
        """RuntimeError if a tensor of a block that is not in use has been given another memory,
        which the next use would silently undo."""
        for index, block in enumerate(self.blocks):
            for tensor, host in zip(block.tensors, block.host, strict=True):
                if isinstance(tensor, FakeTensor):  # which has no memory to compare
                    continue
                if tensor.data_ptr() != host.data_ptr():
                    raise RuntimeError(
                        f"a weight of block {index} was replaced after the block had been taken "
                        "for streaming; replace weights before, or copy into them"
                    )


def _take_mapped(block: nn.Module) -> BlockInHostMemory:
    """A block without a master, whose tensors stay where they are."""
    tensors = _tensors_of(block, trained=False)
    layout = FlatLayout.of(tensors)
    in_host = [tensor.detach().contiguous() for tensor in tensors]
    sources = [
        (part.offset, _bytes(tensor))
        for part, tensor in zip(layout.parts, in_host, strict=True)
        if part.size
    ]
    return BlockInHostMemory(
        tensors=tensors, layout=layout, host=in_host, sources=sources, is_pinned=False
    )


def _take(
    block: nn.Module,
    allocate: Callable[[int], HostBuffer],
    *,
    trained: bool = False,
    writes: bool = True,
) -> BlockInHostMemory:
    """A block with a master of so many bytes from `allocate`, which this process fills if it
    `writes`."""
    tensors = _tensors_of(block, trained=trained)
    layout = FlatLayout.of(tensors)
    master = allocate(layout.size)
    in_host = layout.views(master.tensor)
    for tensor, view in zip(tensors, in_host, strict=True):
        if writes:
            view.copy_(tensor)
        tensor.data = view  # frees the tensor's former memory
    return BlockInHostMemory(
        tensors=tensors,
        layout=layout,
        host=in_host,
        sources=[(0, master.tensor)],
        is_pinned=master.is_pinned,
    )


def _tensors_of(block: nn.Module, *, trained: bool) -> list[Tensor]:
    """Each frozen parameter, with `trained` each parameter, and each buffer of `block`, once."""
    found: dict[int, Tensor] = {}
    for path, module in block.named_modules():
        for registry in (module._parameters, module._buffers):
            for name, tensor in registry.items():
                if tensor is None or (tensor.requires_grad and not trained):
                    continue
                # They keep references to their parts, which `data` does not reach.
                if is_traceable_wrapper_subclass(tensor):
                    raise TypeError(f"{path}.{name}: {type(tensor).__name__} can't be streamed")
                found[id(tensor)] = tensor
    return list(found.values())


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, uint8, as a view."""
    return tensor.view(-1).view(torch.uint8)
