"""A run that is saved by one, two or four processes is continued by any other number of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.equal_runs import Trainer, assert_equal, settings_of
from support.runs import RunFile, layout_of

pytestmark = pytest.mark.long

COUNTS = (1, 2, 4)
FINE_TUNE = [
    *("method={kind: fine_tune, weights: stochastic}", "model.dtype=bfloat16"),
    "parallel.weights=replicated",
]


@pytest.mark.parametrize("method", ["lora", "fine_tune"])
def test_any_number_of_processes_continues_what_another_has_saved(
    run_file: RunFile, tmp_path: Path, workshop: Path, method: str
) -> None:
    """Two processes train experts side by side, four share each step's clips besides: its batches
    are whole ones, and a sum of two has the same bits in either order."""
    settings = [
        *settings_of(method, workshop),
        *(FINE_TUNE if method == "fine_tune" else []),
        "train.accumulation=2",
        "train.steps=6",
        "train.keep_last=1",
        "validation.every=3",
    ]
    trainer = Trainer(run_file=run_file, folder=tmp_path, variant="t2v-a14b", settings=settings)
    whole = trainer.train("whole")
    for before in COUNTS:
        stopped = layout_of(trainer.train(f"from {before}", before, stop_after=3))
        assert stopped.saved_steps()[-1] == 3
        for after in COUNTS:
            name = f"{before} to {after}"
            shutil.copytree(tmp_path / f"from {before}", tmp_path / name)
            continued = trainer.train(name, after, resume=True)
            assert_equal(whole, continued)
