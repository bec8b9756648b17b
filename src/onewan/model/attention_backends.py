"""Attention kernels with a forward pass and a backward pass that can be called on their own.

`F.scaled_dot_product_attention` keeps what its backward pass needs inside autograd, so gradient
checkpointing has to run the whole attention again. Here a caller gets the output and what the
kernel saved, may keep both (on the device or in host memory), and calls the backward pass later.
PyTorch's kernels are called through the operators that `F.scaled_dot_product_attention` itself
calls, so outputs and gradients are equal to its own, bit for bit.

Layouts: B batch, N queries, M keys, H heads, D channels per head. Tensors are [B, N, H, D] here, as
diffusers has them; PyTorch's operators take [B, H, N, D], as views without a copy.

Backward passes on CUDA add up the gradient of the queries (`flash`, `flash_attn`, `flash_attn_3`,
`xformers`), or that of all inputs (`efficient`, where the keys are split; `cudnn`), in the order in
which thread blocks happen to finish: two runs can differ in the last bits.
`torch.use_deterministic_algorithms(True)` makes all but `xformers` and `cudnn` deterministic, and
slower. `math`, and everything on the CPU, is deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode

from onewan.devices import is_host
from onewan.errors import ConfigError
from onewan.model.attention_packages import FlashAttention2, FlashAttention3, Xformers

Saved = tuple[Tensor, ...]
Gradients = tuple[Tensor, Tensor, Tensor]

_aten: Any = torch.ops.aten  # without types, and with operators that not every version has


class AttentionBackend(Protocol):
    """softmax(q k^T / sqrt(D)) v, without mask and dropout, forward and backward."""

    @property
    def name(self) -> str:
        """Its name in the run file (`memory.attention`)."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        """The output, [B, N, H, D], and what `backward` needs besides it. Autograd records neither
        this nor `backward`.

        `q` is [B, N, H, D], `k` and `v` are [B, M, H, D], all of one dtype. Of what is saved, the
        first is the logarithm of the softmax's denominator (float32, [B, H, N], which some
        kernels pad), and the rest, if any, is a random state of a few bytes that has to stay on the
        device where it is. Errors of the kernel are RuntimeError or ValueError.
        """
        ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved
    ) -> Gradients:
        """The gradients of `q`, `k` and `v`, in their layouts, from that of the output.

        `out` and `saved` are what `forward` returned for these `q`, `k` and `v`.
        """
        ...


class _Flash:
    """PyTorch's flash attention: CUDA, ROCm and XPU in half precision, the CPU in any."""

    name = "flash"

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        if is_host(q.device):
            out, logsumexp = _aten._scaled_dot_product_flash_attention_for_cpu(
                *_heads_first(q, k, v)
            )
            return out.transpose(1, 2), (logsumexp,)
        width, scale = q.shape[-1], 1.0 / math.sqrt(q.shape[-1])
        q, k, v = (_padded(t) for t in (q, k, v))
        out, logsumexp, _, _, _, _, seed, offset, _ = _aten._scaled_dot_product_flash_attention(
            *_heads_first(q, k, v), scale=scale
        )
        return out.transpose(1, 2).narrow(-1, 0, width), (logsumexp, seed, offset)

    @torch.no_grad()
    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved
    ) -> Gradients:
        if is_host(q.device):
            grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *_heads_first(grad, q, k, v, out), saved[0], 0.0, False
            )
            return _heads_last(grads)
        width, scale = q.shape[-1], 1.0 / math.sqrt(q.shape[-1])
        grad, q, k, v, out = (_padded(t) for t in (grad, q, k, v, out))
        logsumexp, seed, offset = saved
        grads = _aten._scaled_dot_product_flash_attention_backward(
            *_heads_first(grad, q, k, v, out),
            logsumexp,
            *_no_packing(q, k),
            0.0,
            False,
            seed,
            offset,
            scale=scale,
        )
        grad_q, grad_k, grad_v = (g.narrow(-1, 0, width) for g in _heads_last(grads))
        return grad_q, grad_k, grad_v


