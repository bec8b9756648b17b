"""The timesteps of a run and of its sources: what each source's clips are trained at, and the rules
about it."""

from __future__ import annotations

from collections.abc import Iterator

from onewan.arithmetic.clip_timesteps import ALL_TIMESTEPS, ClipTimesteps, timestep_problems
from onewan.arithmetic.timestep_weighting import EVEN, weighting_problem
from onewan.config.clips import SourceSection
from onewan.config.fields import Problem
from onewan.config.resolve import trained_experts
from onewan.config.schema import RunConfig
from onewan.variants import Expert, Variant


def timesteps_of(source: SourceSection, variant: Variant) -> ClipTimesteps:
    """The timesteps of the clips of `source`. `variant` has the expert that it names."""
    t_min, t_max = 0.0, 1.0
    if isinstance(source.timesteps, str):
        expert = variant.expert(source.timesteps)
        t_min, t_max = expert.t_min, expert.t_max
    elif source.timesteps is not None:
        t_min, t_max = source.timesteps
    # A weighting of the kind "none" is a weighting of its own: it replaces the run's.
    weighting = None if source.weighting is None else source.weighting.function() or EVEN
    return ClipTimesteps(t_min=t_min, t_max=t_max, weighting=weighting)


def timestep_rules(config: RunConfig) -> Iterator[Problem]:
    """Each trained expert has clips, and timesteps to draw of which not all loss weights are 0."""
    experts, sources = trained_experts(config), config.video_data.sources
    if len(config.model.facts().experts) == 1:
        named = [(i, source.timesteps) for i, source in enumerate(sources)]
        named = [(i, name) for i, name in named if isinstance(name, str)]
        for index, name in named:
            text = f"{config.model.variant} has one expert, got {name}; give a range: [0.5, 1]"
            yield f"video_data.sources.{index}.timesteps", text
        if named:
            return
    if sources:
        yield from (without_clips(config, e) for e in experts if not _sources_for(config, e))
    if config.train.timesteps.shift_by_tokens:
        return  # each size of clip has a shift of its own
    yield from _density_rules(config)


def _density_rules(config: RunConfig) -> Iterator[Problem]:
    variant, experts = config.model.facts(), trained_experts(config)
    density = config.train.timesteps.density(variant.flow_shift)
    weighting = config.train.loss.weighting.function()
    for expert in experts:
        line = density.problem(expert)
        if line is None and weighting is not None:
            line = weighting_problem(weighting, density, expert)
        if line is not None:
            field, _, text = line.partition(": ")
            yield field, text
    for index, source in enumerate(config.video_data.sources):
        if (timesteps := timesteps_of(source, variant)) != ALL_TIMESTEPS:
            for field, text in timestep_problems(timesteps, density, weighting, experts):
                yield f"video_data.sources.{index}.{field}", text


def without_clips(config: RunConfig, expert: Expert) -> Problem:
    """Why there are no clips for `expert`: by the timesteps of the sources, or since those that are
    for it have none that can be used."""
    number, others = len(config.video_data.sources), trained_experts(config)
    used = _sources_for(config, expert)
    ranges = [
        f"video_data.sources.{index} has "
        f"{'no clip that is trained on' if index in used else 'other timesteps'}"
        for index in range(number)
    ]
    shown = ", ".join(ranges[:5]) + (f" and {number - 5} more" if number > 5 else "")
    remedy = "add a source for it"
    if len(others) == 2:
        (other,) = (each.name for each in others if each.name != expert.name)
        remedy += f", or train the {other} expert alone: model.experts={other}"
    text = (
        f"has no clip for the {expert.name} expert, which is trained at {expert.t_min:g} to "
        f"{expert.t_max:g}: {shown}; {remedy}"
    )
    return "video_data.sources", text


def _sources_for(config: RunConfig, expert: Expert) -> list[int]:
    """The training sources whose clips are trained at timesteps of `expert`'s range."""
    variant = config.model.facts()
    return [
        index
        for index, source in enumerate(config.video_data.sources)
        if timesteps_of(source, variant).part_of(expert)
    ]
