"""Linear layers whose frozen weight stays packed in memory: fp8, int8, nf4 or a type of GGUF.

Each use expands the weight to the type of the product and frees it. The backward pass expands it
again, so autograd keeps only the packed bytes: 14 GB for an A14B expert in fp8, where bfloat16
takes 29. The products therefore equal those of the expanded model, and LoRA adapters train on the
layer unchanged.

An expanded weight takes `in * out` values of the product's type, and while it is computed at most
10 bytes more for each of `weight_storage.GROUP` values, which are 80 MiB.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from onewan.model.weight_storage import Stored, expanded, is_finite, shape_of


class QuantizedLinear(nn.Linear):
    """`nn.Linear` with a packed weight, which is never trained.

    Everything that is stored is a frozen parameter or a buffer of the layer, and is read anew at
    each use, so that its data may be exchanged between two uses (`onewan.memory.streaming`).
    """

    scale: Tensor | None
    levels: Tensor | None

    def __init__(self, form: str, stored: Stored, bias: nn.Parameter | None) -> None:
        """For a matrix `stored` in `form` (a name of `onewan.model.weight_storage`)."""
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight of full size
        weight, scale, levels = stored
        self.form = form
        self.out_features, self.in_features = shape_of(form, stored)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias
        self.register_buffer("scale", scale)
        self.register_buffer("levels", levels, persistent=False)

    @property
    def stored(self) -> Stored:
        """The packed weight."""
        return self.weight, self.scale, self.levels

    def dequantized_weight(self) -> Tensor:
        """The expanded weight, float32 [out, in]."""
        return expanded(self.form, self.stored)

    def is_finite(self) -> bool:
        """Whether no value is NaN or infinite; GGUF's scales of blocks are not checked."""
        return is_finite(self.form, self.stored)

    def forward(self, input: Tensor) -> Tensor:
        # A custom autograd function is not cast by autocast, so the type is determined here.
        device = input.device.type
        dtype = input.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        bias = None if self.bias is None else self.bias.to(dtype)
        return _Product.apply(input.to(dtype), bias, self.form, *self.stored)  # pyright: ignore[reportReturnType]

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        # `.to(bfloat16)` on a whole model would round the scales, and thereby change every weight.
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = self.get_buffer(name)
            if after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, form={self.form}"


class _Product(torch.autograd.Function):
    """input [..., in] -> [..., out], saving only the packed weight for the backward pass.

    `input` and `bias` have the type of the product.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        input: Tensor,
        bias: Tensor | None,
        form: str,
        weight: Tensor,
        scale: Tensor | None,
        levels: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, levels)
        ctx.form = form
        values = expanded(form, (weight, scale, levels), input.dtype)
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input, values, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_input = grad_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_input = grad @ expanded(ctx.form, ctx.saved_tensors, grad.dtype)
            if ctx.needs_input_grad[1]:
                grad_bias = grad.flatten(0, -2).sum(0)
        return grad_input, grad_bias, None, None, None, None
