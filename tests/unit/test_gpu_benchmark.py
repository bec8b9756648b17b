"""`benchmarks/gpu.py`, small, on the simulated device: every kind of case runs, and the table says
what has not run on a real one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import simulated_gpu  # registers the device
from figures import Figure, read_figure
from gpu import main
from gpu_table import COLUMNS, SIZES, is_real, table

pytestmark = pytest.mark.long

assert simulated_gpu


@pytest.fixture(scope="module")
def figure(tmp_path_factory: pytest.TempPathFactory) -> Figure:
    file = tmp_path_factory.mktemp("result") / "sim.json"
    arguments = ["--small", "--device", "sim", "--variant", "i2v-a14b", "--steps", "1"]
    assert main([*arguments, "--json", str(file)]) == 0
    return read_figure(file)


def test_each_kind_of_case_is_measured(figure: Figure) -> None:
    assert not is_real(figure)
    kinds = {value.case["settings"] for value in figure.values}
    assert kinds == {title for title, _ in COLUMNS}
    for kind in kinds:
        found = {v.measure: v for v in figure.values if v.case["settings"] == kind}
        assert not any(value.reason for value in found.values()), found
        seconds, peak = found["duration of a step"], found["device peak"]
        assert seconds.median > 0 and seconds.expected and seconds.expected > 0
        assert found["tokens per second"].median > 0
        assert found["MFU"].median > 0
        assert peak.median > 1e-3
        bare = str(kind).startswith("bare")
        assert (peak.expected is None) == (seconds.ratio is None) == bare


def test_the_table_says_what_has_not_run_on_a_real_device(figure: Figure) -> None:
    size = SIZES[0]
    value = next(v for v in figure.values if v.case["settings"] == "one, streamed full")
    real = replace(
        figure,
        name="gpu_on_a_card",
        machine=replace(figure.machine, device="A card", device_type="cuda"),
        values=(replace(value, case=value.case | {"size": size}),),
    )
    assert is_real(real)
    lines = table([real]).splitlines()
    row = next(line for line in lines if "i2v-a14b" in line and size in line)
    assert row.startswith("| A card |")
    assert row.count("not run") == len(COLUMNS) - 1
    assert f"{value.median:.2f} s" in row
    nothing = table([])
    assert " s," not in nothing
    assert "no real device" in nothing
