"""Chooses the settings of each bucket: those that fit and take the least time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from onewan.config.schema import MemorySection
from onewan.memory.plan.bucket import Bucket
from onewan.memory.plan.costs import RunCosts
from onewan.memory.plan.machine import Machine
from onewan.memory.plan.result import BucketPlan, StepTime
from onewan.memory.plan.settings import KeepAttention, Settings
from onewan.memory.plan.work import StepWork, step_work

_CHUNKS = (1, 2, 4)
_SAME_TIME = 1.002
"""Times within this factor are taken as equal, so that the simpler settings are chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One choice of settings for a bucket, and what follows from it."""

    plan: BucketPlan
    device_over: int
    """Bytes by which it is above the device's budget; 0 if it fits."""
    host_over: int

    @property
    def fits(self) -> bool:
        return not (self.device_over or self.host_over)


def choose(
    costs: RunCosts,
    bucket: Bucket,
    machine: Machine,
    *,
    park_idle: bool,
    chunks: int | None = None,
) -> Candidate:
    """The settings for `bucket` that fit `machine` at the least time; if none fits, those that are
    the least above its memory. Settings that the run file gives are kept; where it leaves the
    number of feed-forward chunks open, `chunks` is taken if given."""
    candidates = [
        _candidate(costs, bucket, machine, settings)
        for settings in _possible(costs, bucket, machine, park_idle=park_idle, chunks=chunks)
    ]
    fitting = [candidate for candidate in candidates if candidate.fits]
    if not fitting:
        return min(candidates, key=lambda c: (_excess(c, machine), _complexity(c)))
    fastest = min(candidate.plan.time.seconds for candidate in fitting)
    as_fast = [c for c in fitting if c.plan.time.seconds <= _SAME_TIME * fastest]
    return min(as_fast, key=lambda c: (_complexity(c), c.plan.time.seconds))


def bucket_plan(
    costs: RunCosts, bucket: Bucket, settings: Settings, machine: Machine
) -> BucketPlan:
    """What training with clips of `bucket` and `settings` needs."""
    return BucketPlan(
        bucket=bucket,
        tokens=bucket.tokens(costs.config.model.facts()),
        settings=settings,
        training=costs.training(bucket, settings),
        time=_time(costs, bucket, settings, machine),
    )


