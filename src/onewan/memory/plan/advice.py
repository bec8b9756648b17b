"""Suggestions: the changes of a run file that make it fit, in order of what they cost in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.config.method import FineTuneMethod, RankedMethod
from onewan.config.optimizer import AdamW8bitOptimizer, AdamWOptimizer
from onewan.config.schema import ResolvedRun
from onewan.config.timesteps import timesteps_of
from onewan.memory.plan.bucket import Bucket
from onewan.memory.plan.result import Plan, Suggestion
from onewan.memory.plan.stored import FP8_TEXT_ENCODER

Clips: TypeAlias = Mapping[Bucket, int]
PlanAgain: TypeAlias = Callable[[ResolvedRun, Clips], Plan]
"""The plan of a changed run."""

_FEWER_FRAMES = (65, 49, 33, 17, 9, 1)
_SMALLER_AREAS = (0.75, 0.5, 0.25, 0.12)
"""Shares of the area of a frame."""
_BUCKETS_TRIED = 2
"""Buckets, of those that need most, that changes are tried on; the others fit where these do."""
_LEAST_GAIN = 0.97
"""A suggestion for speed is made where a step takes at most this share of the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    """A change of the run file."""

    text: str
    edits: Mapping[str, object]
    """New values by dotted names of fields."""
    overrides: tuple[str, ...]
    """The same as overrides of the command line."""
    shrink: Callable[[Bucket], Bucket] | None = None
    """What becomes of the buckets."""
    is_smaller: bool = False
    """Whether less is trained: fewer frames, smaller frames, one expert."""

    def config(self, config: ResolvedRun) -> ResolvedRun:
        for name, value in self.edits.items():
            config = _edited(config, name.split("."), value)
        return config

    def clips(self, clips: Clips) -> Clips:
        if self.shrink is None:
            return clips
        changed: dict[Bucket, int] = {}
        for bucket, count in clips.items():
            small = self.shrink(bucket)
            changed[small] = changed.get(small, 0) + count
        return changed


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tried:
    """Changes made together, and the plan with them."""

    changes: Sequence[_Change]
    config: ResolvedRun
    clips: Clips
    plan: Plan
    bucket: Bucket
    """What the worst bucket without changes has become, for comparing times."""

    @property
    def seconds(self) -> float:
        """Of a step with clips of `bucket`."""
        return self.plan.for_bucket(self.bucket).time.seconds

    @property
    def order(self) -> tuple[bool, float]:
        """Sorts by what is given up: first time per clip, and training on less only in the end."""
        train = self.config.train
        per_clip = self.seconds / (train.batch_size * train.accumulation)
        return any(change.is_smaller for change in self.changes), per_clip


def advise(
    config: ResolvedRun, clips: Clips, plan: Plan, again: PlanAgain
) -> tuple[Suggestion, ...]:
    """What would make the run fit: each single change that suffices, the one that costs the least
    time first and those that train on less last; or, if none suffices alone, changes that do
    together. For a run that fits, what would make it faster."""
    start = _Tried(
        changes=(),
        config=config,
        clips=_that_matter(clips, plan),
        plan=plan,
        bucket=plan.worst.bucket,
    )

    def tried(before: _Tried, change: _Change) -> _Tried:
        changed, clips = change.config(before.config), change.clips(before.clips)
        return _Tried(
            changes=(*before.changes, change),
            config=changed,
            clips=clips,
            plan=again(changed, clips),
            bucket=change.shrink(before.bucket) if change.shrink else before.bucket,
        )

    if plan.fits:
        limit = _LEAST_GAIN * start.seconds
        faster = [tried(start, change) for change in _changes(config)]
        found = [t for t in faster if t.plan.fits and t.seconds <= limit]
    else:
        found = [t for change in _changes(config) if (t := tried(start, change)).plan.fits]
        found += _smaller(start, tried)
        found = found or _together(start, tried)
    return tuple(_suggestion(t, start) for t in sorted(found, key=lambda t: t.order))


def _that_matter(clips: Clips, plan: Plan) -> Clips:
    largest = max(clips, key=lambda bucket: bucket.pixels * bucket.frames)
    highest = [found.bucket for found in plan.buckets[:_BUCKETS_TRIED]]
    return {bucket: clips[bucket] for bucket in dict.fromkeys([*highest, largest])}


