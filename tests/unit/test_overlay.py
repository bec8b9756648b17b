"""`Overlay`: an adapter beside whatever a layer is, and nothing left of it afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from support.adapters import METHODS, output, trained
from support.tiny_models import in_bfloat16, quantized, tiny_transformer
from torch import Tensor, nn

from onewan.adapters.merging import merge_adapters
from onewan.adapters.overlay import Overlay
from onewan.adapters.weights import train_weights
from onewan.errors import CheckpointError
from onewan.formats.adapter import ModuleAdapter
from onewan.formats.lora import LINEARS
from onewan.model.meta_init import transformer_on_meta


@pytest.fixture(scope="module")
def base() -> WanTransformer3DModel:
    return tiny_transformer()


def distilled(model: WanTransformer3DModel) -> dict[str, ModuleAdapter]:
    """Pairs on all linear layers of the blocks, and the differences of published distillations: of
    biases, of norms, of the patch embedding and of layers outside the blocks."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return 0.1 * torch.randn(*shape, generator=generator)

    found: dict[str, ModuleAdapter] = {}
    for block in range(len(model.blocks)):
        for name in LINEARS:
            module = f"blocks.{block}.{name}"
            layer: Any = model.get_submodule(module)
            layer = getattr(layer, "base_layer", layer)
            tensors = {"lora_A": random(4, layer.in_features)}
            tensors["lora_B"] = random(layer.out_features, 4)
            if name in ("attn1.to_q", "ffn.net.2"):
                tensors["diff_b"] = random(layer.out_features)
            found[module] = ModuleAdapter(kind="lora", tensors=tensors, alpha=8.0)
    width = model.config["num_attention_heads"] * model.config["attention_head_dim"]
    norm = {"diff": random(width), "diff_b": random(width)}
    found["blocks.0.norm2"] = ModuleAdapter(kind="difference", tensors=norm)
    for name in ("norm_q", "norm_k"):
        tensors = {"diff": random(width)}
        found[f"blocks.1.attn2.{name}"] = ModuleAdapter(kind="difference", tensors=tensors)
    tensors = {"diff": random(*model.patch_embedding.weight.shape), "diff_b": random(width)}
    found["patch_embedding"] = ModuleAdapter(kind="difference", tensors=tensors)
    tensors = {"lora_A": random(2, 256), "lora_B": random(width, 2)}
    found["condition_embedder.time_embedder.linear_1"] = ModuleAdapter(kind="lora", tensors=tensors)
    tensors = {"diff_b": random(*model.proj_out.bias.shape)}
    found["proj_out"] = ModuleAdapter(kind="difference", tensors=tensors)
    return found


