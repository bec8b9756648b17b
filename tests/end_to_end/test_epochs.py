"""`train.epochs`: each expert goes through all clips so often; the steps follow from the clips."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
from support.runs import RunFile, layout_of, recorder

from onewan.cli.plan import plan_of
from onewan.config.load import load_run
from onewan.config.schema import ResolvedRun
from onewan.data.buckets import expected_buckets
from onewan.errors import CheckpointError, ConfigError
from onewan.train.setup import WanModelSetup
from onewan.train.trainer import WanTrainer


def seen(config: ResolvedRun) -> dict[str, set[int]]:
    """How often each expert of a run has each of its clips; one number if all are alike."""
    run = WanModelSetup(config).build()
    found: dict[str, Counter[str]] = {name: Counter() for name in run.state.experts}
    steps = run.loader.steps(0, run.config.train.steps, run.schedule.expert_at)
    for step in steps:
        found[step.expert].update(name for batch in step.batches for name in batch.names)
    clips = {clip.name for clip in run.dataset.clips}
    assert all(counts.keys() == clips for counts in found.values())
    return {name: set(counts.values()) for name, counts in found.items()}


def notes(events: Iterable[dict[str, Any]]) -> list[str]:
    return [event["text"] for event in events if event["event"] == "note"]


@pytest.mark.parametrize(
    ("variant", "train", "expected"),
    [
        ("t2v-a14b", "epochs: 3", {"high": {3}, "low": {3}}),
        ("t2v-a14b", "epochs: 2, batch_size: 3", {"high": {2}, "low": {2}}),
        # Steps are whole, so that the last one may begin another epoch.
        ("t2v-a14b", "epochs: 1, accumulation: 100", {"high": set(), "low": set()}),
        ("ti2v-5b", "epochs: 2", {"single": {2}}),
    ],
)
def test_each_expert_sees_each_clip_once_per_epoch(
    run_file: RunFile, variant: str, train: str, expected: dict[str, set[int]]
) -> None:
    found = seen(run_file(variant, f"train={{{train}}}"))
    if "accumulation" in train:
        assert all(min(counts) >= 1 and max(counts) > 1 for counts in found.values())
        assert found.keys() == expected.keys()
    else:
        assert found == expected


def test_repeats_count_within_an_epoch(run_file: RunFile) -> None:
    config = run_file("ti2v-5b", "train={epochs: 2}", "video_data.sources.0.repeats=3")
    assert seen(config) == {"single": {6}}


def test_the_run_says_how_many_steps_its_epochs_are_and_goes_on_to_more(run_file: RunFile) -> None:
    events: list[dict[str, Any]] = []
    config = run_file("t2v-a14b", "train={epochs: 1, batch_size: 4, switch_expert_every: 1}")
    WanTrainer(config, listen=recorder(events)).fit()
    each = expected_buckets(config).batches_per_epoch["high"]
    clips = next(event["clips"] for event in events if event["event"] == "data")
    assert notes(events)[0] == (
        f"1 epoch of {clips} clips: {2 * each} steps, {each} for each expert"
    )
    assert next(event["steps"] for event in events if event["event"] == "data") == 2 * each
    assert sum(event["event"] == "step" for event in events) == 2 * each

    # The folder has the steps; with the epochs, as with the steps, the same run is complete.
    folder = layout_of(config).root
    kept = load_run(folder)
    assert (kept.train.epochs, kept.train.steps) == (None, 2 * each)
    for again in (config, kept):
        events.clear()
        WanTrainer(again, listen=recorder(events), resume=True).fit()
        assert not any(event["event"] == "step" for event in events)

    events.clear()
    WanTrainer(load_run(folder, ["train.epochs=2"]), listen=recorder(events), resume=True).fit()
    assert sum(event["event"] == "step" for event in events) == 2 * each
    assert any("train.steps: was" in note for note in notes(events))


def test_more_epochs_that_would_have_trained_other_experts_need_permission(
    run_file: RunFile,
) -> None:
    # One expert's period of ten steps is cut short by the end of the run.
    config = run_file("t2v-a14b", "train={epochs: 1, batch_size: 4, switch_expert_every: 10}")
    WanTrainer(config).fit()
    longer = load_run(layout_of(config).root, ["train.epochs=5"])
    with pytest.raises(CheckpointError, match=r"per_expert\.high\.steps: was"):
        WanTrainer(longer, resume=True).fit()


def test_steps_and_epochs_exclude_each_other(run_file: RunFile) -> None:
    for override in ("train={epochs: 2, steps: 5}", "train={steps: 9, epochs: 2}"):
        with pytest.raises(ConfigError, match=r"train\.steps: has no effect, since train\.epochs"):
            run_file("t2v-a14b", override)
    with pytest.raises(ConfigError, match=r"per_expert\.high\.steps: has no effect, since"):
        run_file("t2v-a14b", "train={epochs: 2}", "per_expert={high: {steps: 3}, low: {steps: 4}}")


def test_a_warmup_longer_than_the_epochs_is_refused_before_encoding(run_file: RunFile) -> None:
    config = run_file("t2v-a14b", "train={epochs: 1, warmup_steps: 500}", "video_data.cache=false")
    with pytest.raises(ConfigError, match=r"train\.warmup_steps: must be less than the \d+ steps"):
        WanModelSetup(config).build()


def test_the_plan_counts_the_steps_of_epochs(run_file: RunFile) -> None:
    config = run_file("t2v-a14b", "train={epochs: 3, batch_size: 2}")
    each = WanModelSetup(config).build().loader.batches_per_epoch["high"]
    assert plan_of(config, 10**11, 10**11).run_time.steps == 2 * 3 * each