class _Efficient:
    """PyTorch's memory-efficient attention (CUDA and ROCm), in float32 too."""

    name = "efficient"

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        out, *saved = _aten._scaled_dot_product_efficient_attention(
            *_heads_first(q, k, v), None, True
        )
        return out.transpose(1, 2), tuple(saved)

    @torch.no_grad()
    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved
    ) -> Gradients:
        grad, q, k, v, out = _heads_first(grad, q, k, v, out)
        grads = _aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, None, out, *saved, 0.0, [True, True, True, False]
        )
        return _heads_last(grads[:3])


class _Cudnn:
    """cuDNN's attention (CUDA), the fastest on some cards, such as Hopper's, and not on others."""

    name = "cudnn"

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        out, logsumexp, _, _, _, _, seed, offset, _ = _aten._scaled_dot_product_cudnn_attention(
            *_heads_first(q, k, v), None, True
        )
        return out.transpose(1, 2), (logsumexp, seed, offset)

    @torch.no_grad()
    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved
    ) -> Gradients:
        grads = _aten._scaled_dot_product_cudnn_attention_backward(
            *_heads_first(grad, q, k, v, out), *saved, None, *_no_packing(q, k), 0.0, False
        )
        return _heads_last(grads)


class _Overrideable:
    """The operator that devices outside PyTorch (PrivateUse1), and XPU, fill with their kernel."""

    name = "overrideable"

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        operator = _aten._scaled_dot_product_fused_attention_overrideable
        out, logsumexp, _, _, _, _, seed, offset, _ = operator(*_heads_first(q, k, v))
        return out.transpose(1, 2), (logsumexp, seed, offset)

    @torch.no_grad()
    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved
    ) -> Gradients:
        logsumexp, seed, offset = saved
        first = _heads_first(grad, q, k, v)
        grads = _aten._scaled_dot_product_fused_attention_overrideable_backward(
            *first,
            None,
            [True, True, True, False],
            out.transpose(1, 2),
            logsumexp,
            *_no_packing(q, k),
            0.0,
            False,
            seed,
            offset,
        )
        return _heads_last(grads[:3])


class _Math:
    """Attention composed of matrix products and a softmax, for every device and dtype.

    It has no backward pass of its own: `backward` computes the forward pass again, and both need
    memory for the [B, H, N, M] scores. Nothing is saved.
    """

    name = "math"

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        with self._without_autocast(q):
            return self._attend(q, k, v), ()

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved
    ) -> Gradients:
        del out, saved
        inputs = tuple(t.detach().requires_grad_() for t in (q, k, v))
        with torch.enable_grad(), self._without_autocast(q):
            again = self._attend(*inputs)
            grad_q, grad_k, grad_v = torch.autograd.grad(again, inputs, grad)
        return grad_q, grad_k, grad_v

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _ = _aten._scaled_dot_product_attention_math(*_heads_first(q, k, v))
        return out.transpose(1, 2)

    @staticmethod
    def _without_autocast(q: Tensor) -> torch.autocast:
        # It would round between the products, which F.scaled_dot_product_attention prevents.
        return torch.autocast(q.device.type, enabled=False)


_BACKENDS: dict[str, Callable[[], AttentionBackend]] = {
    backend.name: backend
    for backend in (
        _Flash,
        _Efficient,
        _Cudnn,
        _Overrideable,
        _Math,
        FlashAttention2,
        FlashAttention3,
        Xformers,
    )
}


def attention_backend(name: str) -> AttentionBackend:
    """The backend of that name. ConfigError, saying what to install, if its package is missing."""
    if name not in _BACKENDS:
        known = ", ".join(_BACKENDS)
        message = f"memory.attention: there is no backend {name!r}; choose one of {known}, or auto"
        raise ConfigError("run file", [message])
    return _BACKENDS[name]()


