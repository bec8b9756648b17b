"""`overview`: what a run will do, in numbers that are known before its first step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from onewan.config.resolve import expert_schedule_of, trained_experts
from onewan.config.schema import ResolvedRun
from onewan.data.clip import Clip, count_clips
from onewan.data.expert_clips import batches_per_epoch, clips_by_expert
from onewan.memory.plan import Plan, disk_space, read_stored_model
from onewan.runs.events import Overview
from onewan.runs.layout import RunLayout
from onewan.train.memory import bucket_of
from onewan.train.run import Run


def overview(run: Run, layout: RunLayout) -> Overview:
    """The event that says how long `run`, in the folder of `layout`, trains, what and with what."""
    config, clips, plan = run.config, run.dataset.clips, run.memory.plan
    parameters = {trainable.name: trainable.count for trainable in run.state.trainables}
    return expected_overview(config, layout, clips, parameters, plan)


def expected_overview(
    config: ResolvedRun,
    layout: RunLayout,
    clips: Sequence[Clip],
    parameters: Mapping[str, int],
    plan: Plan | None,
) -> Overview:
    """The same of a run with these training `clips`, before it is set up. `parameters` are the
    numbers of trainable ones by expert or "embeddings"; `plan` is None on a CPU."""
    schedule, train = expert_schedule_of(config), config.train
    own_clips = clips_by_expert(trained_experts(config), clips)
    per_epoch = batches_per_epoch(own_clips, train.batch_size)
    steps = {name: schedule.steps_before(train.steps, name) for name in own_clips}
    buckets = Counter(map(bucket_of, clips))
    return Overview(
        steps=steps,
        clips=count_clips(clips),
        expert_clips={name: count_clips(own) for name, own in own_clips.items()},
        seen={name: steps[name] * train.accumulation / per_epoch[name] for name in own_clips},
        parameters=parameters,
        disk=plan.disk if plan else disk_space(config, read_stored_model(config), buckets),
        step_seconds=None if plan is None else plan.run_time.step,
        run_seconds=None if plan is None else plan.run_time.total,
        weights=layout.weights_dir,
        samples=layout.samples_dir if config.sample.prompts else None,
    )
