"""Suggestions: the changes of a run file that make it fit, in order of what they cost in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.config.method import FineTuneMethod, RankedMethod
from onewan.config.optimizer import AdamW8bitOptimizer, AdamWOptimizer
from onewan.config.schema import ResolvedRun
from onewan.config.section import Section
from onewan.memory.plan.bucket import Bucket
from onewan.memory.plan.result import Plan, Suggestion

Clips: TypeAlias = Mapping[Bucket, int]
PlanAgain: TypeAlias = Callable[[ResolvedRun, Clips], Plan]

_FEWER_FRAMES = (65, 49, 33, 25, 17, 13, 9, 5, 1)
_SMALLER_AREAS = (0.75, 0.5, 0.35, 0.25, 0.15)
"""Shares of the area of a frame."""
_LEAST_GAIN = 0.97
"""A suggestion for speed is made where a step takes at most this share of the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    """A change of the run file, and of the buckets where it changes them."""

    overrides: tuple[str, ...]
    text: str
    config: ResolvedRun
    clips: Clips
    is_smaller: bool = False
    """Whether less is trained: fewer frames, smaller frames, one expert."""


def advise(
    config: ResolvedRun, clips: Clips, plan: Plan, again: PlanAgain
) -> tuple[Suggestion, ...]:
    """What would make the run fit: each single change that suffices, the one that costs the least
    time first and those that train on less last; or, if none suffices alone, the changes together
    that do. For a run that fits, what would make it faster."""
    changes = list(_changes(config, clips))
    tried = [(change, again(change.config, change.clips)) for change in changes]
    if plan.fits:
        return tuple(
            _suggestion(change, after, plan)
            for change, after in tried
            if after.fits
            and not change.is_smaller
            and after.worst.time.seconds <= _LEAST_GAIN * plan.worst.time.seconds
        )
    sufficient = [(change, after) for change, after in tried if after.fits]
    sufficient += _smaller(config, clips, again)
    if not sufficient:
        sufficient = _together(config, clips, plan, again)
    sufficient.sort(key=lambda pair: (pair[0].is_smaller, _seconds_per_clip(*pair)))
    return tuple(_suggestion(change, after, plan) for change, after in sufficient)


def _seconds_per_clip(change: _Change, plan: Plan) -> float:
    train = change.config.train
    return plan.worst.time.seconds / (train.batch_size * train.accumulation)


def _suggestion(change: _Change, after: Plan, before: Plan) -> Suggestion:
    saved = before.peak.device_bytes - after.peak.device_bytes
    host_saved = before.host_peak.host_bytes - after.host_peak.host_bytes
    parts = [
        f"saves {format_bytes(amount)} of {where} memory"
        for amount, where in ((saved, "device"), (host_saved, "host"))
        if amount >= 1e8
    ]
    seconds = after.worst.time.seconds
    factor = seconds / before.worst.time.seconds
    parts.append(f"{seconds:.2g} s per step by arithmetic, {factor:.2f} times as before")
    return Suggestion(
        change=change.overrides,
        text=f"{change.text}: {'; '.join(parts)}",
        device_saved=saved,
        host_saved=host_saved,
        seconds=seconds,
        fits=after.fits,
    )


def _changes(config: ResolvedRun, clips: Clips) -> Iterator[_Change]:
    """Changes of single settings."""
    for text, overrides, sections in (
        *_memory_changes(config),
        *_trained_changes(config),
        *_batch_changes(config),
    ):
        changed = config.model_copy(update=sections)
        yield _Change(overrides=overrides, text=text, config=changed, clips=clips)


_Parts: TypeAlias = tuple[str, tuple[str, ...], dict[str, Section]]
"""(text, overrides, changed sections)."""


def _memory_changes(config: ResolvedRun) -> Iterator[_Parts]:
    """Settings of the memory section that the plan could choose better; packed weights."""
    memory = config.memory
    for name in ("resident_blocks", "offload_inputs", "keep_attention", "feed_forward_chunks"):
        if getattr(memory, name) is not None:
            text = f"leave memory.{name} to the plan"
            yield text, (f"memory.{name}=null",), {"memory": _with(memory, **{name: None})}
    for name in ("gradient_checkpointing", "offload_inactive_expert"):
        if not getattr(memory, name):
            text = f"turn memory.{name} on"
            yield text, (f"memory.{name}=true",), {"memory": _with(memory, **{name: True})}
    if memory.weights == "as_stored" and not isinstance(config.method, FineTuneMethod):
        for storage in ("fp8", "int8", "nf4"):
            text = f"store the frozen weights of the blocks in {storage}"
            changed = _with(memory, weights=storage)
            yield text, (f"memory.weights={storage}",), {"memory": changed}


