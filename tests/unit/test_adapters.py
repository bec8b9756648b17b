"""Adapters of every kind in training: output, gradients, precision, memory, saving and restoring.

The reference is the base model with `ModuleAdapter.difference` added to its weights, differentiated
by plain autograd; that difference is tested against PEFT in tests/formats.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from support.adapters import (
    METHODS,
    attached,
    gradients,
    inputs,
    output,
    perturb,
    relative,
    trained,
)
from support.tiny_models import in_bfloat16, quantized, tiny_transformer
from torch import Tensor, nn
from torch.func import functional_call

from onewan.adapters.adapter_config import AdapterConfig
from onewan.adapters.lora import (
    adapter_parameters,
    adapter_weights,
    adapters_disabled,
    base_weight,
    is_lora_b,
    load_adapter_weights,
    top_singular_vectors,
)
from onewan.config.method import (
    DoraMethod,
    LoraMethod,
    OftMethod,
)
from onewan.errors import CheckpointError
from onewan.formats.lora_files import parse_adapter
from onewan.model.forward import predict_velocity
from onewan.model.quantized_linear import QuantizedLinear

KINDS = pytest.mark.parametrize("kind", METHODS)


@pytest.fixture(scope="module")
def base() -> WanTransformer3DModel:
    return tiny_transformer()


@pytest.fixture(scope="module")
def half(base: WanTransformer3DModel) -> WanTransformer3DModel:
    return in_bfloat16(base)


# --------------------------------------------------------------------------------------- at first


@KINDS
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_new_adapter_changes_no_output_and_is_all_that_trains(base, half, kind, precision):
    """Bit-exact, on all linear layers, in both precisions."""
    chosen, dtype = (base, torch.float32) if precision == "float32" else (half, torch.bfloat16)
    method = METHODS[kind].model_copy(update={"modules": ("all_linears",)})
    if isinstance(method, OftMethod):
        method = method.model_copy(update={"block_size": 8})
    model, _ = attached(chosen, method)
    assert torch.equal(output(model, dtype), output(chosen, dtype))
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trainable.keys() == adapter_parameters(model).keys()
    assert {p.dtype for p in trainable.values()} == {torch.float32}


@KINDS
def test_initial_weights_depend_on_seed_expert_layer_and_part(base, kind):
    first = adapter_weights(attached(base, METHODS[kind])[0])
    again = adapter_weights(attached(base, METHODS[kind])[0])
    assert first.keys() == again.keys()
    assert all(torch.equal(again[n], first[n]) for n in first)
    drawn = {n: w for n, w in first.items() if w.any() and "magnitude" not in n}
    if kind == "oft":
        assert not drawn
        return
    seeds = adapter_weights(attached(base, METHODS[kind], seed=2)[0])
    names = adapter_weights(attached(base, METHODS[kind], name="low")[0])
    if "pissa" in kind:  # the weight decides, whatever the seed
        name = "blocks.0.attn1.to_q.lora_{}.weight"
        product = [w[name.format("B")] @ w[name.format("A")] for w in (first, seeds, names)]
        assert relative(product[1], product[0]) < 1e-4 and relative(product[2], product[0]) < 1e-4
        return
    matrices = [
        tuple(w.flatten().tolist())
        for s in (first, seeds, names)
        for n, w in s.items()
        if n in drawn
    ]
    assert len(set(matrices)) == 3 * len(drawn) >= 60


def test_initial_weights_have_pefts_distribution(base):
    """Kaiming uniform, a = sqrt 5: uniform within 1 / sqrt(fan in)."""
    for kind, part, fan in (
        ("lora", "lora_A.weight", 32),
        ("loha", "hada_w1_a", 4),
        ("lokr", "lokr_w2_b", 8),
    ):
        weights = adapter_weights(attached(base, METHODS[kind])[0])
        drawn = weights[f"blocks.0.attn1.to_q.{part}"]
        assert drawn.shape[1] == fan
        bound = fan**-0.5
        assert 0.7 * bound < drawn.abs().max() <= bound
    zero = {"lora": "lora_B.weight", "loha": "hada_w2_b", "lokr": "lokr_w1", "oft": "oft_R.weight"}
    for kind, part in zero.items():
        weights = adapter_weights(attached(base, METHODS[kind])[0])
        assert not any(w.any() for n, w in weights.items() if n.endswith(part))


def test_pissa_is_initialized_from_the_largest_singular_vectors(base):
    model, config = attached(base, METHODS["rs_pissa"])
    weights = adapter_weights(model)
    for module in config.modules:
        weight = base.get_submodule(module).weight.double()
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        rank = config.ranks[module]
        best = u[:, :rank] * s[:rank] @ v[:rank]
        a, b = (weights[f"{module}.lora_{which}.weight"] for which in "AB")
        assert relative(config.scale(module) * (b @ a), best) < 1e-4
        torch.testing.assert_close(a.norm(), b.norm())
        assert torch.equal(a, weights[f"{module}.pissa_A"])
        assert torch.equal(b, weights[f"{module}.pissa_B"])


def test_top_singular_vectors_of_wide_weights_are_found():
    """Where subspace iteration is no longer exact: 16 columns to spare of 300."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(400, 300, generator=generator)
    u, s, v = top_singular_vectors(weight, 8, seed=3)
    want = torch.linalg.svdvals(weight.double())[:8]
    torch.testing.assert_close(s.double(), want, rtol=0.02, atol=0)
    assert relative(u.T @ u, torch.eye(8)) < 1e-5 and relative(v @ v.T, torch.eye(8)) < 1e-5
    assert all(map(torch.equal, top_singular_vectors(weight, 8, seed=3), (u, s, v)))


