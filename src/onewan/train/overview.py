"""`overview`: what a run will do, in numbers that are known before its first step."""

from __future__ import annotations

from collections import Counter

from onewan.data.clip import count_clips
from onewan.data.expert_clips import clips_of
from onewan.memory.plan import Bucket, disk_space, read_stored_model
from onewan.runs.events import Overview
from onewan.runs.layout import RunLayout
from onewan.train.run import Run


def overview(run: Run, layout: RunLayout) -> Overview:
    """The event that says how long `run`, in the folder of `layout`, trains, what and with what."""
    config, plan = run.config, run.memory.plan
    steps = {name: run.steps_before(name, config.train.steps) for name in run.state.experts}
    per_epoch = run.loader.batches_per_epoch
    clips = Counter(
        Bucket(frames=clip.frames, width=clip.size[0], height=clip.size[1])
        for clip in run.dataset.clips
    )
    disk = plan.disk if plan else disk_space(config, read_stored_model(config), clips)
    return Overview(
        steps=steps,
        clips=count_clips(run.dataset.clips),
        expert_clips={
            name: count_clips(clips_of(state.expert, run.dataset.clips))
            for name, state in run.state.experts.items()
        },
        seen={
            name: steps[name] * config.train.accumulation / per_epoch[name]
            for name in run.state.experts
        },
        parameters={
            trainable.name: sum(tensor.numel() for tensor in trainable.weights.present().values())
            for trainable in run.state.trainables
        },
        disk=disk,
        step_seconds=None if plan is None else plan.run_time.step,
        run_seconds=None if plan is None else plan.run_time.total,
        weights=layout.weights_dir,
        samples=layout.samples_dir if run.samples else None,
    )
