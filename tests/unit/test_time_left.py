"""The time that a run still takes, beside a simulated run whose time is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import pytest

from onewan.arithmetic.expert_schedule import ExpertSchedule
from onewan.memory.plan import RunTime
from onewan.train.cadence import Cadence
from onewan.train.time_left import TimeLeft, Work

CADENCE = Cadence(
    steps=97,
    save_every=20,
    save_minutes=None,
    validates=True,
    validate_every=10,
    videos=2,
    sample_every=30,
    sample_at_start=True,
    full_sample_every=50,
)
SCHEDULE = ExpertSchedule(experts=("high", "low"), share=Fraction(1, 3), period=5)
STEP = {"high": 1.0, "low": 4.0}
WORK: dict[Work, float] = {
    "validation": 10.0,
    "save": 3.0,
    "export": 2.0,
    "sample": 60.0,
    "full_sample": 200.0,
}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def simulated(cadence: Cadence, predicted: RunTime | None = None) -> list[tuple[float, float]]:
    """After each step the estimate and the time that the run then really took."""
    clock = Clock()
    left = TimeLeft(cadence, SCHEDULE, predicted, clock)
    assert left.after(0) is None

    def do(*due: Work) -> None:
        for work in due:
            with left.doing(work):
                clock.now += WORK[work]

    do("validation", "sample")
    estimates, times = list[float](), list[float]()
    for step in range(1, cadence.steps + 1):
        expert, _ = SCHEDULE.expert_at(step - 1)
        clock.now += STEP[expert]
        left.stepped(expert, STEP[expert])
        times.append(clock.now)
        found = left.after(step)
        assert found is not None
        estimates.append(found)
        due = cadence.at(step)
        works: Sequence[tuple[bool, Work]] = [
            (due.validate, "validation"),
            (due.save, "save"),
            (due.export, "export"),
            (due.sample, "sample"),
            (due.full_sample, "full_sample"),
        ]
        do(*(work for wanted, work in works if wanted))
    return [(found, clock.now - at) for found, at in zip(estimates, times, strict=True)]


def test_it_is_exact_once_everything_was_done_once() -> None:
    found = simulated(CADENCE)
    assert all(estimate == pytest.approx(real) for estimate, real in found[50:])
    # Before that, what was not measured yet is missing: the first saves, and videos in full.
    estimate, real = found[10]
    assert real - estimate == pytest.approx(5 * 5.0 + 2 * 200.0)


def test_the_plan_stands_for_what_was_not_done_yet() -> None:
    planned = RunTime(
        steps=97, step=1.25, samples=0, sample=15.0, full_samples=0, full_sample=50.0,
        validations=0, validation=5.0, expert_steps={},
    )  # fmt: skip
    # Steps take twice the time of the plan, so its other times are doubled too.
    estimate, real = simulated(CADENCE, planned)[10]
    assert real - estimate == pytest.approx(5 * 5.0)


def test_states_that_are_saved_by_time_count() -> None:
    found, _ = simulated(replace(CADENCE, save_minutes=0.5))[60]
    by_steps, _ = simulated(CADENCE)[60]
    saves = CADENCE.still_due(61).saves
    rest = by_steps - saves * WORK["save"]
    assert rest / 30 > saves
    assert found == pytest.approx(rest + rest / 30 * WORK["save"])


def test_what_is_still_due_is_what_each_step_says() -> None:
    for cadence in (CADENCE, replace(CADENCE, sample_every=0, save_every=7)):
        for step in range(1, cadence.steps + 1):
            each = [cadence.at(later) for later in range(step, cadence.steps + 1)]
            due = cadence.still_due(step)
            assert due.validations == sum(d.validate for d in each)
            assert due.saves == sum(d.save for d in each)
            assert due.samples == sum(d.sample for d in each)
            assert due.full_samples == sum(d.full_sample for d in each)
    nothing = CADENCE.still_due(CADENCE.steps + 1)
    assert nothing.saves == nothing.samples == 0
