"""The smallest card for a run, and the host memory that the run needs with it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from onewan.config.load import load_run
from onewan.memory.plan import Bucket, machine_of, make_plan, smallest_machine
from onewan.memory.plan.smallest import CARD_GIGABYTES

GB = 10**9


def planner(folder: Path, *overrides: str):
    """Makes the plan of a run with clips of 81 frames at 832x480 for a machine."""
    file = folder / "run.yaml"
    file.write_text("model: {path: Owner/Model, variant: t2v-a14b}\n", encoding="utf-8")
    config = load_run(file, ["validation.clips=0", *overrides])
    return partial(make_plan, config, [Bucket(frames=81, width=832, height=480)], advice=False)


@pytest.mark.parametrize("weights", ["bf16", "nf4"])
@pytest.mark.parametrize("ram", [16 * GB, 512 * GB])
def test_the_run_fits_there_and_on_no_smaller_card(tmp_path: Path, weights: str, ram: int) -> None:
    make = planner(tmp_path, f"memory.weights={weights}")
    found = smallest_machine(make, ram)
    assert found is not None
    assert make(found).fits
    before = CARD_GIGABYTES[CARD_GIGABYTES.index(found.vram // GB) - 1]
    assert not make(machine_of("", before * GB, 512 * GB)).fits
    if found.ram > ram:
        # No more host memory is asked for than is needed.
        assert not make(machine_of("", found.vram, found.ram - 2 * GB)).fits
    else:
        assert found.ram == ram


def test_a_run_that_no_card_holds(tmp_path: Path) -> None:
    make = planner(tmp_path, "method.kind=fine_tune", "memory.resident_blocks=40")
    assert smallest_machine(make, 512 * GB) is None
