"""`divided`: what several processes give a run, each with a device of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from onewan.arithmetic.collectives import SUM_BYTES, Network
from onewan.config.resolve import expert_schedule_of
from onewan.config.schema import ResolvedRun
from onewan.memory.plan.bucket import Bucket
from onewan.memory.plan.choose import bucket_plan
from onewan.memory.plan.communication import communication, slowest, summed_numbers
from onewan.memory.plan.costs import RunCosts
from onewan.memory.plan.machine import Machine
from onewan.memory.plan.make import make_plan
from onewan.memory.plan.result import Plan, Processes, RunTime
from onewan.memory.plan.run_time import run_time
from onewan.memory.plan.stored import StoredModel
from onewan.parallel.division import Division


def of_each_process(
    machine: Machine, count: int, ranks: int | None = None, machine_size: int | None = None
) -> Machine:
    """What each of `count` processes that share a host has: a device, and its part of the memory.
    The run has `ranks` processes in all, `machine_size` on each machine; None: as many."""
    return replace(
        machine,
        ram=machine.ram // count,
        processes=count,
        ranks=count if ranks is None else ranks,
        machine_size=count if machine_size is None else machine_size,
    )


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
    costs = RunCosts.of(config, stored, sharing=plan.sharing)
    each = _of_the_largest_part(config, division.parts)
    of_part = RunCosts.of(each, stored, before=costs, sharing=plan.sharing)
    buckets = [bucket_plan(of_part, b.bucket, b.settings, plan.machine) for b in plan.buckets]
    time = run_time(of_part, buckets, clips, plan.machine, plan.sampling_resident_blocks)
    network = network or Network(within=plan.machine.bus, between=plan.machine.bus)
    summed = summed_numbers(costs) if len(division.groups[0].ranks) > 1 else 0
    # A bound: most of it travels during the backward pass, if the network is fast (`GradientSums`).
    summing = max(network.seconds_of_sum(summed, group.ranks) for group in division.groups)
    sent = slowest(
        communication(of_part, buckets, clips, plan.machine, network, group)
        for group in division.groups
    )
    step = time.step + summing + sent.waiting + sent.exchanging
    count = sum(len(group.ranks) for group in division.groups)
    at_a_time, unpaired = time.steps, 0
    if division.side_by_side:
        at_a_time = _steps_at_a_time(config, is_due)
        unpaired = 2 * at_a_time - time.steps
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
            sequence=division.sequence,
            clips=config.train.batch_size * config.train.accumulation,
            clips_of_each=each.train.batch_size * each.train.accumulation,
            step=step,
            summing=summing,
            gradient_bytes=SUM_BYTES * summed,
            waiting=sent.waiting,
            weight_bytes=sent.weights,
            exchanging=sent.exchanging,
            token_bytes=sent.tokens,
            total=at_a_time * step + _between_steps(config, time, division, count),
            alone=alone.run_time.total if alone.fits else None,
            host_bytes=count * plan.host_peak.host_bytes,
        ),
    )


def _between_steps(config: ResolvedRun, time: RunTime, division: Division, count: int) -> float:
    """Seconds of sample videos and validations, of which `count` processes do parts."""
    samples = time.samples * time.sample + time.full_samples * time.full_sample
    # Videos that are due together are made at the same time, one by each process.
    if videos := len(config.sample.prompts):
        samples *= -(-videos // count) / videos
    # Each process validates its expert, or all of them, on the largest of equal parts of the clips.
    validation = time.validations * time.validation / len(division.groups)
    if validated := config.validation.clips:
        validation *= -(-validated // division.parts) / validated
    return samples + validation


def _of_the_largest_part(config: ResolvedRun, parts: int) -> ResolvedRun:
    """`config` with the clips of each step that the process with most of them has."""
    train = config.train
    batches, size = -(-train.accumulation // parts), train.batch_size
    if parts > train.accumulation:  # they share batches too
        batches, size = 1, -(-train.accumulation * train.batch_size // parts)
    changed = train.model_copy(update={"accumulation": batches, "batch_size": size})
    return config.model_copy(update={"train": changed})


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
