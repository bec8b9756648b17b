"""Adapters of every kind on tiny transformers: settings, attaching, output and gradients."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
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
from onewan.formats.adapter import ModuleAdapter
from onewan.formats.lora import LINEARS, AdapterLayout
from onewan.formats.lora_files import AdapterFile
from onewan.model.forward import predict_velocity

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


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 16, 2, 4, 4, generator=generator)
    return x, torch.tensor([0.5, 0.9]), torch.randn(2, 512, 16, generator=generator)


def output(model: WanTransformer3DModel, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad():
        return predict_velocity(model, *inputs(), dtype=dtype)


@torch.no_grad()
def effective_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that a float32 model computes with, by the names of its own: those of linear
    layers that an adapter lies over as their outputs show them."""
    weights = dict(model.state_dict())
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer._forward_hooks:
            zero = layer(torch.zeros(1, layer.in_features))
            weights[f"{name}.weight"] = (layer(torch.eye(layer.in_features)) - zero).T
    return weights


def attached(
    base: WanTransformer3DModel, method: AdapterMethod, *, seed: int = 1, name: str = "high"
) -> tuple[WanTransformer3DModel, AdapterConfig]:
    model = copy.deepcopy(base)
    config = adapter_config_for(method, model, None)
    attach_adapter(model, config, seed, name)
    return model, config


def perturb(model: WanTransformer3DModel, std: float = 0.1) -> None:
    """Move the adapter as far from its initial values as a long training does."""
    for number, parameter in enumerate(adapter_parameters(model).values()):
        generator = torch.Generator().manual_seed(number)
        parameter.data += std * torch.randn(parameter.shape, generator=generator)


def trained(
    base: WanTransformer3DModel, method: AdapterMethod
) -> tuple[WanTransformer3DModel, AdapterConfig]:
    model, config = attached(base, method)
    perturb(model, 0.3 if config.kind == "loha" else 0.1)  # a product of four small factors is tiny
    return model, config


def lora_config(
    *, rank: int, alpha: float, layers: Sequence[int], modules: Sequence[str], dropout: float = 0.0
) -> AdapterConfig:
    """A plain LoRA of one rank. `modules` are layers within a block (``attn1.to_q``), or what the
    names of several begin with (``attn1``)."""
    inside = [name for name in LINEARS if name.startswith(tuple(modules))]
    names = tuple(f"blocks.{layer}.{name}" for layer in layers for name in inside)
    return AdapterConfig(
        kind="lora",
        modules=names,
        ranks=dict.fromkeys(names, rank),
        alphas=dict.fromkeys(names, float(alpha)),
        dropout=dropout,
    )


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


def file_of(modules: dict[str, ModuleAdapter]) -> AdapterFile:
    """The file that would be read if `modules` had been written to it."""
    layout = AdapterLayout(
        prefix="diffusion_model.",
        names="official",
        trainer=None,
        experts=(),
        modules={},
        kinds={},
        ranks={},
        unknown=(),
        module_errors=(),
    )
    return AdapterFile(
        path=Path("start.safetensors"), layout=layout, modules=modules, expert=None, metadata={}
    )
