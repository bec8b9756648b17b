"""The expert schedule: which expert a step trains, as a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from onewan.arithmetic.timestep_density import TimestepDensity
from onewan.variants import Expert, ExpertName


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSchedule:
    """Assigns steps to experts in periods of `period` steps; a step trains one expert, with all its
    micro-batches.

    Period k belongs to the first expert if ceil((k+1) share) > ceil(k share): after any number of
    periods the first expert has trained exactly its share, rounded up to whole periods, and its
    periods are spread evenly. There is no state, so a resumed run continues like an uninterrupted
    one.
    """

    experts: tuple[ExpertName, ...]
    """One or two; with two, `share` is the first one's."""
    share: Fraction = Fraction(1)
    period: int = 1
    step_counts: tuple[int, int] | None = None
    """Exact steps of the first and the second expert, which add up to those of the run. When one
    expert has completed its steps, the other one gets all that remain."""

    def steps_before(self, step: int, expert: ExpertName) -> int:
        """How many of the steps 0 .. `step`-1 train `expert`."""
        if len(self.experts) == 1:
            return step
        first = self._first_before(step)
        return first if expert == self.experts[0] else step - first

    def expert_at(self, step: int) -> tuple[ExpertName, int]:
        """The expert that `step` trains, and how many steps have trained it before."""
        first = self.experts[0]
        increases = self.steps_before(step + 1, first) > self.steps_before(step, first)
        expert = first if increases else self.experts[1]
        return expert, self.steps_before(step, expert)

    def span(self, first: int, stop: int, is_due: Callable[[int], bool]) -> range:
        """The steps from `first` on after which processes that train the two experts at the same
        time meet: a block of steps of each expert, or fewer where they end (`stop`) or where
        something `is_due` after that many steps."""
        blocks, end = [self.expert_at(first)[0]], first + 1
        while end < stop and not is_due(end):
            expert, _ = self.expert_at(end)
            if expert != blocks[-1]:
                if len(blocks) == len(self.experts):
                    break
                blocks.append(expert)
            end += 1
        return range(first, end)

    def _first_before(self, step: int) -> int:
        """How many of the steps 0 .. `step`-1 train the first expert."""
        periods, rest = divmod(step, self.period)
        whole = math.ceil(periods * self.share)
        assigned = whole * self.period
        if math.ceil((periods + 1) * self.share) > whole:
            assigned += rest
        if self.step_counts is None:
            return assigned
        # Both bounds increase by at most one per step, and so does the result.
        first, second = self.step_counts
        return min(max(assigned, step - second), first)


def expert_schedule(
    experts: Sequence[Expert],
    share: Literal["equal", "density"] | float,
    period: int,
    density: TimestepDensity,
    step_counts: tuple[int, int] | None = None,
) -> ExpertSchedule:
    """The schedule by `train.high_expert_share` and `train.switch_expert_every` of a run file.

    `step_counts`, the steps that `per_expert` gives for both experts, replace the share.
    """
    names: tuple[ExpertName, ...] = tuple(e.name for e in experts)
    if len(experts) == 1:
        return ExpertSchedule(experts=names)
    if step_counts is not None:
        fraction = Fraction(step_counts[0], sum(step_counts))
    else:
        named = {"equal": 0.5, "density": density.mass(experts[0])}
        value = named[share] if isinstance(share, str) else share
        # A small denominator keeps the arithmetic exact and the periods of a cycle few.
        fraction = Fraction(value).limit_denominator(10_000)
    return ExpertSchedule(experts=names, share=fraction, period=period, step_counts=step_counts)
