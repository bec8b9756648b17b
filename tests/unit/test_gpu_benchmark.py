"""`benchmarks/gpu.py`, small, on the simulated device: every kind of case runs, and the table says
what has not run on a real one."""

from __future__ import annotations

import json
from typing import Any

import pytest
import simulated_gpu  # registers the device
from gpu import SIZES, main
from gpu_table import table

pytestmark = pytest.mark.long

assert simulated_gpu


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("result") / "sim.json"
    arguments = ["--small", "--device", "sim", "--variant", "i2v-a14b", "--steps", "1"]
    assert main([*arguments, "--json", str(file)]) == 0
    return json.loads(file.read_text(encoding="utf-8"))


def test_each_kind_of_case_is_measured(result: dict[str, Any]) -> None:
    assert result["is_real"] is False
    assert result["matrix_product_flops_per_second"] > 0
    kinds = {(c["loop"], c["experts"], c["placing"], c["method"]) for c in result["cases"]}
    assert len(kinds) == len(result["cases"]) == 10
    for case in result["cases"]:
        assert "failed" not in case, case
        assert case["tokens_per_second"] > 0
        assert case["mfu"] > 0
        assert case["seconds_of_flops"] > 0
        assert case["peak_bytes"] > 1_000_000
        assert (case["planned_bytes"] is None) == (case["loop"] == "bare")


def test_the_table_says_what_has_not_run_on_a_real_device(result: dict[str, Any]) -> None:
    real = {**result, "device": "A card", "cases": [dict(result["cases"][0], size=SIZES[0])]}
    lines = table([real], SIZES).splitlines()
    row = next(line for line in lines if "i2v-a14b" in line and SIZES[0] in line)
    assert row.count("not run") == 7
    assert f"{real['cases'][0]['seconds']:.2f} s" in row
    nothing = table([], SIZES)
    assert " s," not in nothing
    assert "no real device" in nothing
