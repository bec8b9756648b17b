"""What commands import: only what they use, and torch only after the run file was found right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import RunFile

from onewan.config.load import dump_run

USED = {
    *("onewan", "av", "ruamel"),
    *("pydantic", "pydantic_core", "annotated_types", "typing_inspection"),
}
"""Packages that a LoRA run imports beside those which diffusers, PEFT and transformers import."""


def modules_after(code: str) -> set[str]:
    """The modules that a new process has imported after `code`."""
    code += "\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_what_is_wrong_in_a_run_file_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("model: {path: x, variant: t2v-a14b, expert: low}\n", encoding="utf-8")
    modules = modules_after(
        "from onewan.cli import main\n"
        f"for command in ('cache', 'train'): assert main([command, {str(run)!r}]) == 1\n"
    )
    assert "onewan.config.load" in modules
    assert not {"torch", "diffusers", "transformers", "peft"} & modules


@pytest.mark.long
def test_training_imports_no_package_that_it_does_not_use(
    run_file: RunFile, tmp_path: Path
) -> None:
    config = run_file("t2v-a14b", "train.steps=1")
    (tmp_path / "resolved.yaml").write_text(dump_run(config), encoding="utf-8")
    train = ["train", str(tmp_path / "resolved.yaml")]
    trained = modules_after(f"from onewan.cli import main\nassert main({train!r}) == 0")
    # These import what is installed, such as bitsandbytes; `onewan` can't change that.
    bare = modules_after(
        "from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel\n"
        "from transformers import UMT5EncoderModel\n"
        "import peft"
    )
    packages, from_bare = ({m.partition(".")[0] for m in each} for each in (trained, bare))
    assert {p for p in packages - from_bare - sys.stdlib_module_names if p[0] != "_"} <= USED
    # Nor parts of packages that a run without curves, sample videos and resuming does not need.
    for name in ("torch.utils.tensorboard", "torch._inductor.compile_fx", "torchao", "onewan.demo"):
        assert name in bare or name not in trained, name
    assert not {"wandb", "tensorflow", "tensorboard", "scenedetect", "pyarrow"} & packages
