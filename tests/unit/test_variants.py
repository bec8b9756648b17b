"""Every number of `onewan.variants` against the official ones, in the form the official code has.

`OFFICIAL` repeats ``wan/configs/*.py`` of Wan-Video/Wan2.2 at 42bf4cf: t in 1/1000ths is a fraction
there too, guidance is (low noise, high noise), sizes are (width, height).
"""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
from typing import Any

import pytest

from onewan.errors import CheckpointError
from onewan.variants import (
    NEGATIVE_PROMPT,
    NUM_TRAIN_TIMESTEPS,
    TEXT_LENGTH,
    TI2V_5B_LATENTS_MEAN,
    TI2V_5B_LATENTS_STD,
    VARIANTS,
    ModelType,
    variant_of,
)


def test_another_boundary_changes_the_experts_ranges() -> None:
    other = VARIANTS["t2v-a14b"].with_boundary(0.5)
    assert [(e.t_min, e.t_max) for e in other.experts] == [(0.5, 1.0), (0.0, 0.5)]
    assert other.boundary == 0.5
    assert other.with_boundary(None) is other
    assert VARIANTS["ti2v-5b"].with_boundary(0.5) is VARIANTS["ti2v-5b"]


OFFICIAL: dict[str, dict[str, Any]] = {
    "t2v-a14b": {
        "dim": 5120,
        "ffn_dim": 13824,
        "num_heads": 40,
        "num_layers": 40,
        "vae_stride": (4, 8, 8),
        "patch_size": (1, 2, 2),
        "sample_shift": 12.0,
        "sample_steps": 40,
        "boundary": 0.875,
        "sample_guide_scale": (3.0, 4.0),
        "sample_fps": 16,
        "frame_num": 81,
        "supported_sizes": {(720, 1280), (1280, 720), (480, 832), (832, 480)},
    },
    "i2v-a14b": {
        "dim": 5120,
        "ffn_dim": 13824,
        "num_heads": 40,
        "num_layers": 40,
        "vae_stride": (4, 8, 8),
        "patch_size": (1, 2, 2),
        "sample_shift": 5.0,
        "sample_steps": 40,
        "boundary": 0.900,
        "sample_guide_scale": (3.5, 3.5),
        "sample_fps": 16,
        "frame_num": 81,
        "supported_sizes": {(720, 1280), (1280, 720), (480, 832), (832, 480)},
    },
    "ti2v-5b": {
        "dim": 3072,
        "ffn_dim": 14336,
        "num_heads": 24,
        "num_layers": 30,
        "vae_stride": (4, 16, 16),
        "patch_size": (1, 2, 2),
        "sample_shift": 5.0,
        "sample_steps": 50,
        "boundary": None,
        "sample_guide_scale": (5.0,),
        "sample_fps": 24,
        "frame_num": 121,
        "supported_sizes": {(704, 1280), (1280, 704)},
    },
}
# As diffusers' scripts/convert_wan_to_diffusers.py writes them; the official code builds them up.
CHANNELS = {"t2v-a14b": (16, 16), "i2v-a14b": (36, 16), "ti2v-5b": (48, 48)}


@pytest.mark.parametrize("name", OFFICIAL)
def test_facts_of_each_variant_equal_those_of_the_official_code(name: str) -> None:
    official, ours = OFFICIAL[name], VARIANTS[name]
    assert ours.name == name
    assert ours.num_attention_heads * ours.attention_head_dim == official["dim"]
    assert ours.ffn_dim == official["ffn_dim"]
    assert ours.num_attention_heads == official["num_heads"]
    assert ours.num_layers == official["num_layers"]
    spatial = ours.spatial_compression
    assert (ours.temporal_compression, spatial, spatial) == official["vae_stride"]
    assert ours.size_multiple == spatial * official["patch_size"][1]
    assert ours.flow_shift == official["sample_shift"]
    assert ours.sampling_steps == official["sample_steps"]
    assert ours.boundary == official["boundary"]
    assert tuple(e.guidance_scale for e in reversed(ours.experts)) == official["sample_guide_scale"]
    assert ours.fps == official["sample_fps"]
    assert ours.frames == official["frame_num"]
    assert ours.sample_size in official["supported_sizes"]
    assert (ours.in_channels, ours.latent_channels) == CHANNELS[name]
    assert ours.training_area == 480 * 832