def _suggestion(tried: _Tried, start: _Tried) -> Suggestion:
    before, after = start.plan, tried.plan
    # Of changes of the same field the last one counts.
    last = {name: change for change in tried.changes for name in change.edits}
    changes = [c for c in tried.changes if any(last[name] is c for name in c.edits)]
    saved = before.peak.device_bytes - after.peak.device_bytes
    host_saved = before.host_peak.host_bytes - after.host_peak.host_bytes
    parts = [
        f"saves {format_bytes(amount)} of {where} memory"
        for amount, where in ((saved, "device"), (host_saved, "host"))
        if amount >= 1e8
    ]
    factor = tried.seconds / start.seconds
    parts.append(f"a step takes {tried.seconds:.3g} s by arithmetic, {factor:.2f} times as long")
    return Suggestion(
        change=tuple(override for change in changes for override in change.overrides),
        text=f"{', '.join(change.text for change in changes)}: {'; '.join(parts)}",
        device_saved=saved,
        host_saved=host_saved,
        seconds=tried.seconds,
        fits=after.fits,
    )


# ------------------------------------------------------------------------------- several changes


def _smaller(start: _Tried, tried: Callable[[_Tried, _Change], _Tried]) -> list[_Tried]:
    """One expert alone, and the largest number of frames, area of a frame and area of a sample, as
    far as each of them makes it fit."""
    found: list[_Tried] = []
    for kind in (_one_expert, _fewer_frames, _smaller_areas, _smaller_samples):
        # Each change is smaller than the one before, so that those which fit are the last ones.
        left, fitting = [*kind(start.config, start.clips)], list[_Tried]()
        while left:
            middle = len(left) // 2
            after = tried(start, left[middle])
            fits = after.plan.fits
            fitting = [after] if fits else fitting
            left = left[:middle] if fits else left[middle + 1 :]
        found += fitting
    return found


def _together(start: _Tried, tried: Callable[[_Tried, _Change], _Tried]) -> list[_Tried]:
    """Smaller sample videos if they do not fit, and each change that helps, until the run fits; if
    that is not enough, fewer or smaller frames too. Empty if even that does not fit."""
    best = start
    for change in _smaller_samples(start.config, start.clips):
        if not _excess(best.plan, "sampling: decoding"):
            break
        best = tried(start, change)
    for change in _changes(start.config):
        if best.plan.fits:
            break
        after = tried(best, change)
        if _excess(after.plan) < _excess(best.plan):
            best = after
    return [best] if best.plan.fits else _smaller(best, tried)


def _excess(plan: Plan, phase: str | None = None) -> float:
    """By what share of the machine's memory the phases are too large, all together, so that a
    change which helps one of them counts; or only the named phase."""
    device, host = max(1, plan.machine.device_budget), max(1, plan.machine.host_budget)
    return sum(
        max(0, found.device_bytes - device) / device + max(0, found.host_bytes - host) / host
        for found in plan.phases
        if phase is None or found.phase == phase
    )


# -------------------------------------------------------------------------------- single changes


def _changes(config: ResolvedRun) -> Iterator[_Change]:
    """Changes of single settings, those without any cost first."""
    yield from _memory_changes(config)
    yield from _trained_changes(config)
    train = config.train
    if train.batch_size > 1:
        count = train.batch_size * train.accumulation
        text = "one clip per forward pass, with as many clips per step"
        yield _change(text, {"train.batch_size": 1, "train.accumulation": count})


def _memory_changes(config: ResolvedRun) -> Iterator[_Change]:
    """Settings of the memory section that the plan could choose better, and packed weights."""
    memory, is_fine_tuning = config.memory, isinstance(config.method, FineTuneMethod)
    for name in ("resident_blocks", "offload_inputs", "keep_attention", "feed_forward_chunks"):
        if getattr(memory, name) is not None:
            yield _change(f"leave memory.{name} to the plan", {f"memory.{name}": None})
    for name in ("gradient_checkpointing", "offload_inactive_expert"):
        if not getattr(memory, name):
            yield _change(f"turn memory.{name} on", {f"memory.{name}": True})
    if config.model.text_encoder is None and not config.embeddings:
        text = (
            "the text encoder in fp8 (6.7 GB, in split_files/text_encoders of "
            "Comfy-Org/Wan_2.1_ComfyUI_repackaged)"
        )
        yield _change(text, {"model.text_encoder": FP8_TEXT_ENCODER})
    if memory.host_weights != "mapped" and not is_fine_tuning:
        text = "read streamed weights from the model's file each time (slower, unless it is cached)"
        yield _change(text, {"memory.host_weights": "mapped"})
    weights = config.parallel.weights
    if weights.startswith("sharded") or (weights == "auto" and is_fine_tuning):
        text = "all weights in each process, streamed from host memory as far as needed"
        yield _change(text, {"parallel.weights": "replicated"})
    if memory.weights == "as_stored" and not is_fine_tuning:
        for storage in ("fp8", "int8", "nf4"):
            text = f"store the frozen weights of the blocks in {storage}"
            yield _change(text, {"memory.weights": storage})


