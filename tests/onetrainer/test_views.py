"""Which of Wan's widgets are shown, on a toolkit that records them (real ones: test_windows.py)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from onewan.onetrainer.patches.configs import added_fields
from onewan.onetrainer.patches.views import Shown, _groups
from onewan.onetrainer.sampling import request_of
from onewan.variants import VARIANTS, VariantName

SETTINGS = [field for field in added_fields()["train"] if field["group"] != "LoRA"]


class Recorder:
    """Records each widget: what it is, its label or field, and the text of an empty entry."""

    def __init__(self) -> None:
        self.made: list[tuple[str, str, str]] = []

    def __getattr__(self, kind: str) -> Any:
        def make(*args: Any, **kwargs: Any) -> None:
            text = next((value for value in args if isinstance(value, str)), "")
            self.made.append((kind, text, kwargs.get("placeholder", "")))

        return make


def made(variant: VariantName | None, method: str) -> dict[str, str]:
    """The fields with the texts of their empty entries, and the labels."""
    kit = Recorder()
    shown = Shown(None if variant is None else VARIANTS[variant], method)
    frames = _groups(kit, None, None, shown)
    assert frames == sum(kind == "section_frame" for kind, _, _ in kit.made)
    return {text: empty for _, text, empty in kit.made}


def test_all_settings_are_shown_while_the_variant_is_unknown():
    found = made(None, "LORA")
    assert {field["name"] for field in SETTINGS} <= found.keys()
    assert found["wan_boundary"] == "the model's own"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", ["LORA", "FINE_TUNE", "EMBEDDING"])
def test_a_setting_is_shown_where_it_has_an_effect(variant: VariantName, method: str):
    found, facts = made(variant, method), VARIANTS[variant]
    two = len(facts.experts) > 1
    for name in ("Experts", "transformer_2.include", "wan_high_share", "wan_boundary"):
        assert (name in found) is two
    assert ("wan_condition_shares" in found) is facts.takes_image
    assert ("wan_layers" in found) is (method != "EMBEDDING")
    assert found["wan_target_fps"] == str(facts.fps)
    assert found.get("wan_boundary", str(facts.boundary)) == str(facts.boundary)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_sample_leaves_empty_is_official(variant: VariantName):
    sample = SimpleNamespace(
        prompt="a fox", negative_prompt="", base_image_path="", width=832, height=480,
        frames=None, diffusion_steps=None, cfg_scale=None, random_seed=False, seed=1,
    )  # fmt: skip
    facts = VARIANTS[variant]
    request = request_of(sample, facts)
    assert (request.frames, request.steps) == (facts.frames, facts.sampling_steps)
    assert request.guidance == tuple(expert.guidance_scale for expert in facts.experts)
    sample.cfg_scale, sample.wan_low_cfg_scale = 6.0, None
    assert set(request_of(sample, facts).guidance) == {6.0}
