"""`ShardedTransformer`: blocks of which each process has a shard, by FSDP2.

`torch.distributed.fsdp.fully_shard` keeps the shards and gathers the whole weights of a block. When
it does that is decided here, since blocks are computed in parts and not by their `forward`: a
block's weights are gathered one block ahead of its computation and freed after it, and the sum of
its gradients is sent behind its backward pass.

Sharded are the weights and biases of the linear layers of blocks, 99.9 % of a block. Norms and
modulation tables, which may have another dtype, what is outside of the blocks, and adapters are on
every process.

All processes have to gather the same block at the same time, although they may have different
numbers of batches. So before each pass they agree on the one that comes next (`Passes`), and those
that do not compute it gather the weights, and send gradients of zeros, for the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from onewan.memory.passes import Pass
from onewan.model.transformer import WanTransformer
from onewan.parallel.shards import GradientSum, ShardGradient, ShardGroup


class Passes:
    """The order in which the processes of a group compute passes through sharded transformers."""

    def __init__(self, group: ShardGroup) -> None:
        self._group = group
        self._transformers: list[ShardedTransformer] = []

    def add(self, transformer: ShardedTransformer) -> None:
        """Take part in the passes through `transformer`. All processes add the same ones."""
        self._transformers.append(transformer)

    def begin(self, transformer: ShardedTransformer, first: int) -> None:
        """Return when this process may compute a pass whose backward pass reaches block `first`;
        with the number of blocks, there is none. Until then it takes part in those of others."""
        own = self._transformers.index(transformer), first
        while (chosen := self._chosen(own)) != own:
            assert chosen is not None
            self._take_part(*chosen)

    def finish(self) -> None:
        """Take part in the passes of others until no process has any left."""
        while (chosen := self._chosen(None)) is not None:
            self._take_part(*chosen)
        for transformer in self._transformers:
            transformer.finish()

    def _chosen(self, wanted: tuple[int, int] | None) -> tuple[int, int] | None:
        """The pass that comes next, of those that the processes want; None if none wants one."""
        longest = max(len(each) for each in self._transformers) + 1
        flags = torch.zeros(len(self._transformers) * longest)
        if wanted is not None:
            flags[wanted[0] * longest + wanted[1]] = 1
        found = self._group.total(flags).nonzero().flatten().tolist()
        return divmod(found[0], longest) if found else None

    def _take_part(self, number: int, first: int) -> None:
        """Gather the weights of a pass, and send gradients of zeros."""
        transformer = self._transformers[number]
        count = len(transformer)
        transformer.starts(first)
        forward = Pass.INFERENCE if first == count else Pass.TRAIN_FORWARD
        for index in range(count):
            transformer.use(index)
            transformer.done(index, forward)
        for index in range(count - 1, first - 1, -1):
            transformer.use(index)
            transformer.done(index, Pass.BACKWARD)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a module has a parameter: FSDP2 puts the whole weight there while it is gathered."""

    module: nn.Module
    name: str

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.get_parameter(self.name)

    def put(self, parameter: nn.Parameter) -> None:
        self.module.register_parameter(self.name, parameter)