def pytorch_backend(q: Tensor, k: Tensor, v: Tensor) -> AttentionBackend:
    """The backend that `F.scaled_dot_product_attention` uses for these tensors ([B, N, H, D]).

    It is called to see which operator it runs. `torch._fused_sdp_choice` would tell without a
    computation, but not for devices outside PyTorch, which register their choice elsewhere.
    """
    query, key, value = _heads_first(q, k, v)
    with _SdpaOperators() as seen:
        F.scaled_dot_product_attention(query, key, value)
    # The composed attention is taken apart into other operators before it is seen.
    return attention_backend(seen.backend or "math")


class _SdpaOperators(TorchDispatchMode):
    """Records which of the fused operators `F.scaled_dot_product_attention` runs."""

    backend: str | None = None
    _NAMES: ClassVar = {
        "_scaled_dot_product_flash_attention": "flash",
        "_scaled_dot_product_flash_attention_for_cpu": "flash",
        "_scaled_dot_product_efficient_attention": "efficient",
        "_scaled_dot_product_cudnn_attention": "cudnn",
        "_scaled_dot_product_fused_attention_overrideable": "overrideable",
    }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.backend = self._NAMES.get(func.overloadpacket.__name__, self.backend)
        return func(*args, **(kwargs or {}))


def default_backend(
    device: torch.device | str, dtype: torch.dtype, head_dim: int, tokens: int = 64
) -> AttentionBackend:
    """The backend that `F.scaled_dot_product_attention` uses for self-attention over `tokens`
    tokens, with gradients. The device has to be there: fake tensors need a backend by name."""
    q, k, v = (
        torch.zeros(1, tokens, 1, head_dim, device=device, dtype=dtype, requires_grad=True)
        for _ in range(3)
    )
    return pytorch_backend(q, k, v)


def autocast_inputs(q: Tensor, k: Tensor, v: Tensor) -> Gradients:
    """The inputs in autocast's dtype where autocast is on, as `F.scaled_dot_product_attention`
    converts them: the backends themselves ignore autocast."""
    kind = q.device.type
    if not torch.is_autocast_enabled(kind):
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    q, k, v = (t if t.dtype == torch.float64 else t.to(dtype) for t in (q, k, v))
    return q, k, v


def attend(q: Tensor, k: Tensor, v: Tensor, backend: AttentionBackend) -> Tensor:
    """Attention by `backend`, differentiable once: [B, N, H, D] from q [B, N, H, D] and k, v
    [B, M, H, D]. Equal to `F.scaled_dot_product_attention` with that backend, bit for bit.

    Only q, k, v, the output and the softmax's denominators are kept for the backward pass.
    """
    out: Tensor = _Attend.apply(*autocast_inputs(q, k, v), backend)  # pyright: ignore[reportAssignmentType]
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, backend: AttentionBackend) -> Tensor:
        out, saved = backend.forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, *saved)
        ctx.backend = backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, *saved = ctx.saved_tensors
        return (*ctx.backend.backward(grad, q, k, v, out, tuple(saved)), None)


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, N, H, D] -> [B, H, N, D], as views."""
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


def _heads_last(grads: tuple[Tensor, ...]) -> Gradients:
    """[B, H, N, D] -> [B, N, H, D], as views."""
    grad_q, grad_k, grad_v = (grad.transpose(1, 2) for grad in grads)
    return grad_q, grad_k, grad_v


def _no_packing(q: Tensor, k: Tensor) -> tuple[None, None, int, int]:
    """The operators' arguments about packed sequences, for tensors that are not packed."""
    return None, None, q.shape[1], k.shape[1]


def _padded(tensor: Tensor) -> Tensor:
    """With zeros up to a multiple of 8 channels, as `F.scaled_dot_product_attention` does it before
    the flash kernel; Wan's 128 channels are one already."""
    missing = -tensor.shape[-1] % 8
    return F.pad(tensor, (0, missing)) if missing else tensor
