"""`ShardGroup`: processes that have shards of the same weights, and what they send each other.

Weights are sharded as FSDP2 (`torch.distributed.fsdp.fully_shard`) does it: along their first
dimension, in chunks of `ceil(rows / count)` rows, so that the last processes may have fewer rows or
none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from onewan.parallel.division import Part

_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
"""PyTorch 2.13 has renamed it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardGradient:
    """The gradient of a weight in one process."""

    shape: torch.Size
    """Of the whole weight."""
    whole: Tensor | None
    """The part of this process's clips and tokens, of that shape; None is zeros."""
    shard: nn.Parameter
    """The process's rows of the weight, whose `grad` gets the sum."""

    def rows(self, count: int) -> int:
        """Rows of the largest of `count` shards."""
        return -(-self.shape[0] // count)


class Messages(Protocol):
    """What a `Ranks` sends for the members of a group."""

    rank: int

    def add(self, tensors: Sequence[Tensor], group: Sequence[int]) -> None: ...

    def waiting(self) -> AbstractContextManager[None]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardGroup:
    """The processes that train the same experts."""

    ranks: Messages
    members: tuple[int, ...]
    """All of them. They are `mesh`, in rows."""
    mesh: DeviceMesh
    """[replicas, shards]: processes of a row have different shards, those of a column the same."""
    host_mesh: DeviceMesh
    """The same of tensors in host memory."""
    process_group: dist.ProcessGroup
    """For messages among the members."""

    @property
    def part(self) -> Part:
        """Which of the shards this process has."""
        return Part(self.mesh.get_local_rank("shards"), self.mesh.size(1))

    def rows(self, count: int) -> slice:
        """The rows of a weight of so many that this process has."""
        size = -(-count // self.part.count)
        start = min(size * self.part.number, count)
        return slice(start, min(start + size, count))

    def shard(self, whole: Tensor) -> Tensor:
        """The rows of a weight that this process has, [rows, ...], with memory of their own."""
        return whole[self.rows(len(whole))].clone()

    def sharded(self, local: Tensor, shape: Sequence[int]) -> DTensor:
        """The weight of the `shape` of which each process has its rows in `local`, in host
        memory."""
        size = torch.Size(shape)
        stride = torch.empty(size, device="meta").stride()
        return DTensor.from_local(
            local.cpu(),
            self.host_mesh,
            [Replicate(), Shard(0)],
            run_check=False,
            shape=size,
            stride=stride,
        )

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all members of a float32 tensor in host memory, in its place."""
        self.ranks.add([tensor], self.members)
        return tensor

    def norm(self, norms: Sequence[Tensor], *, is_shard: Sequence[bool]) -> Tensor:
        """The norm of all gradients together, 0-d float32, from those of this process: of its rows
        where `is_shard`, else of whole ones, which all processes have."""
        kinds: dict[bool, list[Tensor]] = {True: [], False: []}
        for norm, shard in zip(norms, is_shard, strict=True):
            kinds[shard].append(norm.double().square())
        sharded, whole = (
            torch.stack(squares).sum().cpu() if squares else torch.zeros((), dtype=torch.float64)
            for squares in (kinds[True], kinds[False])
        )
        squares = [torch.zeros(1) for _ in range(self.part.count)]
        if self.mesh.get_local_rank("replicas") == 0:  # the others have the same shards
            squares[self.part.number][0] = sharded
        # One for each shard, so that all processes add them in the same order.
        self.ranks.add(squares, self.members)
        total = torch.stack([square.double() for square in squares]).sum() + whole
        return total.sqrt().float()

    def communicating(self) -> AbstractContextManager[None]:
        """Around collectives that PyTorch starts itself: a RankError names who has failed."""
        return self.ranks.waiting()


class GradientSum:
    """The sum over the members of the gradients of one block, under way: each process gets that of
    the rows that it has. Computed in float32."""

    def __init__(self, group: ShardGroup, gradients: Sequence[ShardGradient]) -> None:
        """The weights of `gradients` are the same in all processes, in the same order."""
        self._group, self._gradients = group, gradients
        count, device = group.part.count, gradients[0].shard.device
        self._is_between = False
        """Whether the sum over the replicas is under way."""
        self._sizes = [
            math.prod(each.shape) // each.shape[0] * each.rows(count) for each in gradients
        ]
        self._sums = torch.empty(sum(self._sizes), device=device)
        # The last shards of a weight may be smaller, and messages have to be of one size.
        sent = torch.zeros(count, len(self._sums), device=device)
        for each, place in zip(gradients, sent.split(self._sizes, dim=1), strict=True):
            if each.whole is not None:
                for target, rows in zip(place, each.whole.split(each.rows(count)), strict=False):
                    target[: rows.numel()] = rows.reshape(-1)
        self._sent: Tensor | None = sent
        with group.communicating():
            self._work = _REDUCE_SCATTER(
                self._sums,
                sent.view(-1),
                group=group.mesh.get_group("shards"),
                async_op=True,
            )

    def send_between(self) -> None:
        """Where there are replicas, begin to sum over them, once the sums over shards are there."""
        group = self._group
        if group.mesh.size(0) == 1 or self._is_between:
            return
        self._is_between = True
        with group.communicating():
            self._wait()
            self._work = dist.all_reduce(
                self._sums, group=group.mesh.get_group("replicas"), async_op=True
            )

    def _wait(self) -> None:
        if self._work is not None:
            self._work.wait()
        self._sent = None

    @torch.no_grad()
    def add(self) -> None:
        """Wait for the sums, and add them to the gradients of the shards."""
        self.send_between()
        with self._group.communicating():
            self._wait()
        for each, piece in zip(self._gradients, self._sums.split(self._sizes), strict=True):
            shard, total = each.shard, piece[: each.shard.numel()].view_as(each.shard)
            if shard.grad is None:
                shard.grad = total.to(shard.dtype, copy=True)
            else:
                shard.grad += total
