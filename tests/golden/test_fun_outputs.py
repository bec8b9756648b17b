"""Our transformer against outputs of VideoX-Fun's, for Wan2.2-Fun-InP and Wan2.2-Fun-Control.

``fun_transformer.safetensors`` was written by ``scripts/write_fun_outputs.py``.
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
from onewan.model.forward import predict_velocity
from onewan.model.load import WanModelLoader
from onewan.model.meta_init import transformer_on_meta
from onewan.model.text import pad_text
from onewan.model.transformer import WanTransformer
from onewan.variants import VARIANTS, VariantName
from tests.support.named_weights import named_tensor, named_weights

EXPECTED = load_file(Path(__file__).parent / "fun_transformer.safetensors")
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
