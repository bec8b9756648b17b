"""Linear layers whose frozen weight stays quantized in memory: fp8 (with scales) or GGUF.

Each use dequantizes the weight to float32 (the values of `ComponentFile.read`), rounds it to the
type of the product, and frees it. The backward pass dequantizes it again, so autograd keeps only
the packed bytes: 14 GB for an A14B expert in fp8, where bfloat16 takes 29. The products therefore
equal those of the dequantized model, and LoRA adapters train on the layer unchanged.
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
from onewan.formats.finite import all_finite
from onewan.formats.weights import ComponentFile, StoredWeight, dequantize_fp8


@cache
def _gguf_decoders() -> dict[str, Any]:
    # diffusers' ports of the reference decoders to PyTorch, tested to be bit-exact with them.
    # Imported lazily: the import takes a while, and only GGUF files need it.
    from diffusers.quantizers.gguf.utils import dequantize_functions

    return {kind.name: function for kind, function in dequantize_functions.items()}


def can_stay_quantized(entry: StoredWeight) -> bool:
    """Whether a matrix in this form can be dequantized on every device: the reference decoders of
    the other GGUF types run on the CPU only."""
    return entry.packing == "fp8" or (
        entry.packing == "gguf" and entry.info.dtype in _gguf_decoders()
    )


def dequantized(stored: Tensor, scale: Tensor | None, dtype: str, shape: tuple[int, int]) -> Tensor:
    """The values, float32 of `shape`, of the bytes `stored` of the type `dtype` (a name of
    safetensors or GGUF); `scale` is that of an fp8 weight."""
    if dtype in FP8:
        return dequantize_fp8(stored.view(from_safetensors_name(dtype)), scale, "the scale")
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]
    blocks = stored.view(torch.uint8).reshape(-1, size)
    return _gguf_decoders()[dtype](blocks, block, size, dtype=torch.float32).reshape(shape)


class QuantizedLinear(nn.Linear):
    """`nn.Linear` with a packed weight: `weight` is int8 [out, bytes of a row], never trained.

    int8 instead of the type in the file, since PEFT would create adapters in an 8-bit floating
    type, and transformers' T5 casts the activations in front of ``wo`` to the type of its weight
    unless that is int8.
    """

    scale: Tensor | None

    def __init__(
        self, weights: ComponentFile, name: str, bias: nn.Parameter | None, device: torch.device
    ) -> None:
        """For the weight `name` of `weights`, for which `can_stay_quantized` is true. On the CPU
        the bytes stay mapped from the file. CheckpointError if the scale has a wrong shape."""
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight of full size
        entry = weights.entries[name]
        self.out_features, self.in_features = entry.info.shape
        self.dtype_in_file = entry.info.dtype
        stored = weights.file.read(entry.key, keep_mapped=device.type == "cpu").view(torch.int8)
        self.weight = nn.Parameter(stored.to(device), requires_grad=False)
        self.bias = bias
        scale = None if entry.scale is None else weights.file.read(entry.scale).float()
        if scale is not None:  # checks the shape now instead of in the first step
            blank = torch.empty(entry.info.shape, device="meta")
            dequantize_fp8(blank, scale.to("meta"), f"{weights.path}: {entry.scale}")
            scale = scale.to(device)
        self.register_buffer("scale", scale)

    def dequantized_weight(self) -> Tensor:
        """The dequantized weight, float32 [out, in]."""
        shape = (self.out_features, self.in_features)
        return dequantized(self.weight, self.scale, self.dtype_in_file, shape)

    def is_finite(self) -> bool:
        """Whether no value of an fp8 weight and of its scale is NaN or infinite. GGUF's scales of
        blocks are not checked, since that would take dequantizing."""
        if self.scale is not None and not all_finite(self.scale):
            return False
        if self.dtype_in_file not in FP8:
            return True
        return all_finite(self.weight.view(from_safetensors_name(self.dtype_in_file)))

    def forward(self, input: Tensor) -> Tensor:
        # A custom autograd function is not cast by autocast, so the type is determined here.
        device = input.device.type
        dtype = input.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        bias = None if self.bias is None else self.bias.to(dtype)
        return _Product.apply(input.to(dtype), self.weight, self.scale, bias, self)  # pyright: ignore[reportReturnType]

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        # `.to(bfloat16)` on a whole model would round the scale, and thereby change every weight.
        exact = self.scale
        super()._apply(fn, recurse)
        if exact is not None and self.scale is not None and self.scale.dtype != exact.dtype:
            self.scale = exact.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dtype_in_file={self.dtype_in_file}"


class _Product(torch.autograd.Function):
    """input [..., in] -> [..., out], saving only the packed weight for the backward pass.

    `input` and `bias` have the type of the product.
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
        values = dequantized(weight, scale, *ctx.form).to(input.dtype)
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input, values, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_input = grad_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                weight, scale = ctx.saved_tensors
                grad_input = grad @ dequantized(weight, scale, *ctx.form).to(grad.dtype)
            if ctx.needs_input_grad[3]:
                grad_bias = grad.flatten(0, -2).sum(0)
        return grad_input, None, None, grad_bias, None
