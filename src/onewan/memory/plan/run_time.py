"""`RunTime`: the predicted time of a whole run's steps, sample videos and validations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from onewan.config.resolve import expert_schedule_of
from onewan.config.sample_defaults import sample_passes
from onewan.memory.plan.bucket import Bucket
from onewan.memory.plan.costs import RunCosts
from onewan.memory.plan.machine import Machine
from onewan.memory.plan.result import BucketPlan, RunTime
from onewan.memory.plan.settings import Settings
from onewan.memory.plan.work import step_work


def run_time(
    costs: RunCosts,
    buckets: Sequence[BucketPlan],
    clips: Mapping[Bucket, int],
    machine: Machine,
    sampling_resident_blocks: int,
) -> RunTime:
    """The time of a run by the work and the copies of its transformer passes. `clips` are the
    numbers of clips by bucket, and `sampling_resident_blocks` those that stay on the device while
    videos are sampled."""
    config, worst = costs.config, buckets[0]
    steps, count = config.train.steps, sum(clips.values())
    step = sum(clips[b.bucket] * b.time.seconds for b in buckets) / count
    if any(source.class_word for source in config.video_data.sources):
        # The base model's prediction, and a second forward and backward pass for the class word.
        step += sum(clips[b.bucket] * _preservation(costs, b, machine) for b in buckets) / count
    sample, distilled = config.sample, config.sample.distilled
    video = Bucket(frames=sample.frames, width=sample.width, height=sample.height)
    resident = replace(worst.settings, resident_blocks=sampling_resident_blocks)
    one_pass = _pass(costs, video, resident, machine)
    full = one_pass * sample_passes(sample.steps, sample.guidance)
    samples = full_samples = 0
    if sample.prompts:
        at_start, count = int(sample.at_start), len(sample.prompts)
        samples = count * (at_start + _times_due(sample.every, steps))
        if distilled is not None and distilled.full_every is not None:
            full_samples = count * (at_start + _times_due(distilled.full_every, steps))
    each = full
    if distilled is not None:
        each = one_pass * sample_passes(distilled.steps, (distilled.guidance,))
    validation = 0.0
    if config.validation.clips:
        per_expert = config.validation.clips * config.validation.timesteps
        one = _pass(costs, worst.bucket, worst.settings, machine)
        weight_sets = 1 if config.train.ema is None else 2
        validation = len(costs.trained) * per_expert * weight_sets * one
    schedule = expert_schedule_of(config)
    return RunTime(
        steps=steps,
        expert_steps={name: schedule.steps_before(steps, name) for name in schedule.experts},
        step=step,
        samples=samples,
        sample=each,
        full_samples=full_samples,
        full_sample=full,
        validations=(1 + _times_due(config.validation.every, steps)) if validation else 0,
        validation=validation,
    )


def _preservation(costs: RunCosts, plan: BucketPlan, machine: Machine) -> float:
    """Seconds that keeping the base model's predictions adds to a step of a bucket."""
    train = costs.config.train
    base = _pass(costs, plan.bucket, plan.settings, machine)
    return plan.time.seconds + train.accumulation * train.batch_size * base


def _times_due(every: int, steps: int) -> int:
    """How often something is done after a step; an interval of 0 means the last step only."""
    return steps // every + (steps % every > 0) if every else 1


def _pass(costs: RunCosts, bucket: Bucket, settings: Settings, machine: Machine) -> float:
    """Seconds of one pass of a transformer over one clip, without gradients."""
    work = step_work(
        costs.batch(bucket, 1),
        costs.copying(settings),
        costs.config.method,
        costs.transformer.block_bytes,
    )
    return max(work.forward_flops / machine.flops, work.forward_to_device / machine.bus)
