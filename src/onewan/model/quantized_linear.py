"""Linear layers whose frozen weight stays in memory as the file has it: fp8 (with scales) or GGUF.

Each use expands the weight to float32 (the values of `ComponentFile.read`), rounds it to the type
that the product is computed in, and frees it. The backward pass expands it again, so autograd keeps
only the packed bytes: 14 GB for an A14B expert in fp8 where bfloat16 takes 29. A product therefore
equals that of the expanded model, and LoRA adapters train on it unchanged.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from onewan.dtypes import FP8, from_safetensors_name
from onewan.formats.weights import ComponentFile, StoredWeight, scaled


@cache
def _gguf_decoders() -> dict[str, Any]:
    # diffusers' ports of the reference decoders to PyTorch; the same to the bit, a test shows.
    from diffusers.quantizers.gguf.utils import dequantize_functions

    return {kind.name: function for kind, function in dequantize_functions.items()}


def can_stay_quantized(entry: StoredWeight) -> bool:
    """Whether a matrix that is stored so can be expanded on every device."""
    return entry.packing == "fp8" or (
        entry.packing == "gguf" and entry.info.dtype in _gguf_decoders()
    )


def expanded(stored: Tensor, scale: Tensor | None, dtype: str, shape: tuple[int, int]) -> Tensor:
    """float32 `shape`: the numbers that `stored`, bytes of the file's type `dtype`, stand for."""
    if dtype in FP8:
        return scaled(stored.view(from_safetensors_name(dtype)), scale, "the scale")
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]
    blocks = stored.view(torch.uint8).reshape(-1, size)
    return _gguf_decoders()[dtype](blocks, block, size, dtype=torch.float32).reshape(shape)


class QuantizedLinear(nn.Linear):
    """`nn.Linear` with a packed weight. `weight` is int8 [out, bytes of a row] and never trains.

    int8 and not what the bytes are: PEFT would create adapters in a floating type of 8 bits, and
    transformers' T5 casts the activations in front of ``wo`` to the type of its weight unless that
    is int8.
    """

    scale: Tensor | None

    def __init__(
        self, weights: ComponentFile, name: str, bias: nn.Parameter | None, device: torch.device
    ) -> None:
        """For weight `name` of `weights`, which `can_stay_quantized`. On the CPU the bytes
        stay in the file's mapping."""
        nn.Module.__init__(self)  # that of nn.Linear would allocate the expanded weight
        entry = weights.entries[name]
        self.out_features, self.in_features = entry.info.shape
        self.dtype_in_file = entry.info.dtype
        stored = weights.file.read(entry.key, keep_mapped=device.type == "cpu").view(torch.int8)
        self.weight = nn.Parameter(stored.to(device), requires_grad=False)
        self.bias = bias
        scale = None if entry.scale is None else weights.file.read(entry.scale).float()
        if scale is not None:  # the wrong shape is found here, and not in the first step
            blank = torch.empty(entry.info.shape, device="meta")
            scaled(blank, scale.to("meta"), f"{weights.path}: {entry.scale}")
            scale = scale.to(device)
        self.register_buffer("scale", scale)

    def expanded_weight(self) -> Tensor:
        """float32 [out, in]: what the packed weight stands for."""
        shape = (self.out_features, self.in_features)
        return expanded(self.weight, self.scale, self.dtype_in_file, shape)

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        dtype = input.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        bias = None if self.bias is None else self.bias.to(dtype)
        return _Product.apply(input.to(dtype), self.weight, self.scale, bias, self)  # pyright: ignore[reportReturnType]

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        # `.to(bfloat16)` on a whole model would round the scale, and with it every weight.
        exact = self.scale
        super()._apply(fn, recurse)
        if exact is not None and self.scale is not None and self.scale.dtype != exact.dtype:
            self.scale = exact.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dtype_in_file={self.dtype_in_file}"


class _Product(torch.autograd.Function):
    """input [..., in] -> [..., out], keeping the packed weight for the backward pass and no other.

    `input` and `bias` come in the type of the product already.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        layer: QuantizedLinear,
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.form = (layer.dtype_in_file, (layer.out_features, layer.in_features))
        numbers = expanded(weight, scale, *ctx.form).to(input.dtype)
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input, numbers, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        to_input = to_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                weight, scale = ctx.saved_tensors
                to_input = grad @ expanded(weight, scale, *ctx.form).to(grad.dtype)
            if ctx.needs_input_grad[3]:
                to_bias = grad.flatten(0, -2).sum(0)
        return to_input, None, None, to_bias, None
