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
    "orjson",  # reads events where the page is installed, which needs it
}
"""Packages that a LoRA run imports beside those which diffusers, PEFT and transformers import."""

UNUSED = ("wandb", "tensorflow", "tensorboard", "scenedetect", "pyarrow", "aiohttp", "pandas")
"""Packages that a run imports where its settings need them."""


def modules_after(code: str) -> set[str]:
    """The modules that a new process has imported after `code`."""
    code += "\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_what_configures_plans_and_looks_imports_no_torch(
    run_file: RunFile, tmp_path: Path, workshop: Path
) -> None:
    """Nor do commands that load a model, before they know that the run file is right."""
    right, wrong = tmp_path / "resolved.yaml", tmp_path / "wrong.yaml"
    right.write_text(dump_run(run_file("t2v-a14b")), encoding="utf-8")
    wrong.write_text("model: {path: x, variant: t2v-a14b, expert: low}\n", encoding="utf-8")
    calls = [
        (["init", "--vram", "24GB", "--ram", "64GB", "--purpose", "motion"], 0),
        (["schema"], 0),
        (["plan", str(right), "--vram", "24GB", "--ram", "128GB"], 0),
        (["inspect", str(workshop / "t2v-a14b")], 0),
        (["cache", str(wrong)], 1),
        (["train", str(wrong)], 1),
    ]
    modules = modules_after(
        f"from onewan.cli import main\nfor words, status in {calls!r}: assert main(words) == status"
    )
    assert "onewan.memory.plan.make" in modules
    packages = {module.partition(".")[0] for module in modules}
    assert not {"torch", "diffusers", "transformers", "peft", "scipy", *UNUSED} & packages


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
    assert not packages & set(UNUSED)
