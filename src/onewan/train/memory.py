"""`RunMemory`: the memory plan of a run, and the execution of the transformers' blocks by it.

The plan is made before anything is loaded for training, from the sizes of the clips, and refuses a
run that can't fit. Each group of batches, each validation clip and each sample video then runs with
the settings of its size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from onewan.config.schema import ResolvedRun
from onewan.data.clip import Clip
from onewan.data.loader import Batch
from onewan.devices import (
    device_memory,
    device_name,
    is_host,
    reserved_memory,
    total_and_free_memory,
)
from onewan.memory.block_backward import BlockComputation
from onewan.memory.block_weights import BlockTraining
from onewan.memory.execution import BlockExecution, CopiedBytes
from onewan.memory.host_memory import HostMemory
from onewan.memory.plan import (
    Bucket,
    Machine,
    Plan,
    Settings,
    check_plan,
    find_machine,
    limited,
    machine_of,
    make_plan,
    of_each_process,
    read_stored_model,
)
from onewan.memory.residency import Placement
from onewan.memory.streaming import BlockStream
from onewan.model.attention_backends import AttentionBackend
from onewan.model.block_parts import BlockParts
from onewan.model.transformer import WanTransformer
from onewan.model.vae import StripsOf
from onewan.parallel.environment import local_count
from onewan.parallel.machine_memory import MachineMemory
from onewan.parallel.ranks import Ranks
from onewan.runs.events import MemoryPlanned

if TYPE_CHECKING:  # a run of one process imports nothing of torch.distributed
    from onewan.memory.sharded_blocks import ShardedTransformer
    from onewan.parallel.shards import ShardGroup

_PINNED = {None: None, "pinned": True, "pageable": False, "mapped": False}
"""`HostMemory`'s argument for each value of `memory.host_weights`."""


