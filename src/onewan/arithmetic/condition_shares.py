"""Which frames of its clip a training sample is given, and how often each choice comes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

from onewan.variants import Variant

Given = Literal["first", "both", "last", "none"]
"""The frames that a sample is given: its first, first and last, its last, or none."""

SHARE_ROUNDING = 1e-6
"""By how much the sum of shares that are written as decimals may differ from 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionShares:
    """The share of the samples with each choice; together they are 1."""

    first: float = 0.0
    both: float = 0.0
    last: float = 0.0
    none: float = 0.0

    def drawn(self, value: float) -> Given:
        """The choice for a uniformly distributed `value` in [0, 1)."""
        total = 0.0
        for given in self.used:
            total += getattr(self, given)
            if value < total:
                return given
        return self.used[-1]  # the sum of the shares may be rounded to a little less than 1

    @property
    def used(self) -> tuple[Given, ...]:
        """The choices whose share is not 0."""
        return tuple(given for given in get_args(Given) if getattr(self, given))

    @property
    def most_frequent(self) -> Given:
        """The choice with the largest share; of equal ones the first in `used`."""
        return max(self.used, key=lambda given: getattr(self, given))


def default_shares(variant: Variant) -> ConditionShares:
    """How often samples are given which frames unless a run says so."""
    first, both = variant.first_frame_share, variant.both_frames_share
    return ConditionShares(first=first, both=both, none=1 - (first + both))


def given_by(*, first: bool, last: bool) -> Given:
    """The choice that gives the first and the last frame or not."""
    if first:
        return "both" if last else "first"
    return "last" if last else "none"


def given_frames(given: Given, frames: int) -> Collection[int]:
    """Indices of the frames that a sample of `frames` frames is given."""
    return {"first": {0}, "both": {0, frames - 1}, "last": {frames - 1}, "none": set[int]()}[given]