def most_resident(
    layers: int, block_bytes: int, budget: int, without: int, given: int | None
) -> int:
    """How many blocks stay on the device where `without` bytes are needed with none of them and the
    ring; `given` is the run file's number."""
    if given is not None:
        return min(given, layers)
    free = budget - without
    # With every block resident there is no ring, whose two buffers hold two of them.
    all_fit = free + 2 * block_bytes >= layers * block_bytes
    return layers if all_fit else max(0, min(layers, free // block_bytes))


def _possible(
    costs: RunCosts, bucket: Bucket, machine: Machine, *, park_idle: bool, chunks: int | None
) -> Iterator[Settings]:
    """The settings that the run file leaves open, each with as many resident blocks as fit."""
    memory = costs.config.memory
    if not memory.gradient_checkpointing:
        base = Settings(
            weights=memory.weights,
            checkpointing=False,
            resident_blocks=costs.layers,
            park_idle=park_idle,
        )
        yield _with_resident(costs, bucket, machine, base)
        return
    for keep, offload, count in _combinations(memory, chunks):
        base = Settings(
            weights=memory.weights,
            resident_blocks=0,
            offload_inputs=offload,
            keep_attention=keep,
            feed_forward_chunks=count,
            park_idle=park_idle,
        )
        yield _with_resident(costs, bucket, machine, base)


def _combinations(
    memory: MemorySection, chunks: int | None
) -> Iterator[tuple[KeepAttention, bool, int]]:
    given = memory.keep_attention
    keeps: tuple[KeepAttention, ...] = ("no", "device", "host") if given is None else (given,)
    offloads = (False, True) if memory.offload_inputs is None else (memory.offload_inputs,)
    fixed = memory.feed_forward_chunks or chunks
    chunk_counts = _CHUNKS if fixed is None else (fixed,)
    for keep in keeps:
        for offload in offloads:
            for count in chunk_counts:
                yield keep, offload, count


def _with_resident(
    costs: RunCosts, bucket: Bucket, machine: Machine, settings: Settings
) -> Settings:
    """`settings` with as many resident blocks as fit, or the run file's number of them; with none
    where weights are sharded, since no block is whole between its two passes."""
    none = replace(settings, resident_blocks=0)
    if costs.sharing.is_sharded:
        return none
    resident = most_resident(
        costs.layers,
        costs.transformer.block_bytes + costs.streamed_state,
        machine.device_budget,
        costs.training(bucket, none).device_bytes,
        costs.config.memory.resident_blocks,
    )
    return replace(settings, resident_blocks=resident)


def _candidate(costs: RunCosts, bucket: Bucket, machine: Machine, settings: Settings) -> Candidate:
    plan = bucket_plan(costs, bucket, settings, machine)
    return Candidate(
        plan=plan,
        device_over=max(0, plan.training.device_bytes - machine.device_budget),
        host_over=max(0, plan.training.host_bytes - machine.host_budget),
    )


def _excess(candidate: Candidate, machine: Machine) -> tuple[int, float]:
    """In how many of the two memories a candidate is too large, so that a host which is short is
    not made up for with a device that is short too; and by what share of them."""
    device = candidate.device_over / max(1, machine.device_budget)
    host = candidate.host_over / max(1, machine.host_budget)
    return bool(device) + bool(host), device + host


def _complexity(candidate: Candidate) -> tuple[int, int, int]:
    """Of settings that are equally fast, the simplest are taken: those that move least."""
    settings = candidate.plan.settings
    moved = settings.offload_inputs + (settings.keep_attention == "host")
    return moved, settings.feed_forward_chunks, int(settings.keep_attention != "no")


def _time(costs: RunCosts, bucket: Bucket, settings: Settings, machine: Machine) -> StepTime:
    """Of one optimizer step: all its micro-batches."""
    step = training_work(costs, bucket, settings)
    computed = (step.forward_flops + step.backward_flops) / machine.flops
    weights = costs.streamed(settings)
    count = costs.config.train.accumulation
    return StepTime(
        seconds=count * sum(step.seconds(machine)) + _switching(costs, settings, machine),
        resident_seconds=count * computed,
        flops=count * (step.forward_flops + step.backward_flops),
        model_flops=count * step.model_flops,
        bytes_to_device=count * step.to_device,
        bytes_to_host=count * (step.to_host + step.written_back),
        weights_to_device=count * 2 * step.forward_to_device if weights else 0.0,
    )


def training_work(costs: RunCosts, bucket: Bucket, settings: Settings) -> StepWork:
    """Of one process, in a forward and a backward pass over a batch of `bucket`."""
    config, variant = costs.config, costs.config.model.facts()
    sequence, attended = costs.sharing.sequence, None
    if not config.wan_config.use_temporal_attention:
        attended = bucket.tokens_of_a_frame(variant)
    elif sequence > 1:  # a process has a part of the tokens, which attend to all of them
        attended = bucket.tokens(variant)
    return step_work(
        costs.batch(bucket, sequence=sequence),
        costs.copying(settings),
        config.method,
        costs.transformer.block_bytes,
        attended=attended,
        streamed_state=costs.streamed_state,
    )


def _switching(costs: RunCosts, settings: Settings, machine: Machine) -> float:
    """Seconds per step for what is moved at a switch of experts: the adapters and the state of one
    leave the device, and those of the other come. (Weights of blocks come ahead of their use.)"""
    if not settings.park_idle or len(costs.trained) < 2:
        return 0.0
    return costs.parked_bytes / machine.bus / costs.config.train.switch_expert_every
