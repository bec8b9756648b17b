"""`BlockExecution`: how the blocks of a run's transformers are executed on one device.

It owns what the transformers share: the stream that brings weights, the store of kept tensors, and
the settings of the memory plan, which may change from one step to the next with the size of the
clips (`configure`). Each transformer gets a `CheckpointedBlocks` as its runner, and a placement for
`onewan.memory.residency`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from onewan.memory.activations import KeptActivations
from onewan.memory.block_backward import BlockComputation
from onewan.memory.block_runner import CheckpointedBlocks, ResidentWeights
from onewan.memory.block_weights import BlockTraining, BlockWeights
from onewan.memory.host_memory import HostMemory
from onewan.memory.plan import Settings
from onewan.memory.residency import Placement, WholeModule
from onewan.memory.streamed_transformer import StreamedTransformer
from onewan.memory.streaming import BlockStream
from onewan.model.attention_backends import AttentionBackend
from onewan.model.transformer import WanTransformer

if TYPE_CHECKING:  # a run of one process imports nothing of torch.distributed
    from onewan.memory.sharded_blocks import Passes, ShardedTransformer
    from onewan.parallel.shards import ShardGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiedBytes:
    """Bytes over the bus since the start of the run."""

    to_device: int = 0
    to_host: int = 0


class BlockExecution:
    """Runs the blocks of all experts on one device."""

    def __init__(
        self,
        device: torch.device,
        settings: Settings,
        *,
        host: HostMemory | None = None,
        computation: BlockComputation | None = None,
        streams: bool = False,
        mapped: bool = False,
        shards: ShardGroup | None = None,
    ) -> None:
        """`settings` apply until `configure`. `computation` has what does not depend on the size of
        the clips. With `streams`, frozen weights of blocks have their masters in memory of `host`
        and come to the device when they are needed; otherwise a transformer is moved as a whole,
        and all settings have all of its blocks resident. With `mapped` there are no masters:
        weights are gathered from where they are, such as a mapped file, each time. With `shards`,
        each process of that group has a part of each block's weights on the device."""
        self._device = device
        self._settings = settings
        self._host = host or HostMemory(device)
        self._computation = computation or BlockComputation()
        # Activations are always pinned where that works, since the backward pass waits for them.
        self._activations = HostMemory(device)
        self._store = KeptActivations(device, self._allocate)
        self._stream = BlockStream(device, host=self._host) if streams else None
        self._mapped = mapped
        self._runners: dict[nn.Module, CheckpointedBlocks] = {}
        self._placements: dict[nn.Module, StreamedTransformer] = {}
        self._shards = shards
        self._passes = None if shards is None else _passes(shards)
        self._sharded: dict[nn.Module, ShardedTransformer] = {}

    @property
    def settings(self) -> Settings:
        """The settings of the present passes."""
        return self._settings

    @property
    def stream(self) -> BlockStream | None:
        """What brings the weights of blocks; None if they are all on the device."""
        return self._stream

    @property
    def copied(self) -> CopiedBytes:
        """Bytes of weights and activations that have been copied."""
        to_device, to_host = self._store.bytes_to_device, self._store.bytes_to_host
        if self._stream is not None:
            to_device += self._stream.bytes_to_device
            to_host += self._stream.bytes_to_host
        return CopiedBytes(to_device=to_device, to_host=to_host)

    def shard(
        self, transformer: WanTransformer, replicated: Collection[nn.Parameter]
    ) -> ShardedTransformer | None:
        """Shard the weights of the blocks of `transformer`, but not `replicated` ones; None if this
        process has all weights. To be called before `add`, which does it otherwise."""
        if self._shards is None or self._passes is None:
            return None
        from onewan.memory.sharded_blocks import ShardedTransformer

        if transformer not in self._sharded:
            self._sharded[transformer] = ShardedTransformer(
                transformer, self._device, self._shards, self._passes, replicated
            )
        return self._sharded[transformer]

    def finish_passes(self) -> None:
        """Return when no process that shares shards has a pass left, and all sums of gradients are
        there. To be called by all of them, behind what each computes by itself."""
        if self._passes is not None:
            self._passes.finish()

    def add(
        self,
        transformer: WanTransformer,
        *,
        first_trained: int = 0,
        training: Callable[[BlockStream], BlockTraining] | None = None,
    ) -> Placement:
        """Run the blocks of `transformer` from now on; returns how it gets onto the device.

        Everything that replaces its weights, such as adapters, has been attached before.
        `first_trained` is the first block that the backward pass reaches. `training` makes what
        updates the blocks' own weights behind their backward pass, if they are trained and
        streamed; without it, trained weights stay on the device.
        """
        sharded = self.shard(transformer, ())
        runner = CheckpointedBlocks(
            blocks=list(transformer.blocks),  # pyright: ignore[reportArgumentType]
            store=self._store,
            weights=sharded or self._stream or ResidentWeights(),
        )
        self._runners[transformer] = runner
        transformer.block_runner = runner
        self._apply(runner)
        if sharded is not None:
            return sharded
        if self._stream is None:
            return WholeModule(transformer, self._device)
        blocks = list(transformer.blocks)
        weights = BlockWeights.take(
            blocks, self._host, mapped=self._mapped, trained=training is not None
        )
        if training is not None:
            weights.training = training(self._stream)
        placement = StreamedTransformer(
            transformer,
            weights,
            self._stream,
            resident=self._settings.resident_blocks,
            first_trained=first_trained,
        )
        self._placements[transformer] = placement
        return placement

    def configure(self, settings: Settings) -> None:
        """Use `settings` from the next pass on. Not between a forward and its backward pass."""
        if settings == self._settings:
            return
        self._settings = settings
        for runner in self._runners.values():
            self._apply(runner)
        for placement in self._placements.values():
            placement.resident = settings.resident_blocks

    def use_attention(self, backend: AttentionBackend) -> None:
        """Compute attention with `backend` from the next pass on."""
        self._computation = replace(self._computation, backend=backend)
        for runner in self._runners.values():
            self._apply(runner)

    def announce(self, current: nn.Module, following: nn.Module) -> None:
        """The next step trains `following`: behind the last backward pass of `current`, its weights
        are copied into the buffers that are no longer needed."""
        if current is not following and current in self._placements:
            self._placements[current].announce(self._placements[following])

    @contextmanager
    def telling(
        self, transformer: nn.Module, complete: Callable[[int], None] | None
    ) -> Iterator[None]:
        """In a pass of this block, `complete` is called with the index of each block of
        `transformer` when the backward pass has added what it adds to the block's gradients."""
        runner = self._runners[transformer]
        runner.complete = complete
        try:
            yield
        finally:
            runner.complete = None

    def close(self) -> None:
        """Free the device's buffers and end the copies."""
        if self._stream is not None:
            self._stream.close()

    def _apply(self, runner: CheckpointedBlocks) -> None:
        settings = self._settings
        runner.computation = replace(
            self._computation,
            keep_attention=settings.keep_attention != "no",
            chunks=settings.feed_forward_chunks,
        )
        runner.checkpointing = settings.checkpointing
        runner.offload_inputs = settings.offload_inputs
        runner.offload_attention = settings.keep_attention == "host"

    def _allocate(self, size: int) -> torch.Tensor:
        return self._activations.allocate(size).tensor


def _passes(shards: ShardGroup) -> Passes:
    from onewan.memory.sharded_blocks import Passes

    return Passes(shards)
