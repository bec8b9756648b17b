"""Rules of a run file about the course of training: steps, schedules, noise levels, measurements.

Never parses, never changes a value, never looks at the disk.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise

from onewan.config.method_rules import trained
from onewan.config.objective import CurveWeighting, TableTimesteps
from onewan.config.optimizer import AVERAGING_OPTIMIZERS
from onewan.config.resolve import divided_steps
from onewan.config.schema import RunConfig
from onewan.config.schema_paths import Problem, show
from onewan.variants import Expert, Variant


def train_rules(config: RunConfig, variant: Variant | None) -> Iterator[Problem]:
    """Rules of how training goes; those that need facts only with `variant`."""
    if variant is not None:
        yield from _share_rules(config, variant)
        yield from _level_rules(config, variant)
    yield from _warmup_rules(config, variant)
    yield from _averaging_rules(config)
    yield from _curve_rules(config)
    yield from _validation_rules(config)
    train = config.train
    if train.first_frame_noise is not None and train.first_frame_probability == 0:
        yield (
            "train.first_frame_noise",
            f"has no effect where train.first_frame_probability is 0, got "
            f"{show(train.first_frame_noise)}; leave it out, or raise the other",
        )


# -------------------------------------------------------------------------------------------- steps


def _share_rules(config: RunConfig, variant: Variant) -> Iterator[Problem]:
    choice, share = config.model.experts, config.train.high_expert_share
    experts = len(variant.experts)
    if isinstance(share, str):
        return
    if experts == 1 or choice != "both":
        alone = "has one expert" if experts == 1 else f"trains only its {choice} expert"
        yield (
            "train.high_expert_share",
            f"divides the steps between two experts, but {variant.name} {alone}, got {share}; "
            "leave it out",
        )
    elif share in (0, 1):
        idle, other = ("high", "low") if share == 0 else ("low", "high")
        yield (
            "train.high_expert_share",
            f"leaves the {idle} expert no steps, got {share:g}; leave it out, and set "
            f"model.experts={other} to train the {other} expert alone",
        )


def _warmup_rules(config: RunConfig, variant: Variant | None) -> Iterator[Problem]:
    """Warm-up and cooldown count each expert's own steps, so the one with the fewest is the limit.

    Without a variant, as with one expert, only the steps as a whole are known.
    """
    train = config.train
    warmup, cooldown = train.warmup_steps, train.cooldown_steps
    fewest, whose = _fewest_steps(config, variant)
    if warmup + cooldown < fewest:
        return
    alone = ""
    if whose != "train.steps":
        alone = (
            " or train one expert alone (model.experts)" if warmup + cooldown < train.steps else ""
        )
    limit = f"{whose} ({fewest})" if whose == "train.steps" else whose
    if not cooldown:
        yield (
            "train.warmup_steps",
            f"must be less than {limit}, got {warmup}; lower it{alone}",
        )
    else:
        beside = f"with train.warmup_steps ({warmup}), " if warmup else ""
        yield (
            "train.cooldown_steps",
            f"{beside}must be less than {limit}, got {cooldown}; lower it{alone}",
        )


def _fewest_steps(config: RunConfig, variant: Variant | None) -> tuple[int, str]:
    """Steps of the expert that has the fewest, and what they are; of the whole run if unknown."""
    train, share, steps = config.train, config.train.high_expert_share, divided_steps(config)
    if variant is None or len(trained(config, variant)) != 2:
        return train.steps, "train.steps"
    if steps is not None:
        fewest, expert = min(zip(steps, ("high", "low"), strict=True))
        return fewest, f"the {fewest} steps of the {expert} expert (per_expert.{expert}.steps)"
    if share == "density":
        # The mass follows from the density of noise levels, which only training computes. So the
        # whole is the limit here, and a warm-up that outlasts an expert's steps goes unseen.
        return train.steps, "train.steps"
    high = 0.5 if share == "equal" else share
    # About this many: train.switch_expert_every deals them out in whole blocks.
    parts = {
        "high": max(1, round(train.steps * high)),
        "low": max(1, round(train.steps * (1 - high))),
    }
    expert, fewest = min(parts.items(), key=lambda part: part[1])
    return fewest, (
        f"the {fewest} steps of the {expert} expert, its part of train.steps ({train.steps}) by "
        f"train.high_expert_share ({share})"
    )


def _averaging_rules(config: RunConfig) -> Iterator[Problem]:
    """Averaged weights take the place of a falling learning rate; both together are worse."""
    optimizer, train = config.optimizer, config.train
    if not isinstance(optimizer, AVERAGING_OPTIMIZERS):
        return
    why = f"optimizer.name {optimizer.name} averages weights instead"
    if train.schedule.kind != "constant":
        yield (
            "train.schedule.kind",
            f"must be constant, since {why}, got {show(train.schedule.kind)}; leave it out",
        )
    if train.cooldown_steps:
        yield (
            "train.cooldown_steps",
            f"must be 0, since {why}, got {train.cooldown_steps}; leave it out",
        )


# ------------------------------------------------------------------------------------- noise levels


def _curve_rules(config: RunConfig) -> Iterator[Problem]:
    timesteps, weighting = config.train.timesteps, config.train.loss.weighting
    if isinstance(timesteps, TableTimesteps) and not any(timesteps.weights):
        yield (
            "train.timesteps.weights",
            f"must have a weight above 0, got {show(timesteps.weights)}; raise one",
        )
    if isinstance(weighting, CurveWeighting):
        field = "train.loss.weighting.points"
        levels = [level for level, _ in weighting.points]
        if any(low >= high for low, high in pairwise(levels)):
            yield field, f"noise levels must rise, got {show(levels)}; put them in order"
        if not any(weight for _, weight in weighting.points):
            yield field, f"must have a weight above 0, got {show(weighting.points)}; raise one"


def _level_rules(config: RunConfig, variant: Variant) -> Iterator[Problem]:
    """Each expert that trains has levels to draw from, and one of them counts."""
    timesteps, weighting = config.train.timesteps, config.train.loss.weighting
    for expert in variant.experts:
        if expert.name not in trained(config, variant):
            continue
        whose = "the model" if expert.name == "single" else f"the {expert.name} expert"
        serves = f"noise levels {expert.t_min:g} to {expert.t_max:g}"
        # With shift_by_tokens, the shift is each clip's own.
        if isinstance(timesteps, TableTimesteps) and not timesteps.shift_by_tokens:
            shift = timesteps.shift or variant.flow_shift
            if any(timesteps.weights) and not _mass(timesteps.weights, expert, shift):
                yield (
                    "train.timesteps.weights",
                    f"must have a weight above 0 for {whose}, which serves {serves} after the "
                    f"shift of {shift:g}, got {show(timesteps.weights)}; raise one there",
                )
        if isinstance(weighting, CurveWeighting) and not _counts(weighting.points, expert):
            yield (
                "train.loss.weighting.points",
                f"must have a weight above 0 for {whose}, which serves {serves}, got "
                f"{show(weighting.points)}; raise one there",
            )


def _mass(weights: Sequence[float], expert: Expert, shift: float) -> bool:
    """Whether a part with weight reaches into the levels that `expert` serves."""
    low, high = (len(weights) * t / (shift - (shift - 1) * t) for t in (expert.t_min, expert.t_max))
    return any(weights[math.floor(low) : math.ceil(high)])


def _counts(points: Sequence[tuple[float, float]], expert: Expert) -> bool:
    """Whether the curve is above 0 anywhere in the levels that `expert` serves."""
    levels = [level for level, _ in points]
    # Straight lines are 0 on a whole range only if all points in it and around it are.
    first = max(0, bisect_right(levels, expert.t_min) - 1)
    last = bisect_right(levels, expert.t_max)
    nowhere = not any(weight for _, weight in points)  # has a message of its own
    return nowhere or any(weight for _, weight in points[first : last + 1])


# ------------------------------------------------------------------------------------- measurements


def _validation_rules(config: RunConfig) -> Iterator[Problem]:
    validation = config.validation
    if validation.sources and validation.share:
        yield (
            "validation.share",
            "holds clips of the training out, and validation.sources gives others, got "
            f"{validation.share:g}; leave out either",
        )
    if validation.every and not validation.clips:
        yield (
            "validation.every",
            f"is {validation.every}, but validation.clips is 0, which turns it off; raise that, or "
            "leave it out",
        )
    if config.train.keep_best and not (validation.every and validation.clips):
        lacking = "every" if not validation.every else "clips"
        yield (
            "train.keep_best",
            f"goes by the validation loss, and validation.{lacking} is 0; give "
            f"validation.{lacking}, or leave it out",
        )
