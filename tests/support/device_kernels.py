"""Gives the simulated accelerator the memory of two kernels that CUDA has and the CPU has not.

The simulation's kernels are the CPU's, whose temporary tensors count as device memory where PyTorch
composes an operator of several ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from onewan.model import attention_backends

_rms_norm: Any = F.rms_norm


class _FusedRmsNorm(torch.autograd.Function):
    """RMSNorm as one kernel, ``aten._fused_rms_norm``: saves its input and a number for each row,
    and allocates results only. The values are computed in host memory, by the composite."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, input: Tensor, shape: list[int], weight: Tensor, eps: float | None
    ) -> Tensor:
        ctx.shape, ctx.eps = shape, eps
        rows = torch.empty(input.shape[:-1], device=input.device)
        ctx.save_for_backward(input, weight, rows)
        return _rms_norm(input.cpu(), shape, weight.cpu(), eps).to(input.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        input, weight, _ = ctx.saved_tensors
        with torch.enable_grad():
            leaf = input.cpu().requires_grad_()
            output = _rms_norm(leaf, ctx.shape, weight.cpu(), ctx.eps)
        (result,) = torch.autograd.grad(output, leaf, grad.cpu())
        return result.to(grad.device), None, None, None


def _on_device(
    input: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    kind = input.device.type
    if kind != "sim" or weight is None:
        return _rms_norm(input, shape, weight, eps)
    if torch.is_autocast_enabled(kind):  # which computes it in float32
        input, weight = input.float(), weight.float()
    return _FusedRmsNorm.apply(input, shape, weight, eps)  # pyright: ignore[reportReturnType]


def give_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """RMSNorm as one kernel, and flash attention's workspace in its backward pass: the float32
    gradient of the queries, with tokens rounded up to 128 and the head's size to 32
    (``aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp``, mha_bwd)."""
    flash = attention_backends._Flash
    plain = flash.backward

    def backward(self: Any, grad: Tensor, q: Tensor, *others: Any) -> Any:
        batch, tokens, heads, size = q.shape
        values = batch * heads * (-(-tokens // 128) * 128) * (-(-size // 32) * 32)
        workspace = torch.empty(values, device=q.device)
        results = plain(self, grad, q, *others)
        del workspace
        return results

    monkeypatch.setattr(flash, "backward", backward)
    monkeypatch.setattr(F, "rms_norm", _on_device)
