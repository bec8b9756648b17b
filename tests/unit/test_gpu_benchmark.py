"""`benchmarks/gpu.py`, small, on the simulated device: every kind of case runs, and the table says
what has not run on a real one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import simulated_gpu  # registers the device
import torch
from figures import Figure, on_its_device, read_figure
from gpu import main, parser, transformer_size
from gpu_model import prepare_model
from gpu_table import COLUMNS, SIZES, is_real, table
from safetensors.torch import load_file

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


def test_a_model_is_written_once_and_its_experts_share_a_file(tmp_path: Path) -> None:
    options = parser().parse_args(["--width", "128", "--blocks", "1"])
    size = transformer_size("t2v-a14b", options)
    files = [
        tmp_path / "model" / expert / "diffusion_pytorch_model.safetensors"
        for expert in ("transformer", "transformer_2")
    ]
    prepare_model(tmp_path / "model", "t2v-a14b", size, torch.device("cpu"))
    written = files[0].stat()
    assert files[1].stat().st_ino == written.st_ino
    weights = load_file(files[0])
    matrices = [weight for weight in weights.values() if weight.dim() > 1]
    assert all(0.015 < float(m.float().std()) < 0.025 for m in matrices)
    assert not torch.equal(matrices[-1].flatten()[:9], matrices[-2].flatten()[:9])
    prepare_model(tmp_path / "model", "t2v-a14b", size, torch.device("cpu"))
    assert files[0].stat().st_mtime_ns == written.st_mtime_ns
    prepare_model(tmp_path / "model", "t2v-a14b", replace(size, layers=2), torch.device("cpu"))
    assert files[0].stat().st_size > written.st_size


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
    # Results of another command on the same card are in the same rows, and the newest of each case.
    newer = replace(value, case=real.values[0].case, repeats=(12.0,))
    other = replace(newer, case={**newer.case, "settings": "both, LoRA"})
    later = replace(
        on_its_device(replace(real, name="gpu"), "both experts"),
        date="2999",
        values=(newer, other),
    )
    assert later.name == "gpu_on_a_card_both_experts" and is_real(later)
    (row,) = (r for r in table([later, real]).splitlines() if "i2v-a14b" in r and size in r)
    assert row.count("not run") == len(COLUMNS) - 2 and row.count("12.00 s") == 2
    nothing = table([])
    assert " s," not in nothing
    assert "no real device" in nothing