def _trained_changes(config: ResolvedRun) -> Iterator[_Parts]:
    """Fewer bytes for each trained weight, or fewer of them."""
    train, method, optimizer = config.train, config.method, config.optimizer
    if train.ema is not None and not train.ema.offload:
        ema = _with(train, ema=_with(train.ema, offload=True))
        yield "keep the averages in host memory", ("train.ema.offload=true",), {"train": ema}
    if type(optimizer) is AdamWOptimizer:
        smaller = AdamW8bitOptimizer(**optimizer.model_dump(exclude={"name"}))
        text = "keep the optimizer state in 8 bits (needs bitsandbytes)"
        yield text, ("optimizer.name=adamw_8bit",), {"optimizer": smaller}
    if isinstance(method, FineTuneMethod) and not method.fused_step and train.accumulation == 1:
        sections = {
            "method": _with(method, fused_step=True),
            "train": _with(train, max_grad_norm=None),
        }
        overrides = ("method.fused_step=true", "train.max_grad_norm=null")
        yield "update each weight in the backward pass", overrides, sections
    if isinstance(method, RankedMethod) and method.rank > 8 and not method.init_from:
        rank = max(8, method.rank // 2)
        halved = _with(method, rank=rank, alpha=float(rank))
        yield f"halve the rank to {rank}", (f"method.rank={rank}",), {"method": halved}


def _batch_changes(config: ResolvedRun) -> Iterator[_Parts]:
    train = config.train
    if train.batch_size > 1:
        count = train.batch_size * train.accumulation
        yield (
            "one clip per forward pass, with as many clips per step",
            ("train.batch_size=1", f"train.accumulation={count}"),
            {"train": _with(train, batch_size=1, accumulation=count)},
        )


def _smaller(config: ResolvedRun, clips: Clips, again: PlanAgain) -> list[tuple[_Change, Plan]]:
    """One expert alone, and the largest number of frames, area of a frame and area of a sample, as
    far as each of them makes it fit."""
    found: list[tuple[_Change, Plan]] = []
    for kind in (_one_expert, _fewer_frames, _smaller_areas, _smaller_samples):
        for change in kind(config, clips):
            after = again(change.config, change.clips)
            if after.fits:
                found.append((change, after))
                break
    return found


def _one_expert(config: ResolvedRun, clips: Clips) -> Iterator[_Change]:
    if len(config.model.facts().experts) == 2 and config.model.experts == "both":
        yield _Change(
            overrides=("model.experts=low",),
            text="train one expert in a run",
            config=config.model_copy(update={"model": _with(config.model, experts="low")}),
            clips=clips,
            is_smaller=True,
        )


def _fewer_frames(config: ResolvedRun, clips: Clips) -> Iterator[_Change]:
    most = max(bucket.frames for bucket in clips)
    for frames in _FEWER_FRAMES:
        if frames < most:
            wan = _with(config.wan_config, max_frames=frames)
            yield _Change(
                overrides=(f"wan_config.max_frames={frames}",),
                text=f"clips of at most {frames} frames",
                config=config.model_copy(update={"wan_config": wan}),
                clips=_merged(
                    (Bucket(frames=min(b.frames, frames), width=b.width, height=b.height), n)
                    for b, n in clips.items()
                ),
                is_smaller=True,
            )


def _smaller_areas(config: ResolvedRun, clips: Clips) -> Iterator[_Change]:
    multiple = config.model.facts().size_multiple
    most = max(bucket.pixels for bucket in clips)
    for share in _SMALLER_AREAS:
        area = int(most * share)
        if area < (2 * multiple) ** 2:
            return
        video = _with(config.video_data, resolution=(area,))
        yield _Change(
            overrides=(f"video_data.resolution={area}",),
            text=f"frames of {area} pixels",
            config=config.model_copy(update={"video_data": video}),
            clips=_merged((_shrunk(b, area, multiple), n) for b, n in clips.items()),
            is_smaller=True,
        )


def _smaller_samples(config: ResolvedRun, clips: Clips) -> Iterator[_Change]:
    sample = config.sample
    if not sample.prompts:
        return
    multiple = config.model.facts().size_multiple
    bucket = Bucket(frames=sample.frames, width=sample.width, height=sample.height)
    for share in _SMALLER_AREAS:
        small = _shrunk(bucket, int(bucket.pixels * share), multiple)
        sizes = {"width": small.width, "height": small.height}
        yield _Change(
            overrides=tuple(f"sample.{name}={value}" for name, value in sizes.items()),
            text=f"sample videos of {small.width}x{small.height}",
            config=config.model_copy(update={"sample": _with(sample, **sizes)}),
            clips=clips,
        )


def _shrunk(bucket: Bucket, area: int, multiple: int) -> Bucket:
    """`bucket` in its own shape at no more than about `area` pixels."""
    factor = min(1.0, (area / bucket.pixels) ** 0.5)
    width, height = (
        max(multiple, round(side * factor / multiple) * multiple)
        for side in (bucket.width, bucket.height)
    )
    return Bucket(frames=bucket.frames, width=width, height=height)


def _merged(buckets: Iterator[tuple[Bucket, int]]) -> dict[Bucket, int]:
    merged: dict[Bucket, int] = {}
    for bucket, count in buckets:
        merged[bucket] = merged.get(bucket, 0) + count
    return merged


def _together(
    config: ResolvedRun, clips: Clips, plan: Plan, again: PlanAgain
) -> list[tuple[_Change, Plan]]:
    """One change made of several: each that helps is added, in order, until the run fits; then
    fewer frames are added to them. Empty if even that does not fit."""
    overrides = list[str]()
    texts = list[str]()
    current, best = config, plan
    while not best.fits:
        for change in _changes(current, clips):
            after = again(change.config, clips)
            if _over(after) < _over(best) and not change.is_smaller:
                overrides += change.overrides
                texts.append(change.text)
                current, best = change.config, after
                break
        else:
            break
    if best.fits:
        whole = _Change(
            overrides=tuple(overrides), text=", ".join(texts), config=current, clips=clips
        )
        return [(whole, best)]
    return [
        (
            _Change(
                overrides=(*overrides, *change.overrides),
                text=", ".join([*texts, change.text]),
                config=change.config,
                clips=change.clips,
                is_smaller=True,
            ),
            after,
        )
        for change, after in _smaller(current, clips, again)
    ]


def _over(plan: Plan) -> int:
    """Bytes by which the plan is above the machine's memory, of both kinds together."""
    device = plan.peak.device_bytes - plan.machine.device_budget
    host = plan.host_peak.host_bytes - plan.machine.host_budget
    return max(0, device) + max(0, host)


def _with(section: Any, **values: object) -> Any:
    """A copy of a section of the run file with other values, which are valid ones."""
    return section.model_copy(update=values)
