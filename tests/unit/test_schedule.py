"""The expert schedule and learning-rate schedules."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from diffusers import optimization as diffusers_schedules
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_wsd_schedule

from onewan.arithmetic.expert_schedule import ExpertSchedule, expert_schedule
from onewan.config.objective import UniformTimesteps
from onewan.config.optimizer import (
    ConstantSchedule,
    CosineRestartsSchedule,
    CosineSchedule,
    LinearSchedule,
    PolynomialSchedule,
    RexSchedule,
    Schedule,
)
from onewan.config.schema import TrainSection
from onewan.variants import VARIANTS

SCHEDULES: list[Schedule] = [
    ConstantSchedule(),
    LinearSchedule(),
    CosineSchedule(),
    CosineRestartsSchedule(),
    RexSchedule(),
    PolynomialSchedule(),
]


@given(
    share=st.fractions(min_value=0, max_value=1, max_denominator=50),
    period=st.integers(1, 12),
    steps=st.integers(1, 400),
)
def test_step_counts_agree_with_experts(share: Fraction, period: int, steps: int) -> None:
    schedule = ExpertSchedule(experts=("high", "low"), share=share, period=period)
    counts = {"high": 0, "low": 0}
    for step in range(steps):
        expert, before = schedule.expert_at(step)
        assert before == counts[expert] == schedule.steps_before(step, expert)
        assert schedule.expert_at(step - step % period)[0] == expert  # the same in a whole period
        counts[expert] += 1
        # Exact over each block, but for the rounding up to a whole one.
        if (step + 1) % period == 0:
            blocks = (step + 1) // period
            assert counts["high"] == -(-blocks * share // 1) * period


@given(
    high=st.integers(1, 200),
    low=st.integers(1, 200),
    period=st.integers(1, 60),
)
def test_given_step_counts_are_met_exactly(high: int, low: int, period: int) -> None:
    experts = VARIANTS["t2v-a14b"].experts
    density = UniformTimesteps().density(12.0)
    schedule = expert_schedule(experts, "equal", period, density, (high, low))
    free = ExpertSchedule(experts=("high", "low"), share=Fraction(high, high + low), period=period)
    counts = {"high": 0, "low": 0}
    for step in range(high + low):
        expert, before = schedule.expert_at(step)
        assert before == counts[expert] == schedule.steps_before(step, expert)
        if counts["high"] < high and counts["low"] < low:
            assert schedule.expert_at(step) == free.expert_at(step)  # until one budget is spent
        counts[expert] += 1
    assert counts == {"high": high, "low": low}
    for name in ("high", "low"):
        assert schedule.steps_before(high + low, name) == counts[name]


@given(
    share=st.fractions(min_value=0, max_value=1, max_denominator=20),
    step_counts=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    period=st.integers(1, 20),
)
def test_step_counts_are_met_under_any_share(
    share: Fraction, step_counts: tuple[int, int], period: int
) -> None:
    schedule = ExpertSchedule(
        experts=("high", "low"), share=share, period=period, step_counts=step_counts
    )
    experts = [schedule.expert_at(step)[0] for step in range(sum(step_counts))]
    assert (experts.count("high"), experts.count("low")) == step_counts


def test_equal_share_alternates_in_blocks_and_starts_high() -> None:
    schedule = ExpertSchedule(experts=("high", "low"), share=Fraction(1, 2), period=3)
    experts = [schedule.expert_at(step)[0] for step in range(12)]
    assert experts == ["high"] * 3 + ["low"] * 3 + ["high"] * 3 + ["low"] * 3


@pytest.mark.parametrize(
    ("share", "period", "due", "spans"),
    [
        (Fraction(1, 2), 2, (), [4, 8, 10]),
        (Fraction(1, 2), 2, (3, 8), [3, 6, 8, 10]),  # the rest of a block, and the next one
        (Fraction(1, 4), 1, (), [4, 8, 10]),
        (Fraction(1, 2), 100, (5,), [5, 10]),  # one expert alone, while the other one waits
    ],
)
def test_experts_that_train_at_the_same_time_meet_after_a_block_of_each(
    share: Fraction, period: int, due: tuple[int, ...], spans: list[int]
) -> None:
    schedule = ExpertSchedule(experts=("high", "low"), share=share, period=period)
    ends = [0]
    while ends[-1] < 10:
        span = schedule.span(ends[-1], 10, due.__contains__)
        assert span.start == ends[-1]
        ends.append(span.stop)
    assert ends[1:] == spans


def test_the_share_of_the_run_file_becomes_a_fraction() -> None:
    variant = VARIANTS["t2v-a14b"]
    density = UniformTimesteps().density(12.0)
    mass = expert_schedule(variant.experts, "density", 1, density)
    assert float(mass.share) == pytest.approx(0.6316, abs=1e-4)
    assert expert_schedule(variant.experts, "equal", 1, density).share == Fraction(1, 2)
    assert expert_schedule(variant.experts, 0.3, 1, density).share == Fraction(3, 10)
    alone = expert_schedule(variant.experts[1:], "equal", 1, density)
    assert {alone.expert_at(step) for step in range(3)} == {("low", 0), ("low", 1), ("low", 2)}


def factors(schedule: Schedule, total: int, warmup: int = 0, cooldown: int = 0) -> list[float]:
    return [lr_factor(schedule, step, total, warmup, cooldown) for step in range(total)]


def lr_factor(schedule: Schedule, step: int, total: int, warmup: int, cooldown: int) -> float:
    train = TrainSection(schedule=schedule, warmup_steps=warmup, cooldown_steps=cooldown)
    return train.lr_schedule().factor(step, total)


def test_warm_up_does_not_start_at_zero() -> None:
    for schedule in SCHEDULES:
        assert factors(schedule, 10, warmup=3)[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors(LinearSchedule(), 4) == [1.0, 0.75, 0.5, 0.25]
    assert factors(LinearSchedule(end_factor=0.5), 4) == [1.0, 0.875, 0.75, 0.625]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.kind)
def test_decays_stay_above_zero_and_reach_their_end_factor(schedule: Schedule) -> None:
    assert all(0 < f <= 1 for f in factors(schedule, 97, warmup=5))
    assert lr_factor(schedule, 0, 10, 0, 0) == 1
    assert lr_factor(schedule, 10, 10, 0, 0) == float(schedule.kind == "constant")
    if not isinstance(schedule, ConstantSchedule):
        raised = schedule.model_copy(update={"end_factor": 0.2})
        for plain, above in zip(factors(schedule, 30), factors(raised, 30), strict=True):
            assert above == pytest.approx(0.2 + 0.8 * plain)
        assert lr_factor(raised, 30, 30, 0, 0) == pytest.approx(0.2)


def test_cooldown_falls_to_zero_from_the_end_of_the_decay() -> None:
    assert factors(ConstantSchedule(), 10, 2, 4)[2:] == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    cosine = factors(CosineSchedule(end_factor=0.4), 10, 2, 4)
    assert cosine[2] == 1
    assert cosine[4] == pytest.approx(0.7)  # half of the four steps between the ramps
    assert cosine[6:] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert lr_factor(ConstantSchedule(), 10, 10, 2, 4) == 0


def reference(build, total: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = build(optimizer)
    rates = []
    for _ in range(total):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


def test_decays_match_those_of_diffusers() -> None:
    """After warm-up, whose first step diffusers wastes at a rate of 0."""
    warmup, total = 6, 66
    library = {
        LinearSchedule(): lambda o: diffusers_schedules.get_linear_schedule_with_warmup(
            o, warmup, total
        ),
        CosineSchedule(): lambda o: diffusers_schedules.get_cosine_schedule_with_warmup(
            o, warmup, total
        ),
        CosineRestartsSchedule(cycles=4): lambda o: (
            diffusers_schedules.get_cosine_with_hard_restarts_schedule_with_warmup(
                o, warmup, total, num_cycles=4
            )
        ),
        PolynomialSchedule(power=3.0, end_factor=0.1): lambda o: (
            diffusers_schedules.get_polynomial_decay_schedule_with_warmup(
                o, warmup, total, lr_end=0.1, power=3.0
            )
        ),
    }
    for schedule, build in library.items():
        ours, theirs = factors(schedule, total, warmup), reference(build, total)
        assert ours[warmup:] == pytest.approx(theirs[warmup:]), schedule.kind


def test_the_cooldown_matches_that_of_transformers() -> None:
    theirs = reference(
        lambda o: get_wsd_schedule(
            o, num_warmup_steps=5, num_stable_steps=15, num_decay_steps=10, decay_type="linear"
        ),
        30,
    )
    assert factors(ConstantSchedule(), 30, 5, 10)[5:] == pytest.approx(theirs[5:])


def test_rex_follows_the_papers_formula() -> None:
    """The paper's table: (1 - p) / (1/2 + (1 - p)/2)."""
    assert factors(RexSchedule(), 4) == pytest.approx([1, 0.75 / 0.875, 0.5 / 0.75, 0.25 / 0.625])


def test_cosine_restarts_begin_at_exact_steps() -> None:
    """49 cycles of 7 steps: in floating point one of them would be missed by a rounding."""
    rates = factors(CosineRestartsSchedule(cycles=49), 343)
    assert [step for step, rate in enumerate(rates) if rate == 1] == list(range(0, 343, 7))
