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

from onewan.onetrainer.patches.configs import added_fields
from onewan.onetrainer.settings import WEIGHTINGS

WINDOWS = Path(__file__).parents[1] / "support" / "onetrainer_windows.py"
WIDGETS = WINDOWS.with_name("onetrainer_widgets.py")

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
    assert len(facts["presets"]) == 7
    assert all((lab.checkout / path).is_file() for _, path in facts["presets"])
    assert facts["methods"] == ["Fine Tune", "LoRA", "Embedding"]
    model, training = facts["labels of model"], facts["labels of training"]
    for part in ("High-Noise Transformer", "Low-Noise Transformer"):
        assert f"Override {part}" in model and f"{part} Data Type" in model
        assert f"Train {part}" in training and f"{part} Learning Rate" in training
    assert {"Text Encoder Data Type", "Output Format"} <= set(model)
    assert "VAE Data Type" not in model  # it always computes in float32
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


@pytest.fixture(scope="module")
def widgets(lab: Lab) -> dict[str, Any]:
    """The widgets of each tab, by base model and training method."""
    done = lab.run(str(WIDGETS))
    line = next(x for x in done.stdout.splitlines() if x.startswith("WIDGETS "))
    return json.loads(line.removeprefix("WIDGETS "))


def fields(made: list[list[str]]) -> dict[str, str]:
    """What the entry of each field shows while it is empty."""
    return {found[1]: found[-1] for found in made if found[0] != "label" and len(found) > 2}


def labels(made: list[list[str]]) -> set[str]:
    return {found[1] for found in made if found[0] == "label"}


METHODS = ("LORA", "FINE_TUNE", "EMBEDDING")
TWO_EXPERTS = {"transformer_2.include", "wan_high_share", "wan_expert_block", "wan_boundary"}
REFUSED = {"mae_strength", "log_cosh_strength", "custom_conditioning_image"}
WITHOUT_EFFECT = {
    "unmasked_probability",
    "normalize_masked_area_loss",
    "length",
    "vae.weight_dtype",
}


@pytest.mark.parametrize("method", METHODS)
def test_widgets_are_those_that_have_an_effect(widgets: dict[str, Any], method: str):
    one, two = (
        {tab: fields(made) for tab, made in widgets[f"{base} {method}"].items()}
        for base in ("Wan2.2-TI2V-5B", "Wan2.2-T2V-A14B")
    )
    assert two["training"].keys() >= TWO_EXPERTS and not one["training"].keys() & TWO_EXPERTS
    assert not any(name.startswith("transformer_2.") for tab in one.values() for name in tab)
    assert "wan_condition_shares" in one["training"].keys() - two["training"].keys()
    for tabs in (one, two):
        shown = {name for tab in tabs.values() for name in tab}
        assert not shown & (REFUSED | WITHOUT_EFFECT)
        trains_layers = method != "EMBEDDING"
        assert ("wan_layers" in shown) is trains_layers
        assert ("transformer.learning_rate" in shown) is trains_layers
        assert ("masked_prior_preservation_weight" in shown) is (method == "LORA")
    low = {"wan_low_lora_rank", "wan_low_lora_alpha"}
    assert two["LORA"].keys() >= low and two["LOKR"].keys() >= low
    assert not (one["LORA"].keys() | two["OFT_2"].keys() | two["training"].keys()) & low
    assert "base_image_path" in one["sample"].keys() - two["sample"].keys()
    assert "wan_low_cfg_scale" in two["sample"].keys() - one["sample"].keys()


def test_every_setting_has_a_widget_and_stands_under_a_heading(widgets: dict[str, Any]):
    unknown = widgets["org/unknown LORA"]
    shown = {name for made in unknown.values() for name in fields(made)}
    assert {field["name"] for kind in added_fields().values() for field in kind} <= shown
    assert {"Experts", "Clips", "Layers", "Objective"} <= labels(unknown["training"])
    assert "Train Low-Noise Transformer" in labels(unknown["training"])
    offered = next(w for w in unknown["training"] if w[1] == "loss_weight_fn")
    assert set(offered[2:-1]) == WEIGHTINGS.keys()


def test_empty_fields_show_the_variants_own_values(widgets: dict[str, Any]):
    def empty(base: str, tab: str) -> dict[str, str]:
        return fields(widgets[f"{base} LORA"][tab])

    for name, boundary in (("T2V-A14B", "0.875"), ("I2V-A14B", "0.9"), ("TI2V-5B", None)):
        assert empty(f"Wan2.2-{name}", "training").get("wan_boundary") == boundary
    sample = ("frames", "diffusion_steps", "cfg_scale", "wan_fps")
    for name, official in (
        ("T2V-A14B", ("81", "40", "4 and 3", "16")),
        ("I2V-A14B", ("81", "40", "3.5", "16")),
        ("TI2V-5B", ("121", "50", "5", "24")),
    ):
        shown = empty(f"Wan2.2-{name}", "sample")
        assert tuple(shown[field] for field in sample) == official
    assert empty("org/unknown", "sample")["cfg_scale"] == "the model's own"
    assert all(widgets["sample"][field] is None for field in sample)


def test_the_training_tab_follows_the_base_model(widgets: dict[str, Any]):
    unchanged, changed = widgets["refreshed"]
    assert (unchanged, changed) == (0, 1)
