"""`onewan export`: a saved state, exported without training, gives the files of its run."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors import safe_open
from support.runs import METHODS, RunFile, layout_of

from onewan.cli import main
from onewan.cli.steering_parsers import FORMATS
from onewan.config.fields import schema_fields
from onewan.formats.lora_files import read_adapter
from onewan.runs.layout import RunLayout
from onewan.train.trainer import WanTrainer


def contents(folder: Path) -> dict[str, tuple[dict[str, str], dict[str, torch.Tensor]]]:
    """Header and tensors of each file in `folder`; without the date and what depends on it."""
    found: dict[str, tuple[dict[str, str], dict[str, torch.Tensor]]] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            header = {k: v for k, v in (file.metadata() or {}).items() if "date" not in k}
            header = {k: v for k, v in header.items() if "hash" not in k}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        found[str(path.relative_to(folder))] = header, tensors
    return found


def assert_exported_again(layout: RunLayout, *options: str) -> None:
    """Export the newest state, and compare with what the trainer has exported."""
    trained = contents(layout.weights_dir)
    aside = layout.weights_dir.rename(layout.root / "aside")
    assert main(["export", str(layout.root), *options]) == 0
    exported = contents(layout.weights_dir)
    assert exported.keys() == trained.keys() and trained
    for name, (header, tensors) in trained.items():
        other_header, other = exported[name]
        assert header == other_header
        assert tensors.keys() == other.keys()
        for key, tensor in tensors.items():
            assert tensor.dtype == other[key].dtype and torch.equal(tensor, other[key]), key
    assert aside.is_dir()


@pytest.mark.parametrize(
    ("settings", "files"),
    [
        (["method={kind: lora, rank: 4}", "train.ema={}", "output.formats=[comfyui, kohya]"], 8),
        pytest.param(["method={kind: lora, rank: 4, init: pissa}"], 2, marks=pytest.mark.long),
        pytest.param(METHODS["dora"], 2, marks=pytest.mark.long),
        pytest.param(METHODS["loha"], 2, marks=pytest.mark.long),
        pytest.param(METHODS["lokr"], 2, marks=pytest.mark.long),
        pytest.param(METHODS["oft"], 2, marks=pytest.mark.long),
        pytest.param(METHODS["fine_tune"], 2, marks=pytest.mark.long),
        pytest.param(
            [*METHODS["fine_tune"], "output.formats=[diffusers]"], 2, marks=pytest.mark.long
        ),
        pytest.param(
            ["optimizer={name: adamw_schedule_free, lr: 0.01}"], 2, marks=pytest.mark.long
        ),
        pytest.param(METHODS["embedding"], 1, marks=pytest.mark.long),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_state_is_exported_as_its_run_has_exported_it(
    run_file: RunFile, workshop: Path, settings: list[str], files: int
) -> None:
    clips = f"video_data.sources.0.path={workshop / 'named clips'}"  # with the placeholder
    config = run_file("t2v-a14b", clips, "train.steps=4", *settings)
    WanTrainer(config).fit()
    layout = layout_of(config)
    assert len([*layout.weights_dir.iterdir()]) == files
    assert_exported_again(layout)


def test_a_state_is_exported_in_another_format_and_of_an_earlier_step(
    run_file: RunFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_file("ti2v-5b", "train.steps=2", "train.save_every=1")
    WanTrainer(config).fit()
    layout, out = layout_of(config), tmp_path / "out"
    command = ["export", str(layout.root), "--step", "1", "--out", str(out)]
    assert main([*command, "--format", "diffusers", "--dtype", "float16"]) == 0
    (file,) = out.iterdir()
    assert file.name == "run_000001_diffusers.safetensors"
    adapter = read_adapter(file)
    (trained,) = layout.exported()[1]
    assert adapter.modules.keys() == read_adapter(trained).modules.keys()
    assert {t.dtype for m in adapter.modules.values() for t in m.tensors.values()} == {
        torch.float16
    }
    capsys.readouterr()
    assert main([*command, "--format", "diffusers"]) == 0
    assert "is there already; --force writes it anew" in capsys.readouterr().out
    assert main(["export", str(layout.root), "--step", "5"]) == 1
    assert "no state of step 5; it has those of steps 1, 2" in capsys.readouterr().err


def test_the_formats_of_the_command_are_those_of_the_run_file() -> None:
    literal = get_args(schema_fields()["output.formats"].annotation)[0]
    assert get_args(literal) == FORMATS
