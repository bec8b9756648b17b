"""The benchmark of start-up times."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from figures import read_figure
from startup import BARE, LIMIT, TRAIN, Times, figure_of


def test_training_is_compared_with_the_bare_loop_of_the_same_turn() -> None:
    slow = {TRAIN: Times([9.0, 20.0, 10.0], [9.0] * 3), BARE: Times([9.0, 10.0, 5.0], [4.0] * 3)}
    figure = figure_of(slow, {"first step": [1.0, 2.0, 3.0]})
    (missed,) = figure.missed()
    assert missed.case == {"start": TRAIN} and missed.limit == LIMIT
    assert missed.median == 2  # of 1, 2 and 2
    assert [v.median for v in figure.values if v.case == {"start": "train: first step"}] == [2]
    equal = {TRAIN: slow[TRAIN], BARE: slow[TRAIN]}
    assert figure_of(equal, {}).missed() == []


@pytest.mark.long
def test_it_measures_every_command_and_stage(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "startup.py"
    file = tmp_path / "startup.json"
    # A missed limit, which one repeat may well have on a busy machine, is status 1 too.
    command = [sys.executable, str(script), "--repeats", "1", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert file.exists(), done.stderr
    cpu = {v.case["start"]: v.median for v in read_figure(file).values if v.measure == "CPU time"}
    stages = {name: seconds for name, seconds in cpu.items() if str(name).startswith("train: ")}
    assert len(stages) == 9 and len(cpu) == 16
    # The stages are those of the whole: what is between them is little.
    assert sum(stages.values()) == pytest.approx(cpu[TRAIN], rel=0.4)
    assert cpu["onewan --version"] < cpu["onewan plan"] < cpu[TRAIN]
