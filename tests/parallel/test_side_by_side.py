"""Experts that are trained at the same time, each by a process of its own, give the run of one
process bit for bit: weights, optimizers, averages, losses, validation, best weights and exports."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.equal_runs import Trainer, assert_equal, notes, settings_of
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
