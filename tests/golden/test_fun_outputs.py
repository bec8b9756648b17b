"""Our transformer and its conditions against VideoX-Fun's, for Wan2.2-Fun-InP and -Control.

``fun_transformer.safetensors`` and ``fun_conditions.safetensors`` were written by
``scripts/write_fun_outputs.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from onewan.formats.key_maps import to_official
from onewan.memory.activations import KeptActivations
from onewan.memory.block_runner import CheckpointedBlocks
from onewan.model.conditioning import (
    ConditionPart,
    ConditionPixels,
    FunControlPipeline,
    FunInpPipeline,
    conditioning_of,
    encode_part,
)
from onewan.model.forward import predict_velocity
from onewan.model.load import WanModelLoader
from onewan.model.meta_init import transformer_on_meta
from onewan.model.text import pad_text
from onewan.model.transformer import WanTransformer
from onewan.model.vae import encode_video
from onewan.variants import VARIANTS, VariantName
from tests.support.fun_inputs import CASES, FRAMES, SIZE, fun_pixels
from tests.support.named_weights import named_tensor, named_weights
from tests.support.stand_in_vae import StandInVae

EXPECTED = load_file(Path(__file__).parent / "fun_transformer.safetensors")
CONDITIONS = load_file(Path(__file__).parent / "fun_conditions.safetensors")
LATENTS = (1, 16, 3, 4, 6)


def fun_transformer(folder: Path, variant: VariantName) -> WanTransformer:
    """The transformer of the file, loaded from a checkpoint with VideoX-Fun's keys."""
    facts = VARIANTS[variant]
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "in_channels": facts.in_channels,
        "out_channels": 16,
        "text_dim": 32,
        "ffn_dim": 128,
        "num_layers": 2,
        "reference_channels": facts.reference_channels,
    }
    empty = transformer_on_meta(config)
    shapes = {to_official(name): tuple(p.shape) for name, p in empty.named_parameters()}
    official = {"dim": 64, "num_heads": 2, "in_dim": facts.in_channels, "add_ref_conv": True}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(official), encoding="utf-8")
    save_file(named_weights(shapes), folder / "diffusion_pytorch_model.safetensors")
    model = WanModelLoader().load({"transformer": folder}, variant)
    assert isinstance(model.transformer, WanTransformer)
    return model.transformer


def relative(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("runner", [False, True], ids=["no_runner", "runner"])
@pytest.mark.parametrize("case", sorted(EXPECTED))
def test_transformer_gives_the_velocity_of_videox_fun(
    tmp_path: Path, case: str, runner: bool
) -> None:
    name, _, t = case.partition(".t")
    variant, _, image = name.partition(".")
    transformer = fun_transformer(tmp_path / "model", variant)  # pyright: ignore[reportArgumentType]
    if runner:
        transformer.block_runner = CheckpointedBlocks(
            blocks=list(transformer.blocks),  # pyright: ignore[reportArgumentType]
            store=KeptActivations(torch.device("cpu"), torch.empty),
        )
    channels = transformer.config["in_channels"] - 16
    out = predict_velocity(
        transformer,
        named_tensor("latents", LATENTS),
        torch.tensor([float(t) / 1000]),
        pad_text([named_tensor("text", (7, 32))]),
        condition_BCFHW=named_tensor("condition", (1, channels, *LATENTS[2:])),
        reference_BCHW=(
            named_tensor("reference", (1, 16, *LATENTS[3:])) if image == "reference" else None
        ),
    )
    assert relative(out, EXPECTED[case]) < 2e-6


def test_a_reference_image_is_a_further_frame_and_not_ignored() -> None:
    """The outputs with and without an image differ, so the comparison above tests the image."""
    with_image, without = (
        EXPECTED[f"fun-control-a14b.{image}.t950"] for image in ("reference", "no_reference")
    )
    assert relative(with_image, without) > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_conditions_are_those_of_videox_funs_pipelines(name: str) -> None:
    """Of training: from the parts that the cache stores."""
    variant, given, controlled, referenced = CASES[name]
    clips, conditioning = fun_pixels(), conditioning_of(VARIANTS[variant])
    clip = clips["clip"]
    parts: dict[ConditionPart, Tensor] = {}
    for part in conditioning.parts(given):
        if (part == "control" and not controlled) or (part == "reference" and not referenced):
            continue
        pixels = ConditionPixels(
            shape=clip.shape,
            image=clips["reference"][:, :, 0] if part == "reference" else clip[:, :, 0],
            last=clip[:, :, -1],
            control=clips["control"],
        )
        parts[part] = encode_part(StandInVae(), part, pixels)  # pyright: ignore[reportArgumentType]
    latents = torch.zeros(1, 16, 1 + FRAMES // 4, SIZE[0] // 8, SIZE[1] // 8)
    channels = conditioning.channels(parts, given, latents)
    assert channels is not None
    assert_near(channels, CONDITIONS[f"{name}.y"])
    if variant == "fun-control-a14b":
        reference = parts.get("reference", latents[:, :, :1])[:, :, 0]
        assert_near(reference, CONDITIONS[f"{name}.full_ref"])


@pytest.mark.parametrize("name", CASES)
def test_samples_are_given_the_conditions_of_videox_funs_pipelines(name: str) -> None:
    variant, given, controlled, _ = CASES[name]
    clips, vae = fun_pixels(), StandInVae()
    kind = conditioning_of(VARIANTS[variant]).sampling_pipeline(given)
    pipeline = kind.__new__(kind)  # without the other components, which are not used
    pipeline.__dict__.update(vae=vae, vae_scale_factor_temporal=4, vae_scale_factor_spatial=8)
    pipeline.register_to_config(expand_timesteps=False)
    assert isinstance(pipeline, FunInpPipeline)
    pipeline.given = given
    if isinstance(pipeline, FunControlPipeline) and controlled:
        pipeline.control = encode_video(vae, clips["control"])  # pyright: ignore[reportArgumentType]
    clip = clips["clip"]
    gray = torch.zeros_like(clip[:, :, 0])
    _, channels = pipeline.prepare_latents(
        clip[:, :, 0] if given in ("first", "both") else gray,
        1,
        16,
        *SIZE,
        FRAMES,
        torch.float32,
        torch.device("cpu"),
        torch.Generator(),
        None,
        clip[:, :, -1] if given in ("last", "both") else None,
    )
    assert_near(channels, CONDITIONS[f"{name}.y"])


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) < 2e-6