def state(model: nn.Module) -> dict[str, Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("strength", [1.0, -0.125])
def test_an_overlay_computes_what_the_merged_weights_do(
    base: WanTransformer3DModel, strength: float
) -> None:
    model, merged = copy.deepcopy(base), copy.deepcopy(base)
    modules = distilled(model)
    merge_adapters(merged, modules, "one", strength=strength)
    before = state(model)
    with Overlay(model, modules, "one", strength=strength).attached():
        got = output(model)
    torch.testing.assert_close(got, output(merged), rtol=1e-4, atol=1e-5)
    assert (got - output(base)).norm() > 0.05 * output(base).norm()
    assert_untouched(model, before)
    assert torch.equal(output(model), output(base))


def test_layers_that_compute_in_float32_get_a_float32_addition(base: WanTransformer3DModel) -> None:
    """In bfloat16, an overlay is as near the float32 result as the merged weights are."""
    model, merged, exact = in_bfloat16(base), in_bfloat16(base), copy.deepcopy(base)
    modules = distilled(base)
    merge_adapters(exact, modules, "one")
    merge_adapters(merged, modules, "one")
    with Overlay(model, modules, "one", dtype=torch.bfloat16).attached():
        error = output(model, torch.bfloat16) - output(exact)
    bound = output(merged, torch.bfloat16) - output(exact)
    assert error.norm() < 1.2 * bound.norm()


@pytest.mark.parametrize("method", METHODS)
def test_an_overlay_lies_over_what_every_method_trains(
    base: WanTransformer3DModel, method: str
) -> None:
    """What it adds to each layer's output does not depend on what is trained there."""
    model, _ = trained(base, METHODS[method])
    before, modules = state(model), distilled(model)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    module = "blocks.0.attn1.to_k"
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    plain = model.get_submodule(module)(x)
    expected = plain + x @ modules[module].difference().T  # pyright: ignore[reportOptionalMemberAccess]
    overlay = Overlay(model, modules, "one")
    with overlay.attached():
        torch.testing.assert_close(model.get_submodule(module)(x), expected)
        assert not torch.equal(output(model), output(base))
    assert_untouched(model, before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    with overlay.attached():  # again, after training went on
        torch.testing.assert_close(model.get_submodule(module)(x), expected)


def test_an_overlay_lies_over_trained_and_over_packed_weights(base: WanTransformer3DModel) -> None:
    fine_tuned = copy.deepcopy(base)
    train_weights(fine_tuned, [n for n, _ in fine_tuned.named_parameters()], "float32")
    with Overlay(fine_tuned, distilled(base), "one").attached():
        want = output(fine_tuned)
    packed = quantized(base, "int8")
    before = state(packed)
    with Overlay(packed, distilled(base), "one").attached():
        got = output(packed)
    assert (got - want).norm() < 0.05 * want.norm()
    assert_untouched(packed, before)


def test_two_overlays_add_up(base: WanTransformer3DModel) -> None:
    model, merged = copy.deepcopy(base), copy.deepcopy(base)
    modules = distilled(model)
    merge_adapters(merged, modules, "one", strength=1.5)
    before = state(model)
    first, second = Overlay(model, modules, "one"), Overlay(model, modules, "two", strength=0.5)
    with first.attached(), second.attached():
        torch.testing.assert_close(output(model), output(merged), rtol=1e-4, atol=1e-5)
    assert_untouched(model, before)


def test_blocks_are_kept_in_the_precision_of_products(base: WanTransformer3DModel) -> None:
    modules = distilled(base)
    values = {n: sum(t.numel() for t in a.tensors.values()) for n, a in modules.items()}
    inside = sum(count for name, count in values.items() if name.startswith("blocks."))
    overlay = Overlay(base, modules, "one", dtype=torch.bfloat16)
    assert overlay.nbytes == 2 * inside + 4 * (sum(values.values()) - inside)


def test_everything_that_does_not_fit_is_named_without_the_model_in_memory(
    base: WanTransformer3DModel,
) -> None:
    model = transformer_on_meta(base.config)
    pair = {"lora_A": torch.ones(2, 32), "lora_B": torch.ones(32, 2)}
    wide = {"lora_A": torch.ones(2, 48), "lora_B": torch.ones(32, 2)}
    modules = {
        "blocks.0.attn1.to_q": ModuleAdapter(kind="lora", tensors=pair),
        "blocks.0.attn1.to_k": ModuleAdapter(kind="lora", tensors=wide),
        "blocks.1.norm2": ModuleAdapter(kind="difference", tensors={"diff": torch.ones(48)}),
        "blocks.1.scale_shift_table": ModuleAdapter(
            kind="difference", tensors={"diff": torch.ones(1, 6, 32)}
        ),
    }
    with pytest.raises(CheckpointError) as error:
        Overlay(model, modules, "x.safetensors")
    text = str(error.value)
    assert text.startswith("x.safetensors: does not fit the model in 3 of 4 layers: ")
    assert "blocks.0.attn1.to_k has inputs of 48 in the file, and of 32 in the model" in text
    assert "blocks.1.norm2 has a weight of [48] in the file, and of [32] in the model" in text
    assert "blocks.1.scale_shift_table is no layer" in text
    with pytest.raises(CheckpointError, match=r"the model has no layer blocks\.7\.attn1\.to_q"):
        Overlay(model, {"blocks.7.attn1.to_q": modules["blocks.0.attn1.to_q"]}, "x")
    Overlay(model, {"blocks.0.attn1.to_q": modules["blocks.0.attn1.to_q"]}, "x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_gradients_no_second_output_is_made(
    base: WanTransformer3DModel, dtype: torch.dtype
) -> None:
    model = copy.deepcopy(base)
    outputs: list[Tensor] = []
    names = ["blocks.0.ffn.net.0.proj", "blocks.0.norm2", "blocks.1.attn2.norm_k", "proj_out"]
    for name in names:
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda _layer, _inputs, output: outputs.append(output))
    overlay = Overlay(model, distilled(model), "one", dtype=dtype)
    for grad in (False, True):
        with overlay.attached(), torch.set_grad_enabled(grad):
            for name in names:
                layer: Any = model.get_submodule(name)
                width = getattr(layer, "in_features", 32)
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
                    result = layer(torch.ones(1, 3, width))
                assert (result.data_ptr() == outputs[-1].data_ptr()) == (not grad), name