# --------------------------------------------------------------------------------------- numerics


def reference(
    base: WanTransformer3DModel, config: AdapterConfig, weights: Mapping[str, Tensor], settings: Any
) -> dict[str, Tensor]:
    """Weights of the base model with what the adapter adds, by plain autograd."""
    merged: dict[str, Tensor] = {}
    for module, adapter in parse_adapter(weights, settings, source="PEFT").items():
        weight = base.get_submodule(module).weight.detach()
        if config.kind == "dora":  # the length is a constant to the gradient, by definition
            product = adapter.tensors["lora_B"] @ adapter.tensors["lora_A"]
            whole = weight + adapter.scale * product
            factor = adapter.tensors["magnitude"] / whole.norm(dim=1).detach()
            merged[f"{module}.weight"] = factor[:, None] * whole
        else:
            difference = adapter.difference(weight)
            assert difference is not None
            merged[f"{module}.weight"] = weight + difference
    return merged


@KINDS
def test_output_and_gradients_are_those_of_the_merged_weights(base, kind):
    model, config = trained(base, METHODS[kind])
    weights = {n: w.requires_grad_() for n, w in adapter_weights(model).items()}
    settings = config.peft_config().to_dict()
    leaves = dict(weights)
    if config.pissa:
        weights = {n: w for n, w in leaves.items() if "pissa" not in n}
        start = {
            n: leaves[n.replace("lora_", "pissa_").removesuffix(".weight")].detach()
            for n in weights
        }
        now = reference(base, config, weights, settings)
        before = reference(base, config, start, settings)
        own = base.state_dict()
        merged = {n: own[n] + now[n] - before[n] for n in now}
    else:
        merged = reference(base, config, weights, settings)
    x, t, text = inputs()
    want = functional_call(base, merged, (x, t * 1000, text), {"return_dict": False})[0]
    assert relative(output(model), want) < 1e-5
    assert relative(want, output(base)) > 1e-2
    target = torch.randn(2, 16, 2, 4, 4, generator=torch.Generator().manual_seed(6))
    nn.functional.mse_loss(want, target).backward()
    got = gradients(model)
    assert got.keys() == weights.keys()
    whole = torch.cat([got[n].flatten() for n in weights])
    assert relative(whole, torch.cat([w.grad.flatten() for w in weights.values()])) < 1e-5
    for name, weight in weights.items():
        assert relative(got[name], weight.grad) < 1e-4, name


