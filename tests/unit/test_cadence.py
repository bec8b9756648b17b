"""When a run validates, saves, exports and samples."""

from __future__ import annotations

from dataclasses import replace

import pytest

from onewan.train.cadence import Cadence, Due

NOTHING = Due(validate=False, save=False, export=False, sample=False)
EVERYTHING = Due(validate=True, save=True, export=True, sample=True)
CADENCE = Cadence(
    steps=10,
    save_every=4,
    save_minutes=None,
    validates=True,
    validate_every=3,
    videos=1,
    sample_every=5,
    sample_at_start=False,
)


def test_each_interval_counts_its_own_steps() -> None:
    due = {step: CADENCE.after(step, seconds_since_save=1e9) for step in range(1, 10)}
    assert [step for step, what in due.items() if what.validate] == [3, 6, 9]
    assert [step for step, what in due.items() if what.save] == [4, 8]
    assert [step for step, what in due.items() if what.export] == [4, 8]
    assert [step for step, what in due.items() if what.sample] == [5]


@pytest.mark.parametrize("save_every", [1, 4, 100])
def test_everything_is_due_at_the_last_step(save_every: int) -> None:
    only_at_end = replace(CADENCE, save_every=save_every, validate_every=0, sample_every=0)
    assert only_at_end.after(10, seconds_since_save=0) == EVERYTHING
    assert only_at_end.after(9, seconds_since_save=0).validate is False
    assert only_at_end.after(9, seconds_since_save=0).sample is False


def test_without_validation_clips_or_prompts_neither_is_ever_due() -> None:
    bare = replace(CADENCE, validates=False, videos=0, sample_at_start=True)
    for step in range(11):
        due = bare.after(step, seconds_since_save=0, sample_requested=True)
        assert not due.validate and not due.sample


def test_minutes_since_the_last_save_make_a_save_due_without_an_export() -> None:
    timed = replace(CADENCE, save_minutes=2)
    assert timed.after(1, seconds_since_save=119) == NOTHING
    assert timed.after(1, seconds_since_save=120) == replace(NOTHING, save=True)


def test_a_requested_save_is_exported_too() -> None:
    due = CADENCE.after(1, seconds_since_save=0, save_requested=True)
    assert due == replace(NOTHING, save=True, export=True)


def test_requested_samples_are_due_at_any_step() -> None:
    for step in (1, 5):
        assert CADENCE.after(step, seconds_since_save=0, sample_requested=True).sample


@pytest.mark.parametrize("at_start", [False, True])
def test_before_the_first_step_the_base_is_validated_and_sampled_if_asked(at_start: bool) -> None:
    due = replace(CADENCE, sample_at_start=at_start).at(0)
    assert due == replace(NOTHING, validate=True, sample=at_start)


def test_full_samples_have_an_interval_of_their_own() -> None:
    both = replace(CADENCE, full_sample_every=4, sample_at_start=True)
    due = [step for step in range(11) if both.at(step).full_sample]
    assert due == [0, 4, 8, 10]
    assert [step for step in range(11) if both.at(step).sample] == [0, 5, 10]
    assert not both.after(3, seconds_since_save=0, sample_requested=True).full_sample
    last = replace(both, full_sample_every=0, sample_at_start=False)
    assert [step for step in range(11) if last.at(step).full_sample] == [10]
    without = replace(both, videos=0)
    assert not any(without.at(step).full_sample for step in range(11))


def test_a_resumed_run_owes_what_its_step_makes_due_but_no_timed_save() -> None:
    timed = replace(CADENCE, save_minutes=1e-9)
    assert timed.at(4) == replace(NOTHING, save=True, export=True)
    assert timed.at(5) == replace(NOTHING, sample=True)
