"""`divided`: what several processes give a run, each with a device of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from onewan.arithmetic.collectives import SUM_BYTES, Network
from onewan.config.resolve import expert_schedule_of
from onewan.config.schema import ResolvedRun
from onewan.memory.plan.bucket import Bucket
from onewan.memory.plan.choose import bucket_plan
from onewan.memory.plan.costs import RunCosts
from onewan.memory.plan.machine import Machine
from onewan.memory.plan.make import make_plan
from onewan.memory.plan.result import Plan, Processes
from onewan.memory.plan.run_time import run_time
from onewan.memory.plan.stored import StoredModel
from onewan.parallel.division import Division


def of_each_process(machine: Machine, count: int) -> Machine:
    """What each of `count` processes on one machine has: a device, and its share of the host."""
    return replace(machine, ram=machine.ram // count, processes=count)


def divided(
    plan: Plan,
    config: ResolvedRun,
    clips: Mapping[Bucket, int],
    stored: StoredModel,
    machine: Machine,
    division: Division,
    is_due: Callable[[int], bool],
    network: Network | None = None,
) -> Plan:
    """`plan`, which was made for one process by `of_each_process`, with what all processes of
    `division` give on one `machine`. `clips` and `stored` are those of `plan`. `is_due` says
    whether something is done after so many steps, for which processes wait for each other.
    Gradients are summed over `network`, or else at the rate of the bus."""
    costs = RunCosts.of(config, stored)
    each = _of_the_largest_part(config, division.parts)
    of_part = RunCosts.of(each, stored, before=costs)
    buckets = tuple(
        bucket_plan(of_part, bucket.bucket, bucket.settings, plan.machine)
        for bucket in plan.buckets
    )
    resident = plan.sampling_resident_blocks
    time = run_time(of_part, buckets, clips, plan.machine, resident)
    network = network or Network(within=plan.machine.bus, between=plan.machine.bus)
    summed = _summed_numbers(costs) if division.parts > 1 else 0
    # A bound: most of it travels during the backward pass, if the network is fast (`GradientSums`).
    summing = max(network.seconds_of_sum(summed, group.ranks) for group in division.groups)
    step, count = time.step + summing, sum(len(group.ranks) for group in division.groups)
    at_a_time, unpaired = time.steps, 0
    if division.side_by_side:
        at_a_time = _steps_at_a_time(config, is_due)
        unpaired = 2 * at_a_time - time.steps
    samples = time.samples * time.sample + time.full_samples * time.full_sample
    # Videos that are due together are made at the same time, one by each process.
    if videos := len(config.sample.prompts):
        samples *= -(-videos // count) / videos
    # Each process validates its expert, or all of them, on the largest of equal parts of the clips.
    validation = time.validations * time.validation / len(division.groups)
    if validated := config.validation.clips:
        validation *= -(-validated // division.parts) / validated
    alone = make_plan(config, clips, machine, stored, advice=False)
    return replace(
        plan,
        processes=Processes(
            count=count,
            division=str(division),
            side_by_side=division.side_by_side,
            steps=time.steps,
            unpaired_steps=unpaired,
            parts=division.parts,
            clips=config.train.batch_size * config.train.accumulation,
            clips_of_each=each.train.batch_size * each.train.accumulation,
            step=step,
            summing=summing,
            gradient_bytes=SUM_BYTES * summed,
            total=at_a_time * step + samples + validation,
            alone=alone.run_time.total,
            host_bytes=count * plan.host_peak.host_bytes,
        ),
    )


def _of_the_largest_part(config: ResolvedRun, parts: int) -> ResolvedRun:
    """`config` with the clips of each step that the process with most of them has."""
    train = config.train
    batches, size = -(-train.accumulation // parts), train.batch_size
    if parts > train.accumulation:  # they share batches too
        batches, size = 1, -(-train.accumulation * train.batch_size // parts)
    changed = train.model_copy(update={"accumulation": batches, "batch_size": size})
    return config.model_copy(update={"train": changed})


def _summed_numbers(costs: RunCosts) -> int:
    """How many numbers the gradients of a step have."""
    experts = [trained.count for trained in costs.trained.values() if trained is not None]
    embeddings = 0 if costs.embeddings is None else costs.embeddings.count
    return max(experts, default=0) + embeddings


def _steps_at_a_time(config: ResolvedRun, is_due: Callable[[int], bool]) -> int:
    """How many steps are trained one after another where the experts are trained at the same time:
    of the steps between two meetings, those of the expert that has more of them."""
    schedule, steps = expert_schedule_of(config), config.train.steps
    first, done, count = schedule.experts[0], 0, 0
    while done < steps:
        span = schedule.span(done, steps, is_due)
        own = schedule.steps_before(span.stop, first) - schedule.steps_before(span.start, first)
        count += max(own, len(span) - own)
        done = span.stop
    return count
