"""Wan 2.2 in OneTrainer's windows: Qt without a display, Tk under Xvfb."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.onetrainer_runs import QUIET, Lab

WINDOWS = Path(__file__).parents[1] / "support" / "onetrainer_windows.py"

EXPECTED: dict[str, Any] = {
    "model_type": "WAN_2_2",
    "training_method": "LORA",
    "frames": "49",
    "wan_high_share": "0.25",
    "wan_expert_block": 7,
    "wan_boundary": 0.9,
    "wan_frame_strategy": "random",
    "wan_target_fps": 12.0,
    "wan_max_duration": 4.5,
    "wan_temporal_consistency_weight": 1.5,
    "wan_layers": "0-3, 5",
    "wan_use_temporal_attention": False,
    "wan_validation_levels": 3,
    "wan_low_lora_rank": 8,
    "wan_low_lora_alpha": None,
}
SECOND = {
    "train": False,
    "learning_rate": 0.0002,
    "weight_dtype": "FLOAT_8",
}


def opened(lab: Lab, kit: str, out: Path, *more: str) -> dict[str, Any]:
    command = [lab.python, str(WINDOWS), kit, str(out), *more]
    if kit == "tk":
        command = ["xvfb-run", "-a", "-s", "-screen 0 1500x1000x24", *command]
    done = subprocess.run(
        command,
        cwd=lab.checkout,
        env={**os.environ, **QUIET},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if (
        "No module named 'PySide6'" in done.stderr
        or "No module named 'customtkinter'" in done.stderr
    ):
        pytest.skip(f"OneTrainer's interpreter has no {kit} toolkit")
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    return json.loads((out / "facts.json").read_text("utf-8"))


@pytest.mark.parametrize("kit", ["qt", "tk"])
def test_wan_can_be_configured_in_the_window_and_is_saved(lab: Lab, tmp_path: Path, kit: str):
    if kit == "tk" and not (shutil.which("xvfb-run") and shutil.which("import")):
        pytest.skip("needs xvfb-run and ImageMagick's import")
    (lab.checkout / "training_presets" / "#.json").unlink(missing_ok=True)
    facts = opened(lab, kit, tmp_path)
    assert facts["types"][-1] == "Wan 2.2"
    assert facts["methods"] == ["Fine Tune", "LoRA", "Embedding"]
    model, training = facts["labels of model"], facts["labels of training"]
    for part in ("High-Noise Transformer", "Low-Noise Transformer"):
        assert f"Override {part}" in model and f"{part} Data Type" in model
        assert f"Train {part}" in training and f"{part} Learning Rate" in training
    for label in ("Text Encoder Data Type", "VAE Data Type", "Output Format"):
        assert label in model
    for label in ("Optimizer", "Frames", "Timestep Shift", "MSE Strength", "Layer Filter"):
        assert label in training
    for method in ("fine-tuning", "an embedding"):
        assert "High-Noise Share" in facts[f"labels of {method}"]
    assert facts["labels of LoRA"] and facts["labels of sampling"]
    if kit == "qt":
        assert {"start image:", "fps:", "low-noise cfg scale:"} <= set(facts["labels of a sample"])
    assert facts["convert"][-1] == "Wan 2.2" == facts["convert shows"]
    for tab in ("model", "training", "sampling", "LoRA"):
        colours = Image.open(tmp_path / f"{kit}_{tab}.png").convert("RGB").getcolors(1 << 24)
        assert colours and len(colours) > 50  # a picture of something

    saved = json.loads((lab.checkout / "training_presets" / "#.json").read_text("utf-8"))
    again = opened(lab, kit, tmp_path / "again", "again")["config"]
    for config in (facts["config"], saved, again):
        assert {key: config[key] for key in EXPECTED} == EXPECTED
        assert {key: config["transformer_2"][key] for key in SECOND} == SECOND
        assert config["transformer_2"]["model_name"].endswith("low.safetensors")
        assert config["transformer"]["learning_rate"] == 0.0001
    (lab.checkout / "training_presets" / "#.json").unlink()