def _trained_changes(config: ResolvedRun) -> Iterator[_Change]:
    """Fewer bytes for each trained weight, or fewer of them."""
    train, method, optimizer = config.train, config.method, config.optimizer
    if train.ema is not None and not train.ema.offload:
        yield _change("keep the averages in host memory", {"train.ema.offload": True})
    if type(optimizer) is AdamWOptimizer:
        yield _Change(
            text="keep the optimizer state in 8 bits (needs bitsandbytes)",
            edits={
                "optimizer": AdamW8bitOptimizer(**optimizer.model_dump(exclude={"name"})),
            },
            overrides=("optimizer.name=adamw_8bit",),
        )
    if isinstance(method, FineTuneMethod) and not method.fused_step and train.accumulation == 1:
        yield _change(
            "update each weight in the backward pass",
            {"method.fused_step": True, "train.max_grad_norm": None},
        )
    if isinstance(method, RankedMethod) and method.rank > 8 and not method.init_from:
        rank = max(8, method.rank // 2)
        yield _Change(
            text=f"a rank of {rank}",
            edits={"method.rank": rank, "method.alpha": float(rank)},
            overrides=(f"method.rank={rank}",),
        )


def _one_expert(config: ResolvedRun, clips: Clips) -> Iterator[_Change]:
    del clips
    variant = config.model.facts()
    # The low expert alone can't train a source of the high one.
    alone = len(variant.experts) == 2 and all(
        timesteps_of(source, variant).part_of(variant.expert("low"))
        for source in config.video_data.sources
    )
    if alone and config.model.experts == "both":
        yield _change("one expert in a run", {"model.experts": "low"}, is_smaller=True)


def _fewer_frames(config: ResolvedRun, clips: Clips) -> Iterator[_Change]:
    del config
    most = max(bucket.frames for bucket in clips)
    for frames in (f for f in _FEWER_FRAMES if f < most):

        def shrink(bucket: Bucket, frames: int = frames) -> Bucket:
            fewer = min(bucket.frames, frames)
            return Bucket(frames=fewer, width=bucket.width, height=bucket.height)

        yield _change(
            f"clips of at most {frames} frames",
            {"wan_config.max_frames": frames},
            shrink=shrink,
            is_smaller=True,
        )


def _smaller_areas(config: ResolvedRun, clips: Clips) -> Iterator[_Change]:
    multiple = config.model.facts().size_multiple
    most = max(bucket.pixels for bucket in clips)
    for area in (int(most * share) for share in _SMALLER_AREAS):
        if area < (2 * multiple) ** 2:
            return

        def shrink(bucket: Bucket, area: int = area) -> Bucket:
            return _shrunk(bucket, area, multiple)

        yield _Change(
            text=f"frames of {area} pixels",
            edits={"video_data.resolution": (area,)},
            overrides=(f"video_data.resolution={area}",),
            shrink=shrink,
            is_smaller=True,
        )


def _smaller_samples(config: ResolvedRun, clips: Clips) -> Iterator[_Change]:
    del clips
    sample = config.sample
    if not sample.prompts:
        return
    multiple = config.model.facts().size_multiple
    whole = Bucket(frames=sample.frames, width=sample.width, height=sample.height)
    for share in _SMALLER_AREAS:
        small = _shrunk(whole, int(whole.pixels * share), multiple)
        yield _change(
            f"sample videos of {small.width}x{small.height}",
            {"sample.width": small.width, "sample.height": small.height},
        )


def _change(text: str, edits: Mapping[str, object], **options: Any) -> _Change:
    """A change whose overrides are its edits."""
    overrides = [
        f"{name}={'null' if value is None else 'true' if value is True else value}"
        for name, value in edits.items()
    ]
    return _Change(text=text, edits=edits, overrides=tuple(overrides), **options)


def _shrunk(bucket: Bucket, area: int, multiple: int) -> Bucket:
    """`bucket` in its own shape at no more than about `area` pixels."""
    factor = min(1.0, (area / bucket.pixels) ** 0.5)
    width, height = (
        max(multiple, round(side * factor / multiple) * multiple)
        for side in (bucket.width, bucket.height)
    )
    return Bucket(frames=bucket.frames, width=width, height=height)


def _edited(section: Any, names: Sequence[str], value: object) -> Any:
    """A copy of a section with another value of the field that `names` lead to."""
    first, *rest = names
    if rest:
        value = _edited(getattr(section, first), rest, value)
    return section.model_copy(update={first: value})
