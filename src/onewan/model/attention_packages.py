"""Attention backends of optional packages: flash-attn 2, flash-attn 3 and xformers.

Each class is an `onewan.model.attention_backends.AttentionBackend`: the package's own forward and
backward functions, with tensors in [B, N, H, D] (batch, tokens, heads, channels), which is the
packages' layout too. The packages are imported when a backend is created; a missing one is a
ConfigError that says how to install it. SageAttention is not among them: it has no backward pass.

All take float16 and bfloat16 on CUDA (flash-attn 2 and xformers on ROCm too); flash-attn 3 needs a
Hopper card. They raise TypeError if another version of the package has other parameters.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from onewan.errors import ConfigError

_Saved = tuple[Tensor, ...]
_Gradients = tuple[Tensor, Tensor, Tensor]


class FlashAttention2:
    """The package flash-attn (2.7.1 or later), whose backward pass can be made deterministic."""

    name = "flash_attn"

    def __init__(self) -> None:
        self._library = _package(self.name, "flash_attn.flash_attn_interface", "flash-attn")

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, _Saved]:
        out, logsumexp, _, random_state = self._library._wrapped_flash_attn_forward(
            q, k, v, return_softmax=False, **self._arguments(q)
        )
        return out, (logsumexp, random_state)

    @torch.no_grad()
    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: _Saved
    ) -> _Gradients:
        logsumexp, random_state = saved
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        self._library._wrapped_flash_attn_backward(
            grad,
            q,
            k,
            v,
            out,
            logsumexp,
            *grads,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            rng_state=random_state,
            **self._arguments(q),
        )
        return grads

    @staticmethod
    def _arguments(q: Tensor) -> dict[str, object]:
        # Its operator has no default values.
        return {
            "dropout_p": 0.0,
            "softmax_scale": q.shape[-1] ** -0.5,
            "causal": False,
            "window_size_left": -1,
            "window_size_right": -1,
            "softcap": 0.0,
            "alibi_slopes": None,
        }


class FlashAttention3:
    """flash-attn 3, built from the folder `hopper` of flash-attn's repository."""

    name = "flash_attn_3"

    def __init__(self) -> None:
        self._library = _package(
            self.name,
            "flash_attn_interface",
            "flash-attn-3",
            "build it from the folder `hopper` of https://github.com/Dao-AILab/flash-attention",
        )

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, _Saved]:
        out, logsumexp, *_ = self._library._flash_attn_forward(
            q, k, v, softmax_scale=q.shape[-1] ** -0.5
        )
        return out, (logsumexp,)

    @torch.no_grad()
    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: _Saved
    ) -> _Gradients:
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        self._library._flash_attn_backward(
            grad,
            q,
            k,
            v,
            out,
            saved[0],
            dq=grads[0],
            dk=grads[1],
            dv=grads[2],
            softmax_scale=q.shape[-1] ** -0.5,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return grads


class Xformers:
    """xformers' memory-efficient attention, by the kernel that it chooses for the shapes."""

    name = "xformers"

    def __init__(self) -> None:
        self._library = _package(self.name, "xformers.ops.fmha", "xformers")

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, _Saved]:
        out, logsumexp = self._library.memory_efficient_attention_forward_requires_grad(q, k, v)
        return out, (logsumexp,)

    @torch.no_grad()
    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: _Saved
    ) -> _Gradients:
        return self._library.memory_efficient_attention_backward(grad, out, saved[0], q, k, v)


def _package(name: str, module: str, package: str, install: str | None = None) -> ModuleType:
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a shared library of another version
        remedy = install or f"install it with `pip install {package}`"
        message = (
            f"memory.attention: {name!r} needs the package {package} ({error}); {remedy}, or "
            "choose auto"
        )
        raise ConfigError("run file", [message]) from error