@pytest.mark.parametrize("name", OFFICIAL)
def test_experts_share_the_noise_levels_at_the_boundary(name: str) -> None:
    variant = VARIANTS[name]
    if variant.boundary is None:
        assert [(e.name, e.t_min, e.t_max) for e in variant.experts] == [("single", 0.0, 1.0)]
        assert variant.experts[0].component == "transformer"
        assert variant.experts[0].file_suffix == ""
        return
    high, low = variant.experts
    # diffusers: `transformer` is the high-noise expert (convert_wan_to_diffusers.py:1171-1173).
    assert (high.name, high.component, high.file_suffix) == ("high", "transformer", "_high_noise")
    assert (low.name, low.component, low.file_suffix) == ("low", "transformer_2", "_low_noise")
    assert (high.t_min, high.t_max) == (variant.boundary, 1.0)
    assert (low.t_min, low.t_max) == (0.0, variant.boundary)


def test_official_samples_fit_the_variant() -> None:
    for variant in VARIANTS.values():
        assert all(side % variant.size_multiple == 0 for side in variant.sample_size)
        assert variant.frames % variant.temporal_compression == 1


def test_shared_facts_are_the_official_ones() -> None:
    assert TEXT_LENGTH == 512
    assert NUM_TRAIN_TIMESTEPS == 1000
    # Length and digest of sample_neg_prompt in wan/configs/shared_config.py.
    assert len(NEGATIVE_PROMPT) == 137
    assert hashlib.sha256(NEGATIVE_PROMPT.encode()).hexdigest() == (
        "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"
    )


def test_model_experts_selects_both_or_one() -> None:
    variant = VARIANTS["i2v-a14b"]
    assert [e.name for e in variant.selected("both")] == ["high", "low"]
    assert [e.name for e in variant.selected("low")] == ["low"]
    with pytest.raises(KeyError, match="ti2v-5b has no expert 'high', only: single"):
        VARIANTS["ti2v-5b"].selected("high")


def test_facts_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        VARIANTS["ti2v-5b"].fps = 16  # pyright: ignore[reportAttributeAccessIssue]


def test_model_type_answers_as_onetrainer_asks() -> None:
    kind = ModelType.WAN_2_2
    assert kind.is_wan()
    assert kind.is_video_model()
    assert kind.is_flow_matching()


@pytest.mark.parametrize("name", CHANNELS)
def test_variant_is_recognized_by_its_input_channels(name: str) -> None:
    config = {"in_channels": CHANNELS[name][0], "image_dim": None}
    assert variant_of(config, "config.json").name == name


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"in_channels": 36, "image_dim": 1280}, "config.json: image_dim is 1280, .*Wan 2.1"),
        ({"in_channels": 4}, r"config.json: in_channels is 4, .* 16 \(t2v-a14b\), 36"),
        ({}, "config.json: in_channels is None"),
    ],
)
def test_other_transformers_are_refused_with_what_they_are(
    config: dict[str, object], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        variant_of(config, "config.json")


def test_facts_and_configuration_import_no_torch() -> None:
    code = (
        "import sys, onewan, onewan.config.load, onewan.runs.control, onewan.runs.events\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'peft', 'numpy'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_latent_statistics_of_the_5b_vae_are_the_official_ones():
    """Some values of the official table (``wan/modules/vae2_2.py``) and the sums of all."""
    mean, std = TI2V_5B_LATENTS_MEAN, TI2V_5B_LATENTS_STD
    assert len(mean) == len(std) == VARIANTS["ti2v-5b"].latent_channels
    assert (mean[0], mean[19], mean[47]) == (-0.2289, 0.5109, -0.0667)
    assert (std[0], std[39], std[47]) == (0.4765, 1.6887, 0.7744)
    assert sum(mean) == pytest.approx(-0.5589, abs=1e-9)
    assert sum(std) == pytest.approx(32.536, abs=1e-9)
