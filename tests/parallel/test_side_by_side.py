"""Experts that are trained at the same time, each by a process of its own, give the run of one
process bit for bit: weights, optimizers, averages, losses, validation, best weights and exports."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.equal_runs import Trainer, assert_equal, events, notes, settings_of
from support.runs import METHODS, RunFile

pytestmark = pytest.mark.long


@pytest.mark.parametrize("method", [method for method in METHODS if method != "embedding"])
def test_a_method_side_by_side_equals_one_process(
    run_file: RunFile, tmp_path: Path, workshop: Path, method: str
) -> None:
    trainer = Trainer(
        run_file=run_file,
        folder=tmp_path,
        variant="t2v-a14b",
        settings=settings_of(method, workshop),
    )
    one, two = trainer.train("one"), trainer.train("two", 2)
    assert "2 processes, both experts trained at the same time" in notes(two)
    assert_equal(one, two)


@pytest.mark.parametrize("processes", [2, 4])
def test_settings_that_change_while_it_trains_come_into_force_on_all(
    run_file: RunFile, tmp_path: Path, processes: int
) -> None:
    """Of four processes, two share the steps of each expert."""
    settings = [
        "wan_config.max_frames=5",
        "train.switch_expert_every=2",
        "train.high_expert_share=0.4",
        "train.accumulation=2",
        "train.steps=10",
        "train.schedule=cosine",
        "train.ema={decay: 0.9}",
        "validation={clips: 2, every: 5}",
        f"video_data.cache_dir={(tmp_path / 'own cache').as_posix()}",
    ]
    trainer = Trainer(run_file=run_file, folder=tmp_path, variant="i2v-a14b", settings=settings)
    change = (5, {"optimizer.lr": 0.02, "train.ema.decay": 0.5})
    several = trainer.train("several", processes, change_after=change)
    one = trainer.train("one", change_after=change)
    assert len(events(one, "settings")) == 2
    assert_equal(one, several)


def test_one_expert_is_trained_in_parts(run_file: RunFile, tmp_path: Path) -> None:
    settings = ["model.experts=low", "train.accumulation=2", "wan_config.max_frames=5"]
    trainer = Trainer(run_file=run_file, folder=tmp_path, variant="t2v-a14b", settings=settings)
    one, two = trainer.train("one"), trainer.train("two", 2)
    assert "2 processes, each with a part of every step's clips" in notes(two)
    assert_equal(one, two)
