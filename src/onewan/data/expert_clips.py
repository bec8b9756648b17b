"""Which clips each expert trains, in how many batches, and whether it can: without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from onewan.arithmetic.clip_timesteps import ALL_TIMESTEPS, ClipTimesteps, timestep_problems
from onewan.arithmetic.timestep_density import official_token_count, shift_factor
from onewan.config.resolve import trained_experts
from onewan.config.schema import ResolvedRun
from onewan.config.timesteps import timesteps_of, without_clips
from onewan.data.clip import Clip, alternatives
from onewan.errors import ConfigError
from onewan.variants import Expert, ExpertName


def clips_of(expert: Expert, clips: Iterable[Clip]) -> list[Clip]:
    """Those of `clips` that are trained at timesteps of `expert`'s range."""
    return [clip for clip in clips if clip.timesteps.part_of(expert)]


def clips_by_expert(
    experts: Iterable[Expert], clips: Sequence[Clip]
) -> dict[ExpertName, list[Clip]]:
    """The clips of each of `experts`, by its name."""
    return {expert.name: clips_of(expert, clips) for expert in experts}


def batches_per_epoch(
    clips: Mapping[ExpertName, Sequence[Clip]], batch_size: int
) -> dict[ExpertName, int]:
    """The micro-batches in which each expert has every one of its `clips` once, or as often as the
    clip's source says."""
    found = dict[ExpertName, int]()
    for expert, own in clips.items():
        counts: Counter[tuple[int, tuple[int, int]]] = Counter()
        for clip, *_ in alternatives(own):
            counts[clip.frames, clip.size] += clip.repeats
        # Rounded up for each bucket, since its last batch may be smaller.
        found[expert] = sum(-(-count // batch_size) for count in counts.values())
    return found


def check_timesteps(config: ResolvedRun, clips: Sequence[Clip]) -> None:
    """ConfigError if an expert has none of the training `clips`, or if one of them has a size for
    which `train.timesteps` draws nothing within its range; the sources concerned are named."""
    if problems := timestep_lines(config, clips):
        raise ConfigError("run file", problems)


def timestep_lines(config: ResolvedRun, clips: Sequence[Clip]) -> list[str]:
    """What `check_timesteps` raises, a line each."""
    experts = trained_experts(config)
    lines = [
        ": ".join(without_clips(config, expert))
        for expert in experts
        if not clips_of(expert, clips)
    ]
    if config.train.timesteps.shift_by_tokens:  # else the run file's rules know the density
        lines += dict.fromkeys(_lines_by_size(config, clips, experts))
    return lines


def _lines_by_size(
    config: ResolvedRun, clips: Sequence[Clip], experts: Sequence[Expert]
) -> Iterator[str]:
    variant, train = config.model.facts(), config.train
    density, official = train.timesteps.density(variant.flow_shift), official_token_count(variant)
    weighting, side = train.loss.weighting.function(), variant.spatial_compression
    first = {(clip.timesteps, clip.frames, clip.size): clip for clip in reversed(clips)}
    for (timesteps, frames, (width, height)), clip in first.items():
        latent_frames = (frames - 1) // variant.temporal_compression + 1
        factor = shift_factor((latent_frames, height // side, width // side), official)
        such = f"for clips of {frames} frames at {width}x{height}, such as {clip.name}"
        for field, text in timestep_problems(timesteps, density.scaled(factor), weighting, experts):
            named = ", ".join(f"{section}.{field}" for section in _sections(config, timesteps))
            yield f"{named}: {such}, {text}"


def _sections(config: ResolvedRun, timesteps: ClipTimesteps) -> list[str]:
    """The sections of the run file that give clips `timesteps`."""
    if timesteps == ALL_TIMESTEPS:
        return ["train"]
    variant = config.model.facts()
    return [
        f"video_data.sources.{index}"
        for index, source in enumerate(config.video_data.sources)
        if timesteps_of(source, variant) == timesteps
    ]
