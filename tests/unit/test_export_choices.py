"""Which weights of a run can be exported, and which files are there."""

from __future__ import annotations

from pathlib import Path

from made_runs import MadeRun, write_run
from support.interrupted import locking
from support.trainers import begin

from onewan.runs.export_choices import ADAPTER_FORMATS, NOW, ExportChoices


def test_the_weights_the_formats_and_the_newest_files_are_offered(tmp_path: Path) -> None:
    layout = write_run(tmp_path / "fox", MadeRun(steps=4, on_device=False, end="stopped"))
    for step in (1, 2, 3, 4):
        layout.weights(step, "_high_noise").write_bytes(b"x" * step)
    layout.weights("best", "_low_noise").write_bytes(b"xx")
    layout.state(2).mkdir()
    layout.state(4).mkdir()
    found = ExportChoices.of(layout)
    assert found.weights == {4: "of the state of step 4", 2: "of the state of step 2"}
    assert found.formats.keys() == ADAPTER_FORMATS.keys()
    assert found.formats["diffusers"] == "diffusers (diffusers)"
    assert found.own_format == "comfyui"
    assert [size for _, size in found.files] == [2, 3, 4, 2]
    assert found.files[-1][0].name == "fox_best_low_noise.safetensors"
    with locking(layout.lock):
        begin(layout)
        assert list(ExportChoices.of(layout).weights) == [NOW, 4, 2]
