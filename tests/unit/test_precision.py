"""The float32 residual stream: official numerics at bfloat16 cost, measured against float32."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from onewan.model.forward import predict_velocity
from onewan.model.precision import CastOnce, keep_float32_islands


@pytest.fixture(scope="module")
def reference() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        text_dim=64,
        ffn_dim=512,
        num_layers=16,
    ).eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 16, 3, 8, 8, generator=generator)
    return x, torch.tensor([0.873]), torch.randn(1, 512, 64, generator=generator)


def stored_in_bfloat16(model: WanTransformer3DModel) -> WanTransformer3DModel:
    """As `from_pretrained(torch_dtype=bfloat16)` stores it, with its float32 islands."""
    model = copy.deepcopy(model)
    islands = WanTransformer3DModel._keep_in_fp32_modules
    for name, parameter in model.named_parameters():
        if not set(name.split(".")) & set(islands):
            parameter.data = parameter.data.bfloat16()
    return model


@torch.no_grad()
def test_error_is_a_fraction_of_that_of_plain_bfloat16(reference: WanTransformer3DModel) -> None:
    x, t, text = inputs()
    exact = predict_velocity(reference, x, t, text)
    plain = stored_in_bfloat16(reference)
    rounded = plain(x.bfloat16(), t * 1000, text.bfloat16(), return_dict=False)[0].float()
    ours = stored_in_bfloat16(reference)
    keep_float32_islands(ours)
    mixed = predict_velocity(ours, x, t, text, dtype=torch.bfloat16)
    error_plain = float((rounded - exact).norm() / exact.norm())
    error_ours = float((mixed - exact).norm() / exact.norm())
    assert error_ours < error_plain / 2.5, (error_ours, error_plain)


def test_the_residual_stream_is_float32_and_matrix_products_are_bfloat16(
    reference: WanTransformer3DModel,
) -> None:
    model = stored_in_bfloat16(reference)
    keep_float32_islands(model)
    seen: dict[str, torch.dtype] = {}
    for name in (
        "patch_embedding",
        "condition_embedder.time_embedder",
        "condition_embedder.time_proj",
        "blocks.0",
        "blocks.15",
        "blocks.3.attn1.to_q",
        "blocks.3.ffn",
        "proj_out",
    ):
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: seen.__setitem__(name, out.dtype)
        )
    # diffusers casts the time embedding to the text's dtype, which is bfloat16 from its encoder.
    model.get_submodule("condition_embedder.time_proj").register_forward_pre_hook(
        lambda _m, args: seen.__setitem__("time embedding", args[0].dtype)
    )
    x, t, text = inputs()
    with torch.no_grad():
        predict_velocity(model, x, t, text.bfloat16(), dtype=torch.bfloat16)
    products = {"blocks.3.attn1.to_q", "blocks.3.ffn"}
    assert {n for n, dtype in seen.items() if dtype == torch.bfloat16} == products
    assert {n for n, dtype in seen.items() if dtype == torch.float32} == seen.keys() - products


def test_a_float32_model_computes_as_before(reference: WanTransformer3DModel) -> None:
    """In float32, the modules kept in float32 give the results of diffusers, bit-exact."""
    x, t, text = inputs()
    ours = copy.deepcopy(reference)
    keep_float32_islands(ours)
    with torch.no_grad():
        plain = reference(x, t * 1000, text, return_dict=False)[0]
        assert torch.equal(predict_velocity(ours, x, t, text), plain)


def test_latents_that_do_not_divide_into_patches_are_refused(
    reference: WanTransformer3DModel,
) -> None:
    x, t, text = inputs()
    with pytest.raises(ValueError, match="8x7 do not divide"):
        predict_velocity(reference, x[..., :7, :], t, text)


def test_a_layer_computes_with_the_tensor_that_its_float32_input_was_made_from() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    source = torch.randn(4, 8).bfloat16()
    results = []
    for shared in (False, True):
        half = source.clone().requires_grad_()
        saved: list[int] = []
        with (
            torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: saved.append(t.data_ptr()) or t, lambda t: t
            ),
            torch.autocast("cpu", torch.bfloat16),
        ):
            single = half.float()
            with CastOnce((single, half)) if shared else nullcontext():
                output = layer(single)
        output.sum().backward()
        results.append((output, half.grad, half.data_ptr() in saved))
    (expected, grad, was_kept), (output, same_grad, is_kept) = results
    assert torch.equal(output, expected)
    assert grad is not None and same_grad is not None and torch.equal(same_grad, grad)
    assert is_kept and not was_kept
