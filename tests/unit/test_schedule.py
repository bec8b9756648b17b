"""Turns of the experts and the course of the learning rate."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onewan.train.objective import TimestepDensity
from onewan.train.schedule import ExpertSchedule, expert_schedule, lr_factor
from onewan.variants import VARIANTS


@given(
    share=st.fractions(min_value=0, max_value=1, max_denominator=50),
    block=st.integers(1, 12),
    steps=st.integers(1, 400),
)
def test_counts_are_those_of_the_turns(share: Fraction, block: int, steps: int) -> None:
    schedule = ExpertSchedule(experts=("high", "low"), share=share, block=block)
    counts = {"high": 0, "low": 0}
    for step in range(steps):
        expert, before = schedule.turn(step)
        assert before == counts[expert] == schedule.steps_before(step, expert)
        counts[expert] += 1
    # Never more than one block away from the exact share.
    assert abs(counts["high"] - share * steps) <= block


def test_equal_share_alternates_in_blocks_and_starts_high() -> None:
    schedule = ExpertSchedule(experts=("high", "low"), share=Fraction(1, 2), block=3)
    turns = [schedule.turn(step)[0] for step in range(12)]
    assert turns == ["high"] * 3 + ["low"] * 3 + ["high"] * 3 + ["low"] * 3


def test_share_from_the_run_file() -> None:
    variant = VARIANTS["t2v-a14b"]
    density = TimestepDensity(distribution="uniform", shift=12.0)
    mass = expert_schedule(variant.experts, "mass", 1, density)
    assert float(mass.share) == pytest.approx(0.6316, abs=1e-4)
    assert expert_schedule(variant.experts, "equal", 1, density).share == Fraction(1, 2)
    assert expert_schedule(variant.experts, 0.3, 1, density).share == Fraction(3, 10)
    alone = expert_schedule(variant.experts[1:], "equal", 1, density)
    assert {alone.turn(step) for step in range(3)} == {("low", 0), ("low", 1), ("low", 2)}


def test_learning_rate() -> None:
    assert [lr_factor("constant", s, 10, 3) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [lr_factor("linear", s, 4, 0) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert lr_factor("cosine", 5, 10, 0) == pytest.approx(0.5)
    assert lr_factor("cosine", 0, 10, 0) == 1.0
    assert all(
        lr_factor(k, s, 7, 2) > 0 for k in ("constant", "linear", "cosine") for s in range(7)
    )
