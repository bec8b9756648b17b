"""Finished adapters applied to a model: of any ranks, one on top of the other."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel
from support.adapters import METHODS, output, trained
from support.tiny_models import tiny_transformer

from onewan.adapters.adapter_config import AdapterConfig
from onewan.adapters.lora import (
    adapter_of,
    adapter_parameters,
    adapter_weights,
    apply_lora,
    attach_adapter,
)
from onewan.adapters.select import select_linears
from onewan.errors import CheckpointError
from onewan.formats.adapter import ModuleAdapter
from onewan.formats.lora_files import parse_adapter


@pytest.fixture(scope="module")
def base() -> WanTransformer3DModel:
    return tiny_transformer(layers=3)


def test_applied_adapters_add_up(base: WanTransformer3DModel) -> None:
    """Applied, with its own alpha; a second one, of other ranks, comes on top."""
    model = copy.deepcopy(base)
    modules = select_linears(model, ["self_attention", "ffn"], [0, 2])
    config = AdapterConfig(
        kind="lora",
        modules=modules,
        ranks=dict.fromkeys(modules, 4),
        alphas=dict.fromkeys(modules, 8.0),
    )
    attach_adapter(model, config, 1, "high")
    for number, parameter in enumerate(adapter_parameters(model).values()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    applied = copy.deepcopy(base)
    apply_lora(applied, adapter_of(model, config), "one")
    torch.testing.assert_close(output(applied), output(model))
    second = {
        "blocks.1.attn2.to_k.lora_A.weight": torch.randn(2, 32),
        "blocks.1.attn2.to_k.lora_B.weight": torch.randn(32, 2),
        "blocks.0.attn1.to_q.lora_A.weight": torch.randn(3, 32),
        "blocks.0.attn1.to_q.lora_B.weight": torch.randn(32, 3),
    }
    alphas = {"blocks.1.attn2.to_k": 4.0, "blocks.0.attn1.to_q": 3.0}
    apply_lora(
        applied, parse_adapter(second, {"alpha": 1.0, "alpha_pattern": alphas}, source="two"), "two"
    )
    merged = copy.deepcopy(base)
    for weights, scale in ((adapter_weights(model), 2.0), (second, None)):
        for key in [k for k in weights if "lora_A" in k]:
            name = key.removesuffix(".lora_A.weight")
            factor = scale or {"blocks.1.attn2.to_k": 2.0, "blocks.0.attn1.to_q": 1.0}[name]
            delta = weights[f"{name}.lora_B.weight"] @ weights[key]
            merged.get_submodule(name).weight.data += factor * delta  # pyright: ignore
    torch.testing.assert_close(output(applied), output(merged), rtol=1e-4, atol=1e-5)


def test_an_adapter_of_another_model_is_refused(base: WanTransformer3DModel) -> None:
    deep = {
        "blocks.7.attn1.to_q.lora_A.weight": torch.ones(2, 32),
        "blocks.7.attn1.to_q.lora_B.weight": torch.ones(32, 2),
    }
    with pytest.raises(CheckpointError, match=r"has no layer blocks\.7\.attn1\.to_q"):
        apply_lora(copy.deepcopy(base), parse_adapter(deep, source="file"), "file")
    wide = {
        "blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 48),
        "blocks.0.attn1.to_q.lora_B.weight": torch.ones(48, 2),
    }
    with pytest.raises(CheckpointError, match="file: does not fit the model"):
        apply_lora(copy.deepcopy(base), parse_adapter(wide, source="file"), "file")


@pytest.mark.parametrize("kind", METHODS)
def test_a_strength_multiplies_what_an_adapter_adds(base: WanTransformer3DModel, kind: str) -> None:
    """Of every kind, as in `onewan merge`: 0 is the base model, and 0.5 half of the difference."""
    model, config = trained(base, METHODS[kind])
    modules = adapter_of(model, config)
    none, half, whole = (copy.deepcopy(base) for _ in range(3))
    for applied, strength in ((none, 0.0), (half, 0.5), (whole, 1.0)):
        apply_lora(applied, modules, "one", strength)
    assert torch.equal(output(none), output(base))
    merged = copy.deepcopy(base)
    for module, adapter in modules.items():
        weight = merged.get_submodule(module).weight
        weight.data += 0.5 * adapter.difference(weight.data)  # pyright: ignore
    effect = output(whole) - output(base)
    assert (output(half) - output(merged)).norm() < 1e-5 * effect.norm()
    assert (output(half) - output(whole)).norm() > 0.1 * effect.norm()


def test_a_strength_multiplies_differences_of_biases_and_norms(base: WanTransformer3DModel) -> None:
    difference = torch.arange(32.0)
    modules = {
        "blocks.0.attn1.to_q": ModuleAdapter(kind="difference", tensors={"diff_b": difference}),
        "blocks.1.attn1.norm_q": ModuleAdapter(kind="difference", tensors={"diff": difference}),
    }
    applied = copy.deepcopy(base)
    apply_lora(applied, modules, "one", -0.25)
    for parameter in ("blocks.0.attn1.to_q.bias", "blocks.1.attn1.norm_q.weight"):
        changed = applied.get_parameter(parameter) - base.get_parameter(parameter)
        torch.testing.assert_close(changed, -0.25 * difference)
