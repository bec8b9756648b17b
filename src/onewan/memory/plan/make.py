"""`make_plan`, from a run file to a `Plan`; `check_plan`, which refuses what can't fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from onewan.arithmetic.byte_sizes import format_bytes, parse_bytes
from onewan.config.schema import ResolvedRun
from onewan.errors import ConfigError, MemoryPlanError
from onewan.memory.plan.advice import advise
from onewan.memory.plan.bucket import Bucket
from onewan.memory.plan.choose import Candidate, choose, most_resident
from onewan.memory.plan.costs import RunCosts
from onewan.memory.plan.machine import MACHINE_SIZE, Machine
from onewan.memory.plan.result import BucketPlan, PhaseBytes, Plan, encoding_strips
from onewan.memory.plan.run_time import run_time
from onewan.memory.plan.settings import Settings
from onewan.memory.plan.sharing import sharing_on
from onewan.memory.plan.stored import StoredModel, assumed_model, with_changes

_MORE_PROCESSES = (2, 4, 8, 16, 32, 64, 128, 256)
"""Numbers of processes that are tried where a run does not fit."""


def make_plan(
    config: ResolvedRun,
    buckets: Sequence[Bucket] | Mapping[Bucket, int],
    machine: Machine,
    stored: StoredModel | None = None,
    *,
    advice: bool = True,
    notes: Sequence[str] = (),
    chunks: Mapping[str, int] | None = None,
) -> Plan:
    """The plan of the run `config` on `machine`.

    `buckets` are those of its clips (ValueError if there are none), as a mapping with the number of
    clips of each where that is known, which only the disk space depends on. `stored` are the sizes
    and the storage of the model; None: the variant's sizes, with weights in `model.dtype`. Settings
    that the run file gives are kept, the others are chosen. Without `advice` the plan has no
    suggestions, which take most of the time. `notes` about the buckets are added to the plan's.
    `chunks` are the numbers of feed-forward chunks that a resumed run began with, by size (frames,
    height and width, "81x480x832"); they are kept where the run file has none.
    """
    if not buckets:
        raise ValueError("a plan needs at least one bucket")
    clips = buckets if isinstance(buckets, Mapping) else dict.fromkeys(buckets, 1)
    stored = stored or assumed_model(config)
    costs = RunCosts.of(config, stored, sharing=sharing_on(machine, config))
    kept = chunks or {}
    plan = _plan(costs, clips, machine, kept)
    plan = replace(plan, notes=(*notes, *plan.notes))
    if not advice:
        return plan

    def again(changed: ResolvedRun, clips: Mapping[Bucket, int]) -> Plan:
        try:
            sharing = sharing_on(machine, changed)
        except ConfigError:  # so many processes can't do that, so it is no change
            return plan
        new = RunCosts.of(changed, with_changes(stored, changed), before=costs, sharing=sharing)
        return _plan(new, clips, machine, kept)

    plan = replace(plan, suggestions=advise(config, clips, plan, again))
    if plan.fits:
        return plan
    return replace(plan, enough=_enough_processes(config, clips, machine, stored))


def _enough_processes(
    config: ResolvedRun, clips: Mapping[Bucket, int], machine: Machine, stored: StoredModel
) -> int | None:
    """The smallest number of processes with which the run fits because weights are sharded, where
    each has such a device and as much host memory; None if it does not fit with any, or if they
    would not be sharded. A step has a clip for each process."""
    size, costs = MACHINE_SIZE if machine.ranks == 1 else machine.machine_size, None
    for count in (count for count in _MORE_PROCESSES if count > machine.ranks):
        many = replace(machine, ranks=count, machine_size=size)
        section = config.train.model_copy(update={"accumulation": count})
        changed = config.model_copy(update={"train": section})
        try:
            sharing = sharing_on(many, changed)
        except ConfigError:
            return None
        if not sharing.is_sharded:
            continue
        costs = RunCosts.of(changed, stored, before=costs, sharing=sharing)
        if _plan(costs, clips, many, {}).fits:
            return count
    return None


def disk_space(
    config: ResolvedRun, stored: StoredModel | None, clips: Mapping[Bucket, int]
) -> dict[str, int]:
    """Bytes of the files that the run `config` writes, as in its plan, on any machine."""
    return RunCosts.of(config, stored or assumed_model(config)).disk(clips)


def trained_counts(config: ResolvedRun, stored: StoredModel) -> dict[str, int]:
    """Numbers of weights that the run `config` trains, by expert, and of "embeddings"."""
    return RunCosts.of(config, stored).trained_counts


def check_plan(plan: Plan) -> None:
    """MemoryPlanError, which says by how much and what would help, if the run can't fit."""
    problems = plan.problems()
    if not problems:
        return
    details = [*problems, *_largest_parts(plan)]
    if plan.suggestions:
        details.append("what helps, the cheapest first:")
        details += [f"  {s.text} ({' '.join(s.change)})" for s in plan.suggestions]
    if plan.enough is not None:
        details.append(f"{plan.enough_text} (`onewan plan --gpus {plan.enough}`)")
    elif not plan.suggestions:
        details.append("no setting of the run file makes it fit; train at a smaller size")
    raise MemoryPlanError(
        f"memory: this run does not fit on {plan.machine.name} with "
        f"{format_bytes(plan.machine.vram)} and {format_bytes(plan.machine.ram)} of host memory; "
        "change the run file (`onewan plan` shows the whole plan)",
        details,
    )