@KINDS
def test_gradient_checkpointing_changes_no_gradient(base, kind):
    model, _ = trained(base, METHODS[kind])
    plain = gradients(model)
    model.enable_gradient_checkpointing()
    model.train()
    again = gradients(model)
    assert all(torch.equal(again[name], plain[name]) for name in plain)


@KINDS
def test_a_bfloat16_base_gives_float32_gradients_within_the_error_of_bfloat16(half, kind):
    """The same adapter on the same values; the bounds are those of a LoRA."""
    rounded = copy.deepcopy(half).to(torch.float32)
    exact, _ = trained(rounded, METHODS[kind])
    coarse, _ = attached(half, METHODS[kind])
    load_adapter_weights(coarse, adapter_weights(exact), "memory")
    assert relative(output(coarse, torch.bfloat16), output(exact)) < 0.01
    want, got = gradients(exact), gradients(coarse, torch.bfloat16)
    assert {g.dtype for g in got.values()} == {torch.float32}
    whole = torch.cat([g.flatten() for g in got.values()])
    assert relative(whole, torch.cat([g.flatten() for g in want.values()])) < 0.03


@KINDS
def test_adapted_layers_return_the_precision_of_their_base_layers(half, kind):
    """No activation is upcast, whatever comes in."""
    model, config = trained(half, METHODS[kind])
    for module in config.modules:
        layer = model.get_submodule(module)
        width = half.get_submodule(module).in_features
        for dtype in (torch.float32, torch.bfloat16):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert layer(torch.randn(3, width, dtype=dtype)).dtype == torch.bfloat16


def kept(model: WanTransformer3DModel) -> int:
    """Bytes of activations that autograd keeps, each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape[:2] == (2, 8) or tensor.shape[:1] == (16,):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = predict_velocity(model, *inputs(), dtype=torch.bfloat16)
    del result
    return sum(storages.values())


@pytest.mark.parametrize("kind", ["pissa", "dora", "loha", "lokr", "oft"])
def test_other_kinds_save_little_more_for_the_backward_pass_than_lora(half, kind):
    lora = kept(attached(half, METHODS["lora"])[0])
    assert kept(attached(half, METHODS[kind])[0]) < 1.5 * lora


@KINDS
def test_adapters_get_activations_in_their_precision(half, kind):
    model, config = trained(half, METHODS[kind])
    seen = []
    for module in config.modules:
        layer = model.get_submodule(module)
        assert not layer.cast_input_dtype_enabled
        if METHODS[kind].kind in ("lora", "dora"):
            layer.lora_A["default"].register_forward_pre_hook(
                lambda _module, args: seen.append(args[0].dtype)
            )
    output(model, torch.bfloat16)
    if METHODS[kind].kind in ("lora", "dora"):  # float32 out of norms, bfloat16 out of products
        assert seen.count(torch.bfloat16) >= 6 and len(seen) == len(config.modules)


def test_oft_rotates_inputs_in_the_precision_that_they_come_in(half):
    """Autocast would round the float32 residual stream's share before it is added."""
    model, _ = trained(half, METHODS["oft"])
    layer = model.blocks[0].attn1.to_q
    x = torch.randn(5, 32)
    exact = layer.rotation_offset(x, "default")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.rotation_offset(x, "default"), exact)
        assert layer.rotation_offset(x.bfloat16(), "default").dtype == torch.bfloat16


