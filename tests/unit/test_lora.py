"""Adapters: float32 masters, initial weights by name, finished ones of any shape put back on."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from onewan.adapters.lora import (
    LoraSpec,
    adapter_parameters,
    adapter_weights,
    apply_lora,
    attach_lora,
    load_adapter_weights,
)
from onewan.adapters.select import select_layers, select_modules
from onewan.errors import CheckpointError, ConfigError
from onewan.formats.lora_files import peft_adapter
from onewan.model.experts import predict_velocity
from onewan.model.precision import keep_float32_islands

SPEC = LoraSpec(
    rank=4, alpha=8.0, dropout=0.0, modules=select_modules(["self_attention", "ffn"]), layers=(0, 2)
)


@pytest.fixture(scope="module")
def base() -> WanTransformer3DModel:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=32, text_dim=16, ffn_dim=64, num_layers=3
    )
    keep_float32_islands(model)
    return model.eval().requires_grad_(False)


def with_lora(
    base: WanTransformer3DModel, seed: int = 1, name: str = "high"
) -> WanTransformer3DModel:
    model = copy.deepcopy(base)
    attach_lora(model, SPEC, seed, name)
    return model


def output(model: WanTransformer3DModel) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    x, text = torch.randn(1, 16, 2, 4, 4, generator=generator), torch.zeros(1, 512, 16)
    with torch.no_grad():
        return predict_velocity(model, x, torch.tensor([0.5]), text)


def test_initial_weights_follow_seed_expert_and_layer(base: WanTransformer3DModel) -> None:
    first = adapter_weights(with_lora(base))
    assert all(torch.equal(v, first[k]) for k, v in adapter_weights(with_lora(base)).items())
    matrices = [v for k, v in first.items() if "lora_A" in k and v.shape == (4, 32)]
    matrices += [
        v for k, v in adapter_weights(with_lora(base, seed=2)).items() if v.shape == (4, 32)
    ]
    matrices += [
        v for k, v in adapter_weights(with_lora(base, name="low")).items() if v.shape == (4, 32)
    ]
    assert len({tuple(m.flatten().tolist()) for m in matrices}) == len(matrices) > 20
    assert all(v.count_nonzero() == 0 for k, v in first.items() if "lora_B" in k)


def test_a_new_adapter_changes_nothing_and_trains_alone(base: WanTransformer3DModel) -> None:
    model = with_lora(base)
    assert torch.equal(output(model), output(base))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(adapter_parameters(model))
    assert {n.split(".")[1] for n in trainable} == {"0", "2"}
    assert not any("attn2" in n for n in trainable)
    assert len(trainable) == 2 * len(SPEC.modules) * len(SPEC.layers)


def test_masters_are_float32_on_a_bfloat16_base(base: WanTransformer3DModel) -> None:
    model = copy.deepcopy(base)
    for block in model.blocks:
        block.to(torch.bfloat16)
    attach_lora(model, SPEC, 1, "high")
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    x = torch.randn(1, 16, 2, 4, 4)
    loss = predict_velocity(
        model, x, torch.tensor([0.5]), torch.zeros(1, 512, 16), dtype=torch.bfloat16
    )
    loss.sum().backward()
    assert {p.grad.dtype for p in adapter_parameters(model).values()} == {torch.float32}  # pyright: ignore


def trained(base: WanTransformer3DModel) -> WanTransformer3DModel:
    model = with_lora(base)
    for number, parameter in enumerate(adapter_parameters(model).values()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    return model


def test_weights_go_out_and_back(base: WanTransformer3DModel) -> None:
    model = trained(base)
    other = with_lora(base, seed=9)
    load_adapter_weights(other, adapter_weights(model), "file")
    assert torch.equal(output(other), output(model))
    weights = adapter_weights(model)
    weights.pop("blocks.0.attn1.to_q.lora_A.weight")
    with pytest.raises(CheckpointError, match="file: does not fit the adapter of this run"):
        load_adapter_weights(other, weights, "file")


def test_finished_adapters_add_up(base: WanTransformer3DModel) -> None:
    """Applied, with its own alpha; a second one, of other ranks, comes on top."""
    model = trained(base)
    applied = copy.deepcopy(base)
    settings = SPEC.peft_config().to_dict()
    apply_lora(applied, peft_adapter(adapter_weights(model), settings), "one")
    torch.testing.assert_close(output(applied), output(model))
    second = {
        "blocks.1.attn2.to_k.lora_A.weight": torch.randn(2, 32),
        "blocks.1.attn2.to_k.lora_B.weight": torch.randn(32, 2),
        "blocks.0.attn1.to_q.lora_A.weight": torch.randn(3, 32),
        "blocks.0.attn1.to_q.lora_B.weight": torch.randn(32, 3),
    }
    alphas = {"blocks.1.attn2.to_k": 4.0, "blocks.0.attn1.to_q": 3.0}
    apply_lora(applied, peft_adapter(second, {"alpha": 1.0, "alpha_pattern": alphas}), "two")
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
        apply_lora(copy.deepcopy(base), peft_adapter(deep, {}), "file")
    wide = {
        "blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 48),
        "blocks.0.attn1.to_q.lora_B.weight": torch.ones(48, 2),
    }
    with pytest.raises(CheckpointError, match="file: does not fit the model"):
        apply_lora(copy.deepcopy(base), peft_adapter(wide, {}), "file")


def test_layers_that_are_not_there() -> None:
    assert select_layers(None, 3) == (0, 1, 2)
    assert select_layers([2, 0], 3) == (0, 2)
    with pytest.raises(ConfigError, match="has no block 3; the model's blocks are 0 to 2"):
        select_layers([1, 3], 3)
