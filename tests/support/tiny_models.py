"""Tiny models for tests: whole ones in diffusers' layout, and transformers in memory."""

from __future__ import annotations

import copy
from pathlib import Path

import gguf
import numpy as np
import torch
from diffusers import WanTransformer3DModel
from gguf import GGMLQuantizationType
from torch import Tensor, nn

from onewan.demo.tiny_model import write_tiny_model
from onewan.model.precision import keep_float32_islands
from onewan.model.quantized_linear import QuantizedLinear
from onewan.model.weight_storage import packed
from onewan.variants import VariantName


class TinyModels:
    """Tiny models below `folder`, one per variant, each written when it is first asked for.

    Sizes and pixels are those of `onewan.demo.tiny_model.write_tiny_model`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        width: int = 128,
        layers: int = 4,
        pixels_BCFHW: Tensor | None = None,
    ) -> None:
        self._folder = folder
        self._width, self._layers, self._pixels = width, layers, pixels_BCFHW

    def __call__(self, variant: VariantName) -> Path:
        """The folder of the model, under the variant's name."""
        model = self._folder / variant
        if not model.exists():
            write_tiny_model(
                model,
                variant,
                width=self._width,
                layers=self._layers,
                pixels_BCFHW=self._pixels,
            )
        return model


def tiny_transformer(layers: int = 2) -> WanTransformer3DModel:
    """A float32 transformer of width 32 with random weights and biases, frozen."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, text_dim=16, ffn_dim=64, num_layers=layers
    )
    for name, parameter in model.named_parameters():  # diffusers initializes biases to zero
        if name.endswith(".bias"):
            nn.init.normal_(parameter, std=0.1)
    keep_float32_islands(model)
    return model.eval().requires_grad_(False)


def in_bfloat16(base: WanTransformer3DModel) -> WanTransformer3DModel:
    """A copy of `base` as it is loaded in bfloat16: float32 in diffusers' islands."""
    model = copy.deepcopy(base)
    keep = model._keep_in_fp32_modules
    assert keep is not None
    for name, parameter in model.named_parameters():
        if not set(keep) & set(name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def quantized_linear(weight: Tensor, bias: Tensor, how: str) -> QuantizedLinear:
    """A layer whose weight is packed, without a file around it: `how` is "fp8" (without a scale),
    "gguf" (Q8_0), or a form that weights are packed into while loading."""
    form, stored = how, None
    if how == "fp8":
        form, stored = "F8_E4M3", (weight.to(torch.float8_e4m3fn).view(torch.int8), None, None)
    elif how == "gguf":
        data = gguf.quants.quantize(weight.numpy(), GGMLQuantizationType.Q8_0)
        form, stored = "Q8_0", (torch.from_numpy(np.asarray(data).view(np.int8)), None, None)
    bias_of_layer = nn.Parameter(bias, requires_grad=False)
    return QuantizedLinear(form, stored or packed(form, weight), bias_of_layer)


def quantized(base: WanTransformer3DModel, how: str) -> WanTransformer3DModel:
    """A copy of `base` with the linear layers of its blocks quantized."""
    model = copy.deepcopy(base)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.startswith("blocks."):
            model.set_submodule(name, quantized_linear(layer.weight.data, layer.bias.data, how))
    return model
