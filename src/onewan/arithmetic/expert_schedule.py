"""Whose turn it is, and at which learning rate: functions of the step alone. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from onewan.arithmetic.timestep_density import TimestepDensity
from onewan.config.optimizer import (
    ConstantSchedule,
    CosineRestartsSchedule,
    CosineSchedule,
    LinearSchedule,
    PolynomialSchedule,
    RexSchedule,
    Schedule,
)
from onewan.variants import Expert, ExpertName


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSchedule:
    """Deals steps to experts in blocks; a step belongs to one expert, with all its micro-batches.

    Block b is the first expert's if ceil((b+1) share) > ceil(b share): after any number of blocks
    its count is the share exactly, but for the rounding up to a whole block, and the blocks are
    spread evenly. Nothing is remembered, so a resumed run deals on as an uncut one would.
    """

    experts: tuple[ExpertName, ...]
    """One or two; with two, `share` is the first one's."""
    share: Fraction = Fraction(1)
    block: int = 1
    budgets: tuple[int, int] | None = None
    """Steps of the first and of the second, if they are to come out exactly; their sum is the
    run's. An expert whose budget is spent gives the rest of its blocks to the other."""

    def steps_before(self, step: int, expert: ExpertName) -> int:
        """How many of the steps 0 .. `step`-1 are `expert`'s."""
        if len(self.experts) == 1:
            return step
        first = self._first_before(step)
        return first if expert == self.experts[0] else step - first

    def turn(self, step: int) -> tuple[ExpertName, int]:
        """The expert of `step`, and how many steps it had before."""
        first = self.experts[0]
        rises = self.steps_before(step + 1, first) > self.steps_before(step, first)
        expert = first if rises else self.experts[1]
        return expert, self.steps_before(step, expert)

    def _first_before(self, step: int) -> int:
        """How many of the steps 0 .. `step`-1 are the first expert's."""
        blocks, rest = divmod(step, self.block)
        whole = math.ceil(blocks * self.share)
        dealt = whole * self.block
        if math.ceil((blocks + 1) * self.share) > whole:
            dealt += rest
        if self.budgets is None:
            return dealt
        # Both bounds rise by at most one a step, so the count still does.
        budget, other = self.budgets
        return min(max(dealt, step - other), budget)


def expert_schedule(
    experts: Sequence[Expert],
    share: Literal["equal", "density"] | float,
    block: int,
    density: TimestepDensity,
    budgets: tuple[int, int] | None = None,
) -> ExpertSchedule:
    """The expert schedule by `train.high_expert_share` and `train.switch_expert_every`.

    `budgets`, where `per_expert` gives steps for both experts in this order, decide the share too.
    """
    names: tuple[ExpertName, ...] = tuple(e.name for e in experts)
    if len(experts) == 1:
        return ExpertSchedule(experts=names)
    if budgets is not None:
        return ExpertSchedule(
            experts=names, share=Fraction(budgets[0], sum(budgets)), block=block, budgets=budgets
        )
    named = {"equal": 0.5, "density": density.mass(experts[0])}
    value = named[share] if isinstance(share, str) else share
    return ExpertSchedule(
        experts=names, share=Fraction(value).limit_denominator(10_000), block=block
    )


def lr_factor(schedule: Schedule, step: int, total: int, warmup: int, cooldown: int) -> float:
    """What the learning rate is multiplied with at an expert's own step `step` (from 0) of `total`.

    It rises in a straight line over `warmup` steps, the first of which is not 0. Then it takes the
    course of `schedule`, which reaches its end one step after the last that is its own. Over the
    last `cooldown` steps it falls from there in a straight line to 0, which it would reach one step
    after the last. Between the ramps the courses are those of diffusers and transformers.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    fall = total - cooldown
    factor = _course(schedule, min(step, fall) - warmup, max(1, fall - warmup))
    return factor if step < fall or not cooldown else factor * (total - step) / cooldown


def _course(schedule: Schedule, done: int, span: int) -> float:
    """The factor after `done` steps of a course over `span` of them."""
    if isinstance(schedule, ConstantSchedule):
        return 1.0
    return schedule.end_factor + (1 - schedule.end_factor) * _fallen(schedule, done, span)


def _fallen(schedule: Schedule, done: int, span: int) -> float:
    """From 1 at the start of a course to 0 at its end."""
    left = 1 - done / span
    match schedule:
        case CosineSchedule():
            return _half_cosine(done / span)
        case CosineRestartsSchedule():
            # In whole numbers, so that a cycle ends on its step and not on one beside it.
            return _half_cosine(schedule.cycles * done % span / span) if done < span else 0.0
        case RexSchedule():  # Chen et al., arXiv 2107.04197
            return left / (1 / 2 + left / 2)
        case PolynomialSchedule():
            return left**schedule.power
        case LinearSchedule() | ConstantSchedule():
            return left


def _half_cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2