def limited(machine: Machine, config: ResolvedRun) -> Machine:
    """`machine` with at most the memory that `memory.vram` and `memory.ram` allow."""
    vram, ram = config.memory.vram, config.memory.ram
    return replace(
        machine,
        vram=machine.vram if vram is None else min(machine.vram, parse_bytes(vram)),
        ram=machine.ram if ram is None else min(machine.ram, parse_bytes(ram)),
    )


def _largest_parts(plan: Plan) -> list[str]:
    parts = sorted(plan.peak.device.items(), key=lambda item: -item[1])[:4]
    listed = ", ".join(f"{name} {format_bytes(amount)}" for name, amount in parts)
    return [f"the largest parts of {plan.peak.phase} on the device: {listed}"]


def _plan(
    costs: RunCosts, clips: Mapping[Bucket, int], machine: Machine, chunks: Mapping[str, int]
) -> Plan:
    """The plan without suggestions. Parking the idle expert costs time at each switch, so it is
    chosen only where the run does not fit otherwise, or where the memory makes up for that."""
    kept = _with_parking(costs, clips, machine, chunks, park_idle=False)
    if costs.sharing.is_sharded:
        return kept
    if kept.fits and all(_has_all_it_wants(bucket) for bucket in kept.buckets):
        return kept
    parked = _with_parking(costs, clips, machine, chunks, park_idle=True)
    if kept.fits != parked.fits:
        return kept if kept.fits else parked
    if not kept.fits:
        return parked
    return parked if _seconds(parked, clips) < _seconds(kept, clips) else kept


def _has_all_it_wants(plan: BucketPlan) -> bool:
    """Whether more memory would not make a step faster."""
    recomputes = plan.settings.checkpointing and plan.settings.keep_attention == "no"
    return not recomputes and plan.time.slowdown < 1.005


def _seconds(plan: Plan, clips: Mapping[Bucket, int]) -> float:
    """Of a pass over all clips."""
    return sum(clips[bucket.bucket] * bucket.time.seconds for bucket in plan.buckets)


def _with_parking(
    costs: RunCosts,
    clips: Mapping[Bucket, int],
    machine: Machine,
    chunks: Mapping[str, int],
    *,
    park_idle: bool,
) -> Plan:
    chosen = [
        choose(costs, bucket, machine, park_idle=park_idle, chunks=chunks.get(str(bucket)))
        for bucket in clips
    ]
    # Those that do not fit come first, then those with most tokens: the others may have as high a
    # peak, with more resident blocks.
    chosen.sort(key=lambda c: (-c.device_over, -c.plan.tokens))
    largest = max(clips, key=lambda bucket: bucket.pixels * bucket.frames)
    phases, notes = list[PhaseBytes](), [*machine.notes, *costs.stored.notes]
    if costs.sharing.is_sharded:
        phases.append(costs.loading())
        notes += _without_effect(costs.config)
    if _encodes(costs.config):
        strips = encoding_strips(costs.stored.vae, machine, largest)
        phases += costs.encoding(largest, strips)
        if strips > 1:
            notes.append(
                f"clips of {largest} are encoded in {strips} strips, as they do not fit as a "
                "whole; their latents are the same but for rounding"
            )
    if costs.config.validation.clips:
        phases.append(_validation(costs, chosen))
    sampling, resident = _sampling(costs, machine, chosen[0].plan.settings)
    buckets = tuple(candidate.plan for candidate in chosen)
    return Plan(
        machine=machine,
        buckets=buckets,
        other_phases=(*phases, *sampling),
        layers=costs.layers,
        sampling_resident_blocks=resident,
        disk=costs.disk(clips),
        run_time=run_time(costs, buckets, clips, machine, resident),
        suggestions=(),
        notes=tuple(notes),
        vae=costs.stored.vae,
        sharing=costs.sharing,
    )


def _without_effect(config: ResolvedRun) -> Iterator[str]:
    """A note for each setting that the run file gives and sharded weights have no use for."""
    for name in ("resident_blocks", "host_weights"):
        if getattr(config.memory, name) is not None:
            yield (
                f"memory.{name} has no effect where weights are sharded: a block is whole on the "
                "device only while it computes, and nothing of it is in host memory"
            )


def _encodes(config: ResolvedRun) -> bool:
    return bool(config.video_data.sources) or config.video_data.cache


def _validation(costs: RunCosts, chosen: Sequence[Candidate]) -> PhaseBytes:
    """Validation of the bucket with the highest peak, with the settings that it trains with."""
    phases = [costs.validation(c.plan.bucket, c.plan.settings) for c in chosen]
    return max(phases, key=lambda phase: phase.device_bytes)


def _sampling(
    costs: RunCosts, machine: Machine, training: Settings
) -> tuple[tuple[PhaseBytes, ...], int]:
    """The phases of sampling, and the blocks that stay on the device during it."""
    sample = costs.config.sample
    if not sample.prompts:
        return (), 0
    bucket = Bucket(frames=sample.frames, width=sample.width, height=sample.height)
    none = replace(training, resident_blocks=0)
    denoising, _ = costs.sampling(bucket, none)
    resident = 0
    if not costs.sharing.is_sharded:
        resident = most_resident(
            costs.layers,
            costs.transformer.block_bytes,
            machine.device_budget,
            denoising.device_bytes,
            costs.config.memory.resident_blocks,
        )
    return costs.sampling(bucket, replace(training, resident_blocks=resident)), resident
