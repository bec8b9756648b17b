"""Other models train in OneTrainer as without the add-on."""

from __future__ import annotations

import json
import shutil
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
from support.onetrainer_runs import Lab, config_of

TINY = Path(__file__).parents[1] / "support" / "write_tiny_hunyuan.py"


@pytest.fixture(scope="module")
def hunyuan(lab: Lab, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hunyuan") / "model"
    lab.run(str(TINY), str(folder))
    return folder


def config(folder: Path, model: Path, clips: Path) -> dict:
    plain = {"train": False, "weight_dtype": "FLOAT_32"}
    found = config_of(
        folder,
        model,
        clips,
        model_type="HUNYUAN_VIDEO",
        output_model_format="DIFFUSERS_LORA",
        layer_filter="transformer_block",
        text_encoder_2=plain,
        timestep_shift=1.0,
    )
    return {k: v for k, v in found.items() if not k.startswith("wan_") and k != "transformer_2"}


def test_hunyuan_video_trains_the_same(lab: Lab, real_checkout, hunyuan, clips, tmp_path):
    plain = tmp_path / "OneTrainer"
    subprocess.run(["git", "clone", "-q", str(real_checkout), str(plain)], check=True)
    with_it = lab.train(tmp_path / "with", config(tmp_path / "with", hunyuan, clips))
    with closing(Lab(plain, lab.python)) as other:
        without = other.train(tmp_path / "without", config(tmp_path / "without", hunyuan, clips))
    assert with_it.code == without.code == 0, with_it.log[-3000:] + without.log[-3000:]
    assert len(with_it.losses) == 6 and with_it.losses == without.losses


def test_without_onewan_other_models_still_train(lab: Lab, hunyuan, clips, tmp_path):
    """The add-on says in one line that it is off, and what to do."""
    folder = tmp_path / "off"
    blocked = tmp_path / "blocked" / "onewan"
    blocked.mkdir(parents=True)
    text = "raise ModuleNotFoundError(\"No module named 'onewan'\", name='onewan')\n"
    (blocked / "__init__.py").write_text(text, "utf-8")
    folder.mkdir()
    file = folder / "config.json"
    file.write_text(json.dumps(config(folder, hunyuan, clips)), "utf-8")
    done = lab.run("scripts/train.py", "--config-path", str(file), PYTHONPATH=str(blocked.parent))
    lines = [line for line in done.stderr.splitlines() if "Wan 2.2 is not available" in line]
    assert len(lines) == 1 and "pip install onewan" in lines[0]
    assert (folder / "out" / "lora.safetensors").is_file()


def test_after_a_renaming_in_onetrainer_other_models_still_train(
    lab: Lab, hunyuan, clips, tmp_path
):
    copy = tmp_path / "OneTrainer"
    shutil.copytree(lab.checkout, copy, symlinks=True)
    path = copy / "modules/ui/TopBarController.py"
    path.write_text(path.read_text("utf-8").replace("get_model_types", "list_model_types"), "utf-8")
    lab = Lab(copy, lab.python)
    folder = tmp_path / "run"
    folder.mkdir()
    file = folder / "config.json"
    file.write_text(json.dumps(config(folder, hunyuan, clips)), "utf-8")
    done = lab.run("scripts/train.py", "--config-path", str(file))
    (line,) = [line for line in done.stderr.splitlines() if "Wan 2.2 is not available" in line]
    assert "TopBarController.get_model_types" in line and "23df3832" in line
