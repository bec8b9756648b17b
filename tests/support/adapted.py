"""Tiny transformers with adapters of every kind on them, and what they compute."""

from __future__ import annotations

import copy

import gguf
import numpy as np
import torch
from diffusers import WanTransformer3DModel
from gguf import GGMLQuantizationType
from torch import Tensor, nn

from onewan.adapters.adapter_config import AdapterConfig, adapter_config_for
from onewan.adapters.lora import (
    adapter_parameters,
    attach_adapter,
)
from onewan.config.method import (
    AdapterMethod,
    DoraMethod,
    LohaMethod,
    LokrMethod,
    LoraMethod,
    OftMethod,
    PerModule,
)
from onewan.model.forward import predict_velocity
from onewan.model.precision import keep_float32_islands
from onewan.model.quantized_linear import QuantizedLinear

MIXED = (PerModule(modules=("ffn",), rank=2, alpha=3.0), PerModule(modules=("attn2.to_k",), rank=6))
METHODS: dict[str, AdapterMethod] = {
    "lora": LoraMethod(rank=4, alpha=2.0),
    "rslora": LoraMethod(rank=4, alpha=2.0, use_rslora=True, per_module=MIXED),
    "pissa": LoraMethod(rank=4, alpha=2.0, init="pissa"),
    "rs_pissa": LoraMethod(rank=4, alpha=2.0, init="pissa", use_rslora=True, per_module=MIXED),
    "mixed": LoraMethod(rank=4, alpha=2.0, per_module=MIXED),
    "dora": DoraMethod(rank=4, alpha=2.0),
    "loha": LohaMethod(rank=4, alpha=2.0, per_module=MIXED),
    "lokr": LokrMethod(rank=2, alpha=1.0),
    "lokr_both": LokrMethod(rank=1, alpha=2.0, factor=4, decompose_both=True),
    "lokr_whole": LokrMethod(rank=64, alpha=32.0),
    "oft": OftMethod(block_size=16),
}


def tiny_transformer() -> WanTransformer3DModel:
    """Of random weights, biases among them, in float32."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, text_dim=16, ffn_dim=64, num_layers=2
    )
    for name, parameter in model.named_parameters():  # diffusers leaves these at zero
        if name.endswith(".bias"):
            nn.init.normal_(parameter, std=0.1)
    keep_float32_islands(model)
    return model.eval().requires_grad_(False)


def halved(base: WanTransformer3DModel) -> WanTransformer3DModel:
    """`base` as it is loaded in bfloat16: float32 in diffusers' islands."""
    model = copy.deepcopy(base)
    keep = model._keep_in_fp32_modules
    assert keep is not None
    for name, parameter in model.named_parameters():
        if not set(keep) & set(name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def packed(weight: Tensor, bias: Tensor, how: str) -> QuantizedLinear:
    """A layer whose weight stays quantized, without a file around it."""
    layer = QuantizedLinear.__new__(QuantizedLinear)
    nn.Module.__init__(layer)
    layer.out_features, layer.in_features = weight.shape
    if how == "fp8":
        layer.dtype_in_file = "F8_E4M3"
        stored = weight.to(torch.float8_e4m3fn).view(torch.int8)
    else:
        layer.dtype_in_file = "Q8_0"
        data = gguf.quants.quantize(weight.numpy(), GGMLQuantizationType.Q8_0)
        stored = torch.from_numpy(np.asarray(data).view(np.int8))
    layer.weight = nn.Parameter(stored, requires_grad=False)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    layer.register_buffer("scale", None)
    return layer


def quantized(base: WanTransformer3DModel, how: str) -> WanTransformer3DModel:
    model = copy.deepcopy(base)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.startswith("blocks."):
            model.set_submodule(name, packed(layer.weight.data, layer.bias.data, how))
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 16, 2, 4, 4, generator=generator)
    return x, torch.tensor([0.5, 0.9]), torch.randn(2, 512, 16, generator=generator)


def output(model: WanTransformer3DModel, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad():
        return predict_velocity(model, *inputs(), dtype=dtype)


def attached(
    base: WanTransformer3DModel, method: AdapterMethod, *, seed: int = 1, name: str = "high"
) -> tuple[WanTransformer3DModel, AdapterConfig]:
    model = copy.deepcopy(base)
    spec = adapter_config_for(method, model, None)
    attach_adapter(model, spec, seed, name)
    return model, spec


def shift(model: WanTransformer3DModel, std: float = 0.1) -> None:
    """As far from the start as after a long training."""
    for number, parameter in enumerate(adapter_parameters(model).values()):
        generator = torch.Generator().manual_seed(number)
        parameter.data += std * torch.randn(parameter.shape, generator=generator)


def trained(
    base: WanTransformer3DModel, method: AdapterMethod
) -> tuple[WanTransformer3DModel, AdapterConfig]:
    model, spec = attached(base, method)
    shift(model, 0.3 if spec.kind == "loha" else 0.1)  # a product of four counts for little
    return model, spec


def relative(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got.detach().double() - want.detach().double()).norm() / want.detach().norm())


def gradients(
    model: WanTransformer3DModel, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    parameters = adapter_parameters(model)
    for parameter in parameters.values():
        parameter.grad = None
    target = torch.randn(2, 16, 2, 4, 4, generator=torch.Generator().manual_seed(6))
    loss = nn.functional.mse_loss(predict_velocity(model, *inputs(), dtype=dtype), target)
    loss.backward()
    grads = {}
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        grads[name.replace(".default", "")] = parameter.grad.clone()
    return grads
