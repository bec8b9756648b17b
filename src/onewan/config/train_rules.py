"""Rules between the fields of a run file: training steps, schedules, timesteps, validation."""

from __future__ import annotations

from collections.abc import Iterator

from onewan.arithmetic.timestep_weighting import weighting_problem
from onewan.config.optimizer import AVERAGING_OPTIMIZERS
from onewan.config.resolve import expert_schedule_of, total_steps, trained_experts
from onewan.config.schema import RunConfig
from onewan.config.schema_paths import Problem, format_value


def train_rules(config: RunConfig) -> Iterator[Problem]:
    """Rules of `train` and `validation`."""
    yield from _share_rules(config)
    yield from _warmup_rules(config)
    yield from _timestep_rules(config)
    yield from _averaging_rules(config)
    yield from _validation_rules(config)


def _share_rules(config: RunConfig) -> Iterator[Problem]:
    share = config.train.high_expert_share
    if share in (0, 1) and len(trained_experts(config)) == 2:
        idle, other = ("high", "low") if share == 0 else ("low", "high")
        yield (
            "train.high_expert_share",
            f"leaves the {idle} expert no steps, got {share:g}; leave it out, and set "
            f"model.experts={other} to train the {other} expert alone",
        )


def _warmup_rules(config: RunConfig) -> Iterator[Problem]:
    """Warm-up and cooldown are counted in an expert's own steps, and must leave one between them.

    An expert that gets no steps at all is not judged here; the trainer warns of it.
    """
    train = config.train
    warmup, cooldown = train.warmup_steps, train.cooldown_steps
    schedule = expert_schedule_of(config)
    total = total_steps(config)
    counts = {name: schedule.steps_before(total, name) for name in schedule.experts}
    expert, fewest = min(counts.items(), key=lambda item: item[1] or total + 1)
    if not warmup + cooldown or warmup + cooldown < fewest:
        return
    limit, remedy = f"train.steps ({total})", "lower it"
    if len(counts) > 1:
        limit = f"the {fewest} steps of the {expert} expert"
        remedy = "lower it, or give that expert more steps"
    if not cooldown:
        yield "train.warmup_steps", f"must be less than {limit}, got {warmup}; {remedy}"
        return
    added = f"and train.warmup_steps ({warmup}) together " if warmup else ""
    yield (
        "train.cooldown_steps",
        f"{added}must be less than {limit}, got {cooldown}; {remedy}",
    )


def _averaging_rules(config: RunConfig) -> Iterator[Problem]:
    """Averaged weights take the path of a falling learning rate; both together are worse."""
    optimizer, train = config.optimizer, config.train
    if not isinstance(optimizer, AVERAGING_OPTIMIZERS):
        return
    why = f"optimizer.name {optimizer.name} averages weights instead"
    if train.schedule.kind != "constant":
        yield (
            "train.schedule.kind",
            f"must be constant, since {why}, got {format_value(train.schedule.kind)}; leave it out",
        )
    if train.cooldown_steps:
        yield (
            "train.cooldown_steps",
            f"must be 0, since {why}, got {train.cooldown_steps}; leave it out",
        )


def _timestep_rules(config: RunConfig) -> Iterator[Problem]:
    """Each expert that trains has timesteps to draw, and not all of their loss weights are 0."""
    timesteps, weighting = config.train.timesteps, config.train.loss.weighting.function()
    if timesteps.shift_by_tokens:
        return  # each size of clip has a shift of its own
    density = timesteps.density(config.model.facts().flow_shift)
    for expert in trained_experts(config):
        text = density.problem(expert)
        if text is None and weighting is not None:
            text = weighting_problem(weighting, density, expert)
        if text is not None:
            field, _, text = text.partition(": ")
            yield field, text


def _validation_rules(config: RunConfig) -> Iterator[Problem]:
    validation = config.validation
    if validation.sources and validation.share:
        yield (
            "validation.share",
            "holds out training clips, and validation.sources gives other clips, got "
            f"{validation.share:g}; remove one of them",
        )
    if validation.every and not validation.clips:
        yield (
            "validation.every",
            f"is {validation.every}, but validation.clips is 0, which turns it off; raise that, or "
            "leave it out",
        )
    if config.train.keep_best and not (validation.every and validation.clips):
        missing = "every" if not validation.every else "clips"
        yield (
            "train.keep_best",
            f"needs the validation loss, and validation.{missing} is 0; give "
            f"validation.{missing}, or leave it out",
        )
