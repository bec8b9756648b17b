"""A trial before the first step: forward and backward passes over the largest clips of the run.

A run whose largest bucket comes up after hours must not run out of memory then. The trial trains
nothing: its gradients are dropped, and it draws no random numbers that a step would draw.
"""

from __future__ import annotations

from collections.abc import Sequence

from onewan.data.clip import Clip
from onewan.data.expert_clips import clips_of
from onewan.data.loader import StepBatches
from onewan.devices import device_memory, reset_peak
from onewan.memory.plan import Bucket
from onewan.runs.events import MemoryMeasured
from onewan.train.run import Run
from onewan.train.step import backward


def try_largest_batch(run: Run) -> MemoryMeasured | None:
    """Run the largest batch once, as the expert of the next step, or as the other one if it alone
    trains these clips; returns the peak beside the plan's.

    None without a plan (on the CPU), and where the backward pass updates weights (a fused step).
    The optimizer's state does not exist yet in a new run, so the peak is below that of a step.
    """
    plan = run.memory.plan
    if plan is None:
        return None
    next_one, _ = run.schedule.expert_at(run.state.step)
    clips = _clips_of(run.dataset.clips, plan.worst.bucket)
    for name in sorted(run.group.experts, key=lambda name: name != next_one):
        trained = run.state.experts[name]
        own = clips_of(trained.expert, clips)[: run.config.train.batch_size]
        if own:
            break
    else:  # the largest bucket has validation clips only
        return None
    if trained.method is not None and trained.method.fused:
        return None
    batch = run.loader.first_captions(own)
    step = StepBatches(number=0, expert=name, batches=(batch,), global_size=len(batch))
    run.bring_expert(name)
    reset_peak(run.device)
    backward(run, step, trained)
    run.memory.finish_passes()
    vectors = (embedding.vectors for embedding in run.model.all_embeddings())
    own_weights = [p for t in run.state.trainables_of(name) for p in t.weights.parameters.values()]
    for parameter in (*trained.transformer.parameters(), *vectors, *own_weights):
        parameter.grad = None
    _, peak = device_memory(run.device)
    reset_peak(run.device)
    return MemoryMeasured(
        bucket=str(plan.worst.bucket),
        planned=plan.worst.training.device_bytes,
        measured=peak,
    )


def _clips_of(clips: Sequence[Clip], bucket: Bucket) -> list[Clip]:
    size = (bucket.width, bucket.height)
    return [clip for clip in clips if clip.frames == bucket.frames and clip.size == size]
