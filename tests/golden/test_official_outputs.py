"""Our loader and forward contract against outputs of the official Wan 2.2 code, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.accelerator import IS_SIMULATED
from torch import Tensor

from onewan.model.forward import predict_velocity, token_timesteps
from onewan.model.load import WanModelLoader
from onewan.model.text import pad_text
from onewan.model.wan import WanModel

TEXT_AND_TRANSFORMER_WITHIN = 1e-5
ENCODED_WITHIN = 1e-4
DECODED_WITHIN = 3e-3
"""What a real accelerator may differ by, relative. Decoding rounds to 10 bits of mantissa
(TF32) on NVIDIA's cards, as the official code does there."""
FOLDERS = {"t2v-a14b": "t2v-A14B", "i2v-a14b": "i2v-A14B", "ti2v-5b": "ti2v-5B"}
PROMPTS = ["a small dog runs on the beach", "slow camera pan of a city at night"]


def latent_statistics(model: WanModel) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's latents by channel, [1, C, 1, 1, 1]."""
    assert model.vae is not None
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(model.vae.config.latents_mean).view(shape)
    return mean, torch.tensor(model.vae.config.latents_std).view(shape)


def relative(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module", params=list(FOLDERS))
def golden(request: pytest.FixtureRequest, shared: Path) -> tuple[WanModel, dict[str, Tensor]]:
    official = shared / "golden" / FOLDERS[request.param]
    model = WanModelLoader().load(official)  # the official layout, by its path alone
    assert model.variant.name == request.param and not model.notices
    return model, load_file(official / "expected.safetensors")


@pytest.mark.parametrize("t", [12.5, 500, 950])
def test_transformer_gives_the_official_velocity(
    golden: tuple[WanModel, dict[str, Tensor]], t: float
) -> None:
    model, expected = golden
    text = pad_text([expected["text.embedding.0"]])
    condition = expected.get("dit.condition")  # only for I2V
    for expert in model.variant.experts:
        official = {"high": "high_noise_model", "low": "low_noise_model", "single": "transformer"}
        out = predict_velocity(
            model.expert(expert),
            expected["dit.latent"],
            torch.tensor([t / 1000]),
            text,
            condition_BCFHW=condition,
        )
        assert relative(out, expected[f"dit.{official[expert.name]}.t{t}"]) < 2e-6


def test_official_outputs_have_a_clean_first_frame_exactly_for_variants_with_one(
    golden: tuple[WanModel, dict[str, Tensor]],
) -> None:
    model, expected = golden
    has_outputs = "dit.transformer.first_frame_clean" in expected
    assert has_outputs == model.variant.has_clean_first_frame


@pytest.mark.parametrize("golden", ["ti2v-5b"], indirect=True)
def test_a_clean_first_frame_at_timestep_0_gives_the_official_velocity(
    golden: tuple[WanModel, dict[str, Tensor]],
) -> None:
    model, expected = golden
    assert model.variant.has_clean_first_frame
    latent, t = expected["dit.latent"], torch.tensor([0.7])
    clean = torch.arange(latent.shape[2])[None] == 0
    torch.testing.assert_close(
        token_timesteps(t, clean, latent), expected["dit.transformer.first_frame_clean.timesteps"]
    )
    text = pad_text([expected["text.embedding.0"]])
    out = predict_velocity(
        model.expert(model.variant.experts[0]), latent, t, text, clean_frames_BF=clean
    )
    assert relative(out, expected["dit.transformer.first_frame_clean"]) < 2e-6


def test_text_embeddings_are_the_official_ones_padded_with_zeros(
    golden: tuple[WanModel, dict[str, Tensor]],
) -> None:
    model, expected = golden
    assert model.tokenizer is not None
    padded = model.encode_text(PROMPTS)
    assert padded.shape[1] == 512
    for i, prompt in enumerate(PROMPTS):
        official = expected[f"text.embedding.{i}"]
        ids = model.tokenizer(prompt).input_ids
        assert ids == expected["text.input_ids"][i, : len(official)].tolist()
        assert relative(padded[i, : len(official)], official) < 2e-6
        assert padded[i, len(official) :].count_nonzero() == 0


def test_vae_encodes_and_decodes_as_the_official_one(
    golden: tuple[WanModel, dict[str, Tensor]],
) -> None:
    model, expected = golden
    assert model.vae is not None
    mean, std = latent_statistics(model)
    latents = model.encode_video(expected["vae.pixels"])
    assert relative(latents * std + mean, expected["vae.mean_unscaled"]) < 1e-5
    decoded = model.decode_video((expected["vae.mean_unscaled"] - mean) / std)
    assert relative(decoded, expected["vae.decoded"].clamp(-1, 1)) < 1e-5


def test_an_accelerator_gives_the_official_outputs(
    golden: tuple[WanModel, dict[str, Tensor]], accelerator: torch.device
) -> None:
    model, expected = golden
    parts: list[Any] = [model.text_encoder, model.vae, *map(model.expert, model.variant.experts)]
    try:
        for part in parts:
            part.to(accelerator)
        there = {name: tensor.to(accelerator) for name, tensor in expected.items()}
        for i, prompt in enumerate(PROMPTS):
            text = model.encode_prompt(prompt)
            close(text, expected[f"text.embedding.{i}"], TEXT_AND_TRANSFORMER_WITHIN)
        for expert in model.variant.experts:
            out = predict_velocity(
                model.expert(expert),
                there["dit.latent"],
                torch.tensor([0.5], device=accelerator),
                pad_text([there["text.embedding.0"]]),
                condition_BCFHW=there.get("dit.condition"),
            )
            official = {"high": "high_noise_model", "low": "low_noise_model"}.get(
                expert.name, "transformer"
            )
            close(out, expected[f"dit.{official}.t500"], TEXT_AND_TRANSFORMER_WITHIN)
        mean, std = latent_statistics(model)
        latents = model.encode_video(there["vae.pixels"])
        close(latents.cpu() * std + mean, expected["vae.mean_unscaled"], ENCODED_WITHIN)
        given = (expected["vae.mean_unscaled"] - mean) / std
        decoded = model.decode_video(given.to(accelerator))
        close(decoded, expected["vae.decoded"].clamp(-1, 1), DECODED_WITHIN)
    finally:
        for part in parts:
            part.to("cpu")


def close(found: Tensor, expected: Tensor, within: float) -> None:
    error = relative(found.cpu(), expected)
    print(f"differs from the official output by {error:.2g}")
    assert error < (1e-5 if IS_SIMULATED else within)
