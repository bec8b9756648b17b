"""Full fine-tuning: selected weights, their precision, and results in mixed precision."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from onewan.adapters.select import select_weights
from onewan.adapters.weights import load_weights, train_weights, weights_of
from onewan.errors import CheckpointError, ConfigError
from onewan.model.forward import predict_velocity
from onewan.model.precision import keep_float32_islands
from onewan.model.quantized_linear import QuantizedLinear


@pytest.fixture(scope="module")
def half() -> WanTransformer3DModel:
    """As it is loaded in bfloat16: float32 in the modules that diffusers keeps in float32."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, text_dim=16, ffn_dim=64, num_layers=2
    )
    keep = model._keep_in_fp32_modules
    assert keep is not None
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.1)
        if not set(keep) & set(name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    keep_float32_islands(model)
    return model.eval()


def step(model: WanTransformer3DModel, dtype: torch.dtype) -> Tensor:
    """The prediction; a backward pass leaves gradients on the trained weights."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 16, 2, 4, 4, generator=generator)
    text = torch.randn(2, 512, 16, generator=generator)
    prediction = predict_velocity(model, x, torch.tensor([0.5, 0.9]), text, dtype=dtype)
    prediction.square().mean().backward()
    return prediction.detach()


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def gradient(parameters: dict[str, nn.Parameter]) -> Tensor:
    grads = [p.grad for p in parameters.values()]
    assert all(g is not None for g in grads), [n for n, p in parameters.items() if p.grad is None]
    return torch.cat([g.float().flatten() for g in grads if g is not None])


@pytest.mark.parametrize("precision", ["stochastic", "kahan", "float32"])
def test_only_the_selected_weights_are_trained_in_the_given_precision(half, precision):
    model = copy.deepcopy(half)
    names = select_weights(model, ["norms", "cross_attention"], [1])
    stored = {n: p.dtype for n, p in model.named_parameters()}
    parameters = train_weights(model, names, precision)
    assert tuple(parameters) == names
    own = dict(model.named_parameters())
    assert all(own[n] is p for n, p in parameters.items())
    assert {n for n, p in own.items() if p.requires_grad} == set(names)
    want = dict.fromkeys(names, torch.float32) if precision == "float32" else stored
    assert {n: p.dtype for n, p in parameters.items()} == {n: want[n] for n in names}
    assert all(p.dtype == stored[n] for n, p in own.items() if n not in parameters)
    assert all(torch.equal(p, half.get_parameter(n).float()) for n, p in parameters.items())


@pytest.mark.filterwarnings("error:Mismatch dtype")  # PyTorch's warning about a slow, large norm
@pytest.mark.parametrize("modules", ["all", "norms", "biases", "ffn", "attention"])
def test_mixed_precision_results_are_within_bfloat16_of_float32(half, modules):
    """Against the same weights in float32 everywhere, without autocast."""
    exact = copy.deepcopy(half).float()
    expected = train_weights(exact, select_weights(exact, [modules], None), "float32")
    want = step(exact, torch.float32)
    coarse = None
    for precision in ("stochastic", "float32"):
        model = copy.deepcopy(half)
        parameters = train_weights(model, select_weights(model, [modules], None), precision)
        assert relative(step(model, torch.bfloat16), want) < 0.01
        assert relative(gradient(parameters), gradient(expected)) < 0.03
        coarse = coarse or relative(gradient(parameters), gradient(expected))
        assert relative(gradient(parameters), gradient(expected)) < 1.1 * coarse


def test_gradient_checkpointing_changes_no_gradient(half):
    for precision in ("stochastic", "float32"):
        model = copy.deepcopy(half)
        parameters = train_weights(model, select_weights(model, ["all"], None), precision)
        step(model, torch.bfloat16)
        plain = gradient(parameters)
        model.zero_grad()
        model.enable_gradient_checkpointing()
        model.train()
        step(model, torch.bfloat16)
        assert torch.equal(gradient(parameters), plain)


def test_a_small_update_is_kept_by_float32_weights_only(half):
    """An update of less than half a bfloat16 unit is lost in bfloat16 and kept in float32."""
    for precision, kept in (("stochastic", False), ("float32", True)):
        model = copy.deepcopy(half)
        name = "blocks.0.ffn.net.2.weight"
        weight = train_weights(model, [name], precision)[name]
        before = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(1 + 2**-12)
        assert torch.equal(weight, before) != kept


def test_quantized_weights_are_refused_by_name(half):
    model = copy.deepcopy(half)
    layer = model.get_submodule("blocks.0.ffn.net.2")
    layer.__class__ = QuantizedLinear
    names = select_weights(model, ["ffn"], None)
    with pytest.raises(ConfigError, match=r"memory\.weights: 1 of .*0\.ffn\.net\.2\.w"):
        train_weights(model, names, "float32")
    assert train_weights(model, select_weights(model, ["biases"], None), "float32")


def test_weights_are_read_and_loaded_bit_exact(half):
    model, other = copy.deepcopy(half), copy.deepcopy(half)
    names = select_weights(model, ["self_attention", "norms"], None)
    parameters = train_weights(model, names, "stochastic")
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn(parameter.shape))
    weights = weights_of(parameters)
    load_weights(train_weights(other, names, "stochastic"), weights, "file")
    assert all(torch.equal(other.get_parameter(n), p) for n, p in parameters.items())
    with torch.no_grad():
        parameters[names[0]].zero_()
    assert weights[names[0]].any()  # a copy
    fewer = {n: w for n, w in weights.items() if n != names[0]}
    wider = {**weights, names[0]: torch.zeros(3)}
    finer = {n: w.float() for n, w in weights.items()}
    for wrong in (fewer, wider, finer, {**weights, "x": torch.zeros(1)}):
        with pytest.raises(CheckpointError, match="file: does not fit the weights that this run t"):
            load_weights(parameters, wrong, "file")
