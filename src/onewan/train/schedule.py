"""Whose turn it is, and at which learning rate: functions of the step alone. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from onewan.train.objective import TimestepDensity
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

    def steps_before(self, step: int, expert: ExpertName) -> int:
        """How many of the steps 0 .. `step`-1 are `expert`'s."""
        if len(self.experts) == 1:
            return step
        blocks, rest = divmod(step, self.block)
        first = math.ceil(blocks * self.share) * self.block
        if self._is_first(blocks):
            first += rest
        return first if expert == self.experts[0] else step - first

    def turn(self, step: int) -> tuple[ExpertName, int]:
        """The expert of `step`, and how many steps it had before."""
        first = len(self.experts) == 1 or self._is_first(step // self.block)
        expert = self.experts[0 if first else 1]
        return expert, self.steps_before(step, expert)

    def _is_first(self, block: int) -> bool:
        return math.ceil((block + 1) * self.share) > math.ceil(block * self.share)


def expert_schedule(
    experts: Sequence[Expert],
    share: Literal["equal", "mass"] | float,
    block: int,
    density: TimestepDensity,
) -> ExpertSchedule:
    """The schedule that the run file's `train.high_share` and `train.expert_block` mean."""
    names: tuple[ExpertName, ...] = tuple(e.name for e in experts)
    if len(experts) == 1:
        return ExpertSchedule(experts=names)
    named = {"equal": 0.5, "mass": density.mass(experts[0])}
    value = named[share] if isinstance(share, str) else share
    return ExpertSchedule(
        experts=names, share=Fraction(value).limit_denominator(10_000), block=block
    )


def lr_factor(
    kind: Literal["constant", "linear", "cosine"], step: int, total: int, warmup: int
) -> float:
    """What the learning rate is multiplied with at an expert's own step `step` (from 0) of `total`.

    Rises linearly over `warmup` steps, the first of which is not 0; then stays, or falls towards 0,
    which it would reach one step after the last.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    if kind == "linear":
        return 1 - progress
    return (1 + math.cos(math.pi * progress)) / 2
