"""The formula of operations against PyTorch's counter on a real, small transformer."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from onewan.arithmetic.flops import (
    FLASH_BACKWARD,
    Trained,
    TransformerSize,
    block_flops,
    forward_flops,
    token_count,
    training_flops,
)
from onewan.variants import VARIANTS

FRAMES, HEIGHT, WIDTH = 3, 8, 12


@pytest.fixture(scope="module")
def transformer() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=36,
        out_channels=16,
        text_dim=48,
        freq_dim=32,
        ffn_dim=160,
        num_layers=3,
    )


def count(transformer: WanTransformer3DModel, trained: Trained | None) -> int:
    """The operations of a pass over two clips, by PyTorch's counter; None: the forward pass."""
    transformer.requires_grad_(trained == "weights")
    if trained == "adapter":
        # An adapter gives key and value a gradient whatever the text has; so does a bias, which
        # needs no matrix product.
        for block in transformer.blocks:
            block.attn2.to_k.bias.requires_grad_(True)
            block.attn2.to_v.bias.requires_grad_(True)
    # The latents stand for a layer in front, so that the first layer has a backward pass as others.
    latents = torch.randn(2, 36, FRAMES, HEIGHT, WIDTH, requires_grad=trained is not None)
    text = torch.randn(2, 512, 48, requires_grad=trained not in (None, "adapter"))
    # The math backend is made of matrix products, which the counter knows on the CPU too.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = transformer(latents, torch.tensor([900.0, 20.0]), text, return_dict=False)[0]
        if trained is not None:
            out.sum().backward()
    return counter.get_total_flops()


def of_two_clips(transformer: WanTransformer3DModel):
    size = TransformerSize.of_config(transformer.config)
    return forward_flops(size, token_count(FRAMES, HEIGHT, WIDTH)) * 2


def test_the_forward_pass_is_exact(transformer: WanTransformer3DModel) -> None:
    assert of_two_clips(transformer).total == count(transformer, None)


@pytest.mark.parametrize("trained", ["adapter", "embeddings"])
def test_the_backward_pass_through_frozen_weights_is_exact(
    transformer: WanTransformer3DModel, trained: Trained
) -> None:
    assert training_flops(of_two_clips(transformer), trained) == count(transformer, trained)


def test_the_backward_pass_of_trained_weights_leaves_out_the_first_layer_alone(
    transformer: WanTransformer3DModel,
) -> None:
    """The time embedding's input needs no gradient; everything else has two products."""
    found = count(transformer, "weights")
    first_of_time = 2 * 2 * 32 * 64
    assert training_flops(of_two_clips(transformer), "weights") == found + first_of_time


def test_recomputation_and_flash_attention_are_extra(transformer: WanTransformer3DModel) -> None:
    forward = of_two_clips(transformer)
    plain = training_flops(forward, "adapter")
    again = training_flops(forward, "adapter", attention_backward=FLASH_BACKWARD, recomputations=1)
    assert again - plain == forward.total + 0.5 * forward.attention


def test_true_sizes() -> None:
    """Published figures: an A14B block has 597.7 MFLOP a token in its linear layers, 20,480 N in
    self-attention; a forward pass at 81x480x832 has 1,678 TFLOP."""
    size = TransformerSize.of_variant(VARIANTS["t2v-a14b"])
    tokens = token_count(21, 60, 104)
    assert tokens == 32_760
    block = block_flops(size, tokens)
    assert block.linear / tokens == pytest.approx(597.7e6, rel=1e-3)
    assert block.attention / tokens == 20_480 * (tokens + 512)
    assert forward_flops(size, tokens).total == pytest.approx(1_678e12, rel=2e-3)