class ShardedTransformer:
    """A `WeightSource` of the block runner, and a `Placement`: shards stay on the device."""

    def __init__(
        self,
        transformer: WanTransformer,
        device: torch.device,
        group: ShardGroup,
        passes: Passes,
        replicated: Collection[nn.Parameter],
    ) -> None:
        """Shards the weights of `transformer`, which all processes have as a whole, but not
        `replicated` ones; everything is moved to `device`."""
        self.group = group
        self._transformer, self._passes = transformer, passes
        self._blocks: list[FSDPModule] = []
        self._places: list[dict[str, _Place]] = []
        """The sharded parameters of each block by their names in the transformer."""
        self.shapes: dict[str, torch.Size] = {}
        """Of the whole weights that are sharded, by their names."""
        self.shards: dict[str, nn.Parameter] = {}
        """This process's rows of each: [rows, ...], as parameters that an optimizer can update."""
        for number, block in enumerate(transformer.blocks):
            self._blocks.append(self._shard(f"blocks.{number}.", block, device, replicated))
        for tensor in self._others():
            tensor.data = tensor.data.to(device)
        self._gathering: dict[int, Any] = {}
        """Blocks whose weights are on the way or there, with FSDP2's handles."""
        self._sums = deque[GradientSum]()
        """Of the gradients of the latest blocks, under way."""
        self._first, self._is_backward = len(self._blocks), False
        passes.add(self)

    def __len__(self) -> int:
        return len(self._blocks)

    def _shard(
        self, prefix: str, block: nn.Module, device: torch.device, kept: Collection[nn.Parameter]
    ) -> FSDPModule:
        whole = {id(parameter) for parameter in kept}
        places = {
            f"{prefix}{path}.{name}": _Place(module, name)
            for path, module in block.named_modules()
            if isinstance(module, nn.Linear)
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) not in whole
        }
        chosen = {id(place.parameter) for place in places.values()}
        block.to(device)
        sharded = fully_shard(
            block,
            mesh=self.group.mesh,
            reshard_after_forward=True,
            ignored_params={p for p in block.parameters() if id(p) not in chosen},
        )
        for name, place in places.items():
            parameter: Any = place.parameter  # a DTensor by now
            self.shapes[name] = parameter.shape
            local = parameter.detach().to_local()
            self.shards[name] = nn.Parameter(local, requires_grad=parameter.requires_grad)
        self._places.append(places)
        return sharded

    # ------------------------------------------------------------------------ for the block runner

    def begin(self, first: int) -> None:
        """A pass begins, whose backward pass reaches block `first`: returns when it is this
        process's turn."""
        self._passes.begin(self, first)
        self.starts(first)

    def starts(self, first: int) -> None:
        """The processes compute a pass now, or take part in it."""
        self._first, self._is_backward = first, False

    def use(self, index: int) -> None:
        """Make block `index` have its whole weights, and begin to gather the next one's."""
        self._gather(index)
        with self.group.communicating():
            self._gathering[index].wait()
        following = index - 1 if self._is_backward else index + 1
        if (self._first if self._is_backward else 0) <= following < len(self):
            self._gather(following)

    def done(self, index: int, current: Pass) -> None:
        """Free the whole weights of block `index`; after its backward pass, send its gradients."""
        last = index == len(self) - 1
        if current is Pass.BACKWARD:
            self._send_gradients(index)
        elif last and current is Pass.TRAIN_FORWARD:
            self._is_backward = True  # which begins with this block
            return
        self._gathering.pop(index)
        self._blocks[index].reshard()

    def finish(self) -> None:
        """Add what is under way to the gradients of the shards."""
        while self._sums:
            self._sums.popleft().add()

    def _gather(self, index: int) -> None:
        if index not in self._gathering:
            with self.group.communicating():
                self._gathering[index] = self._blocks[index].unshard(async_op=True)

    def _send_gradients(self, index: int) -> None:
        gradients = list[ShardGradient]()
        for name, place in self._places[index].items():
            if self.shards[name].requires_grad:
                whole = place.parameter
                gradients.append(
                    ShardGradient(shape=whole.shape, whole=whole.grad, shard=self.shards[name])
                )
                whole.grad = None
        if not gradients:
            return
        # So that the whole gradients of two blocks exist at a time, and with replicas the sums of
        # one block's shards between them.
        for sums in self._sums:
            sums.send_between()
        under_way = 1 if self.group.mesh.size(0) == 1 else 2
        while len(self._sums) >= under_way:
            self._sums.popleft().add()
        self._sums.append(GradientSum(self.group, gradients))

    # ------------------------------------------------------------------------------ as a placement

    @property
    def is_ready(self) -> bool:
        return True

    def enter(self) -> None:
        """It is on the device."""

    def leave(self, *, trained: bool = True) -> None:
        """It stays on the device, where it needs a part of the memory of a whole one."""
        del trained

    @contextmanager
    def whole(self) -> Iterator[bool]:
        """A block in which the transformer of the group's first process has its whole weights, in
        host memory, to be written to files; it yields whether this is that process. All processes
        of the group call it."""
        is_here = self.group.ranks.rank == self.group.members[0]
        shards = dict[str, nn.Parameter]()
        try:
            for index, places in enumerate(self._places):
                with self.group.communicating():
                    self._blocks[index].unshard()
                # Copies also on the CPU, where the gathered memory is freed now.
                found = {
                    name: place.parameter.detach().to("cpu", copy=True)
                    for name, place in (places.items() if is_here else ())
                }
                self._blocks[index].reshard()
                for name, tensor in found.items():
                    shards[name] = places[name].parameter
                    places[name].put(nn.Parameter(tensor, requires_grad=False))
            yield is_here
        finally:
            for places in self._places:
                for name, place in places.items():
                    if name in shards:
                        place.put(shards[name])

    def _others(self) -> Iterator[Tensor]:
        """Parameters and buffers that are not sharded."""
        sharded = {id(p.parameter) for places in self._places for p in places.values()}
        tensors = chain(self._transformer.parameters(), self._transformer.buffers())
        return (tensor for tensor in tensors if id(tensor) not in sharded)
