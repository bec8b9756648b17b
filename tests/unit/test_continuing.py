"""What is said before a run is continued to more steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from onewan.config.continuing import continuation, overrides_for
from onewan.config.load import load_run
from onewan.config.schema import ResolvedRun
from onewan.errors import OnewanError


@pytest.fixture
def run_of(tmp_path: Path):
    (tmp_path / "model").mkdir()
    text = f"model: {{path: {(tmp_path / 'model').as_posix()}, variant: t2v-a14b}}\n"
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")

    def build(*overrides: str) -> ResolvedRun:
        return load_run(path, overrides)

    return build


def test_a_constant_learning_rate_makes_it_exact(run_of) -> None:
    found = continuation(run_of("train.steps=100"), 100, 300)
    assert (found.overrides, found.inexact) == (("train.steps=300",), ())
    assert found.options == ("--resume",)


def test_a_schedule_over_all_steps_is_named_with_the_rates_before_and_after(run_of) -> None:
    run = run_of("train.steps=100", "train.schedule=linear", "model.experts=high")
    found = continuation(run, 100, 200)
    assert found.options == ("--resume", "--allow-change")
    (sentence,) = found.inexact
    assert "follows the schedule linear" in sentence
    assert "from 1 % to 50 % of its full value" in sentence
    cooldown = run_of("train.steps=100", "train.cooldown_steps=10")
    (sentence,) = continuation(cooldown, 100, 200).inexact
    assert "has a cooldown at the end" in sentence
    assert "from 10 % to 100 % of its full value of the high expert" in sentence


def test_steps_that_each_expert_was_given_grow_alike(run_of) -> None:
    run = run_of(
        "per_expert.high.steps=30", "per_expert.low.steps=10", "train.switch_expert_every=1"
    )
    found = continuation(run, 40, 80)
    assert found.overrides == (
        "train.steps=80",
        "per_expert.high.steps=60",
        "per_expert.low.steps=20",
    )
    assert found.inexact == ()
    assert run_of("train.switch_expert_every=1", *found.overrides).train.steps == 80
    (sentence,) = continuation(run, 40, 41).inexact
    assert "trained them in another order" in sentence


def test_there_is_nothing_to_continue_to(run_of) -> None:
    with pytest.raises(OnewanError, match="must be more than 100, which are done already, got 100"):
        continuation(run_of("train.steps=100"), 100, 100)


def test_other_settings_are_given_as_overrides_that_lead_to_them(run_of) -> None:
    old = run_of("train.steps=100")
    changes = ("train.steps=200", "train.ema={decay: 0.5}", "sample.negative_prompt=a, b: c")
    new = run_of(*changes, "video_data.sources.0={path: clips, repeats: 3}")
    overrides = overrides_for(old, new)
    names = [override.partition("=")[0] for override in overrides]
    assert "video_data.sources" in names  # a list as a whole
    assert run_of("train.steps=100", *overrides) == new
    assert overrides_for(new, new) == []