@pytest.mark.parametrize("how", ["fp8", "gguf", "F8_E4M3", "int8", "nf4"])
@KINDS
def test_a_quantized_base_computes_as_its_expanded_weights(base, kind, how):
    small = quantized(base, how)
    whole = copy.deepcopy(base)
    for name, layer in small.named_modules():
        if isinstance(layer, QuantizedLinear):
            whole.get_submodule(name).weight.data = layer.dequantized_weight()
    ours, theirs = attached(small, METHODS[kind])[0], attached(whole, METHODS[kind])[0]
    assert torch.equal(output(ours), output(small))
    perturb(ours)
    perturb(theirs)
    assert relative(output(ours), output(theirs)) < 1e-6
    got, want = gradients(ours), gradients(theirs)
    assert all(relative(got[name], want[name]) < 1e-5 for name in want)


def test_dropout_applies_to_the_inputs_of_the_adapter_only(base):
    for method in (
        LoraMethod(rank=4, dropout=0.5),
        LoraMethod(rank=4, dropout=0.5, init="pissa"),
        DoraMethod(rank=4, dropout=0.5),
    ):
        model, _ = trained(base, method)
        calm = output(model)
        model.train()
        torch.manual_seed(0)
        first, second = output(model), output(model)
        assert not torch.equal(first, second) and not torch.equal(first, calm)
        with adapters_disabled(model):
            assert torch.equal(output(model), output(base))


# ------------------------------------------------------------------------------------ on and off


@KINDS
def test_with_adapters_disabled_the_model_is_the_base_model(base, kind):
    model, _ = trained(base, METHODS[kind])
    grads = gradients(model)
    on = output(model)
    parameters = adapter_parameters(model)
    with adapters_disabled(model):
        assert torch.equal(output(model), output(base))
        assert all(p.requires_grad for p in parameters.values())
        with adapters_disabled(model):
            pass
        assert torch.equal(output(model), output(base))
    assert torch.equal(output(model), on)
    assert all(torch.equal(p.grad, grads[n.replace(".default", "")]) for n, p in parameters.items())


@KINDS
def test_adapter_weights_are_restored_and_wrong_ones_refused(base, kind):
    model, _ = trained(base, METHODS[kind])
    other, _ = attached(base, METHODS[kind], seed=9)
    weights = adapter_weights(model)
    before = {n: w.clone() for n, w in weights.items()}
    load_adapter_weights(other, weights, "file")
    assert torch.equal(output(other), output(model))
    perturb(model)
    assert all(torch.equal(weights[n], before[n]) for n in weights)  # copies
    missing = {n: w for n, w in weights.items() if n != next(iter(weights))}
    wider = {n: torch.cat([w, w]) for n, w in weights.items()}
    for wrong in (missing, wider, {**weights, "blocks.0.x": torch.zeros(1)}):
        with pytest.raises(CheckpointError, match="file: does not fit the adapter of this run"):
            load_adapter_weights(other, wrong, "file")


def test_is_lora_b_holds_for_b_of_lora_and_dora_only(base):
    for kind in METHODS:
        names = adapter_parameters(attached(base, METHODS[kind])[0])
        found = sum(map(is_lora_b, names))
        assert found == (20 if METHODS[kind].kind in ("lora", "dora") else 0)


def test_base_weights_are_those_under_the_adapter(base):
    model, _ = trained(base, METHODS["pissa"])
    assert torch.equal(
        base_weight(model, "blocks.0.attn1.to_q", "weight"), base.blocks[0].attn1.to_q.weight
    )
    assert torch.equal(
        base_weight(model, "blocks.0.attn1.to_q", "bias"), base.blocks[0].attn1.to_q.bias
    )
    assert torch.equal(base_weight(model, "proj_out", "weight"), base.proj_out.weight)
    small = quantized(base, "gguf")
    layer = small.get_submodule("blocks.0.ffn.net.2")
    assert isinstance(layer, QuantizedLinear)
    assert torch.equal(
        base_weight(small, "blocks.0.ffn.net.2", "weight"), layer.dequantized_weight()
    )