class RunMemory:
    """What the memory of one run is used for."""

    def __init__(
        self,
        config: ResolvedRun,
        device: torch.device,
        plan: Plan | None,
        *,
        dropout: bool,
        notices: dict[str, None],
        shards: ShardGroup | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """`plan` is that of `plan_run`. With `dropout`, adapters draw random numbers in the forward
        pass. Messages for the user are added to `notices`. `shards` are the processes that share
        the weights of blocks, and `ranks` all of the run: those of a machine have frozen weights
        that are streamed in host memory once."""
        self._variant = config.model.facts()
        self._batch_size = config.train.batch_size
        self.plan = plan
        """None on the CPU, where all memory is the host's."""
        layers = self._variant.num_layers if plan is None else plan.layers
        self._given = given_settings(config, layers)
        planned = [b.settings for b in plan.buckets] if plan is not None else [self._given]
        alternates = len(self._variant.experts) > 1 and config.memory.offload_inactive_expert
        streams = shards is None and (
            any(settings.streamed(layers) for settings in planned)
            or (plan is not None and alternates and planned[0].checkpointing)
        )
        mapped = config.memory.host_weights == "mapped"
        self._execution = BlockExecution(
            device,
            planned[0],
            host=HostMemory(
                device,
                pinned=_PINNED[config.memory.host_weights],
                notify=lambda message: notices.update({message: None}),
                machine=None if ranks is None else _machine_memory(ranks, streams and not mapped),
            ),
            computation=BlockComputation(
                frames_apart=not config.wan_config.use_temporal_attention,
                parts=BlockParts.compiled() if config.memory.compile else BlockParts(),
                dropout=dropout,
            ),
            streams=streams,
            mapped=mapped,
            shards=shards,
        )

    @property
    def copied(self) -> CopiedBytes:
        """Bytes of weights and activations that were copied since the start of the run."""
        return self._execution.copied

    @property
    def stream(self) -> BlockStream | None:
        """As `BlockExecution.stream`."""
        return self._execution.stream

    def shard(
        self, transformer: WanTransformer3DModel, replicated: Collection[nn.Parameter]
    ) -> ShardedTransformer | None:
        """As `BlockExecution.shard`."""
        assert isinstance(transformer, WanTransformer)
        return self._execution.shard(transformer, replicated)

    def finish_passes(self) -> None:
        """As `BlockExecution.finish_passes`."""
        self._execution.finish_passes()

    def add(
        self,
        transformer: WanTransformer3DModel,
        *,
        first_trained: int = 0,
        training: Callable[[BlockStream], BlockTraining] | None = None,
    ) -> Placement:
        """As `BlockExecution.add`."""
        assert isinstance(transformer, WanTransformer)  # as `onewan.model.load` returns it
        return self._execution.add(transformer, first_trained=first_trained, training=training)

    def use_for(self, latents: Sequence[Tensor]) -> None:
        """Run the blocks with the settings for batches of these latents [B, C, F, h, w], which go
        through them together. Not between a forward and its backward pass."""
        self._execution.configure(self._settings_for(latents))

    def together(self, batches: Sequence[Batch]) -> list[list[Batch]]:
        """The batches of a step in groups that share each load of a block's weights.

        Only where blocks are streamed. Consecutive batches are joined while all of their tokens
        together are no more than those of the largest batch that the plan was made for, since what
        is kept for the backward pass grows with them.
        """
        groups: list[list[Batch]] = []
        for batch in batches:
            joined = [*groups[-1], batch] if groups else [batch]
            if groups and self._may_join([one.latents for one in joined]):
                groups[-1] = joined
            else:
                groups.append([batch])
        return groups

    def use_for_sampling(self) -> None:
        """Run the blocks with the settings for sample videos."""
        if self.plan is not None:
            resident = self.plan.sampling_resident_blocks
            self._execution.configure(replace(self._execution.settings, resident_blocks=resident))

    def feed_forward_chunks(self, bucket: Bucket) -> int:
        """In how many chunks training computes the feed-forward layers for clips of `bucket`."""
        settings = self._given if self.plan is None else self.plan.for_bucket(bucket).settings
        return settings.feed_forward_chunks

    def use_attention(self, backend: AttentionBackend) -> None:
        """As `BlockExecution.use_attention`."""
        self._execution.use_attention(backend)

    def announce(self, current: WanTransformer3DModel, following: WanTransformer3DModel) -> None:
        """As `BlockExecution.announce`."""
        self._execution.announce(current, following)

    def telling(
        self, transformer: WanTransformer3DModel, complete: Callable[[int], None] | None
    ) -> AbstractContextManager[None]:
        """As `BlockExecution.telling`."""
        return self._execution.telling(transformer, complete)

    def close(self) -> None:
        """Free the device's buffers, and end the copies."""
        self._execution.close()

    def _settings_for(self, latents: Sequence[Tensor]) -> Settings:
        if self.plan is None:
            return self._given
        if len(latents) == 1:
            return self.plan.for_bucket(self._bucket(latents[0])).settings
        cells = sum(map(_cells, latents))
        large = [b for b in self.plan.buckets if self._planned_cells(b.bucket) >= cells]
        return min(large, key=lambda found: self._planned_cells(found.bucket)).settings

    def _may_join(self, latents: Sequence[Tensor]) -> bool:
        if self.plan is None or not any(
            found.settings.streamed(self.plan.layers) for found in self.plan.buckets
        ):
            return False
        largest = max(self._planned_cells(found.bucket) for found in self.plan.buckets)
        if sum(map(_cells, latents)) > largest:
            return False
        # Their numbers of chunks, on which results depend, must not change by it.
        chunks = {self._settings_for([one]).feed_forward_chunks for one in latents}
        return chunks == {self._settings_for(latents).feed_forward_chunks}

    def _planned_cells(self, bucket: Bucket) -> int:
        return bucket.latent_cells(self._variant) * self._batch_size

    def _bucket(self, latents_BCFHW: Tensor) -> Bucket:
        _, _, frames, height, width = latents_BCFHW.shape
        side = self._variant.spatial_compression
        return Bucket(
            frames=(frames - 1) * self._variant.temporal_compression + 1,
            width=width * side,
            height=height * side,
        )


def _machine_memory(ranks: Ranks, wanted: bool) -> MachineMemory | None:
    """The memory that the processes of this machine have in common, if all of the run want it."""
    is_wanted = ranks.count > 1 and all(ranks.gathered(wanted))
    return MachineMemory(ranks) if is_wanted else None


def _cells(latents_BCFHW: Tensor) -> int:
    """Latent cells of all clips of a batch, a fourth of which are tokens."""
    return latents_BCFHW.numel() // latents_BCFHW.shape[1]


def plan_run(
    config: ResolvedRun,
    device: torch.device,
    clips: Iterable[Clip],
    chunks: Mapping[str, int] | None = None,
    ranks: Ranks | None = None,
    *,
    same: bool = False,
) -> Plan | None:
    """The plan for training on `device`; None on the CPU. It keeps the feed-forward `chunks` of a
    run that is resumed (`onewan.train.chunks`), unless these no longer fit. `ranks` are the
    processes of the run; None if this is the only one. With `same`, all of them call this, and it
    is made for the least that any of them has, so that it is the same for all.

    MemoryPlanError, which says by how much and what would help, if the run can't fit.
    """
    if is_host(device):
        return None
    buckets = Counter(map(bucket_of, clips))
    machine, stored = machine_with(config, device), read_stored_model(config)
    machine = replace(machine, ranks=1 if ranks is None else ranks.count)
    if ranks is not None and same:
        machine = _least(ranks.gathered(machine))
    plan = make_plan(config, buckets, machine, stored, chunks=chunks)
    if chunks and not plan.fits:
        plan = make_plan(config, buckets, machine, stored)
    check_plan(plan)
    return plan


def _least(machines: Sequence[Machine]) -> Machine:
    """A machine of which each of `machines` has all."""
    return replace(
        machines[0],
        vram=min(machine.vram for machine in machines),
        ram=min(machine.ram for machine in machines),
        context=max(machine.context for machine in machines),
    )


def bucket_of(clip: Clip) -> Bucket:
    """The size of `clip`."""
    return Bucket(frames=clip.frames, width=clip.size[0], height=clip.size[1])


def strips_by(plan: Plan) -> StripsOf:
    """In how many strips the VAE encodes a clip, by `plan`."""
    return lambda frames, width, height: plan.encoding_strips(
        Bucket(frames=frames, width=width, height=height)
    )


def planned(plan: Plan) -> MemoryPlanned:
    """The event that reports `plan`."""
    return MemoryPlanned(
        device_peak=plan.peak.device_bytes,
        device_memory=plan.machine.vram,
        host_peak=plan.host_peak.host_bytes,
        phase=plan.peak.phase,
        plan=plan.as_data(),
    )


def machine_with(config: ResolvedRun, device: torch.device) -> Machine:
    """The device and the host, with the limits that the run file gives. The run's processes on this
    machine share the host's memory in equal parts."""
    total, free = total_and_free_memory(device)
    if total is None or free is None:
        return of_each_process(limited(find_machine(), config), local_count())
    # Of what PyTorch holds, the run can use what no tensor has; at this moment it has none itself.
    allocated, _ = device_memory(device)
    unused = (reserved_memory(device) or 0) - (allocated or 0)
    machine = machine_of(device_name(device), total)
    machine = replace(machine, context=max(0, total - free - unused))
    return of_each_process(limited(machine, config), local_count())


def given_settings(config: ResolvedRun, layers: int) -> Settings:
    """The run file's own settings, and for those it leaves out what takes the least time where
    memory suffices."""
    memory = config.memory
    return Settings(
        weights=memory.weights,
        checkpointing=memory.gradient_checkpointing,
        resident_blocks=layers if memory.resident_blocks is None else memory.resident_blocks,
        offload_inputs=bool(memory.offload_inputs),
        keep_attention=memory.keep_attention or "no",
        feed_forward_chunks=memory.feed_forward_chunks or 1,
    )
