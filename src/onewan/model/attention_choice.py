"""The fastest attention backend for given shapes, found by running those that work.

Which one is the fastest depends on the card: cuDNN's needs half of the time of PyTorch's flash
attention on an H100, and more on an A100.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from onewan.devices import empty_cache, fused_attention, synchronize
from onewan.errors import ConfigError
from onewan.formats.untrusted import first_line
from onewan.model.attention_backends import AttentionBackend, attention_backend, default_backend

_KERNEL_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError)
"""What a backend raises that has no kernel for the device, the dtype or the shapes (RuntimeError,
also without enough memory), or whose package is of another version."""

_TEXT_TOKENS = 512
_OPERATIONS = 1e13
"""Of one measured forward and backward pass: a tenth of a second on a card of 100 TFLOP/s."""
_SECONDS = 0.3
"""Of the measurement of one backend, where a pass is shorter."""
_ADVANTAGE = 0.03
"""Another backend than PyTorch's own choice has to be faster by this share: two measurements of the
same kernel differ by about as much."""
_TOLERANCE = 0.02
"""Relative difference from PyTorch's own choice at which a backend is taken for wrong; bfloat16
kernels differ by about 0.005."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """The self-attention of a training step."""

    batch: int
    """Clips, or with attention within frames their frames."""
    tokens: int
    heads: int
    head_dim: int

    @property
    def measured_heads(self) -> int:
        """How many of the heads, which all need the same time, are enough for a measurement."""
        # 4 B N^2 D operations of a head's forward pass, and 2.5 times as many of its backward pass.
        per_head = 14 * self.batch * self.tokens**2 * self.head_dim
        return max(1, min(self.heads, int(_OPERATIONS / per_head)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The chosen backend and what it was compared with."""

    backend: AttentionBackend
    milliseconds: dict[str, float] = field(default_factory=dict)
    """Of a forward and a backward pass, by backend; empty where there is only one."""
    unusable: dict[str, str] = field(default_factory=dict)
    """Why others of PyTorch and of installed packages can't be used here."""


def fastest_backend(device: torch.device, dtype: torch.dtype, shape: AttentionShape) -> Measured:
    """The fastest backend with a backward pass for `shape`, measured for about two seconds in all.

    Large shapes are measured with fewer heads, which all need the same time. PyTorch's own choice
    is kept unless another one is clearly faster.
    """
    default = default_backend(device, dtype, shape.head_dim, shape.tokens)
    unusable = dict[str, str]()
    usable = dict[str, AttentionBackend]()
    for name in dict.fromkeys((default.name, *fused_attention(device))):
        try:
            backend = attention_backend(name)
        except ConfigError:
            continue  # a package that is not installed, and nobody asked for it
        if reason := why_unusable(backend, device, dtype, shape.head_dim):
            unusable[name] = reason
        else:
            usable[name] = backend
    if len(usable) < 2:
        return Measured(backend=default, unusable=unusable)
    milliseconds, failed = measure(usable, device, dtype, shape)
    empty_cache(device)
    return Measured(
        backend=usable[_fastest(milliseconds, default.name)],
        milliseconds=milliseconds,
        unusable={**unusable, **failed},
    )


def _fastest(milliseconds: dict[str, float], default: str) -> str:
    """The first of `milliseconds`, unless `default` is as fast."""
    if not milliseconds:  # the default failed too, and the first step will say why
        return default
    fastest = next(iter(milliseconds))
    limit = milliseconds.get(default, math.inf) * (1 - _ADVANTAGE)
    return fastest if milliseconds[fastest] < limit else default


def why_unusable(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype, head_dim: int
) -> str | None:
    """Why `backend` can't be used for training here, in one line; None if it can. It is tried on
    self-attention and on cross-attention of a few tokens."""
    for keys in (67, _TEXT_TOKENS):
        q, k, v, grad = _tensors(device, dtype, 1, 67, keys, 1, head_dim)
        try:
            _run(backend, q, k, v, grad)
        except NotImplementedError:
            return f"PyTorch has no such kernel for {device.type}"
        except _KERNEL_ERRORS as error:
            return first_line(error)
    return None


def measure(
    backends: Mapping[str, AttentionBackend],
    device: torch.device,
    dtype: torch.dtype,
    shape: AttentionShape,
) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds of a forward and a backward pass by backend, the fastest first, and why others
    are not among them: they failed, or computed something else than the first of `backends`."""
    tokens, heads = shape.tokens, shape.measured_heads
    tensors = _tensors(device, dtype, shape.batch, tokens, tokens, heads, shape.head_dim)
    expected: tuple[Tensor, ...] | None = None
    milliseconds, failed = dict[str, float](), dict[str, str]()
    for name, backend in backends.items():
        try:
            results = _run(backend, *tensors)
            expected = expected or results
            if (error := _difference(results, expected)) > _TOLERANCE:
                failed[name] = f"differs from {next(iter(backends))} by {error:.2g}"
            else:
                milliseconds[name] = 1000 * _seconds(lambda b=backend: _run(b, *tensors), device)
        except _KERNEL_ERRORS as error:  # noqa: PERF203  (a few backends, once)
            failed[name] = first_line(error)
    return dict(sorted(milliseconds.items(), key=lambda item: item[1])), failed


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The shortest time of several calls, the device's work included."""
    synchronize(device)
    times = list[float]()
    end = time.perf_counter() + _SECONDS
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 50):
        begin = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times)


def _run(
    backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    out, saved = backend.forward(q, k, v)
    return (out, *backend.backward(grad, q, k, v, out, saved))


def _difference(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest relative difference of output and gradients; infinite if one is not finite."""
    errors = [
        (a.float() - e.float()).norm() / e.float().norm()
        for a, e in zip(results, expected, strict=True)
    ]
    return float(torch.stack(errors).nan_to_num(nan=torch.inf).max())


def _tensors(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    queries: int,
    keys: int,
    heads: int,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normal q, k, v and gradient of the output; the global generators are left alone."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, grad = (
        torch.randn(
            batch, n, heads, head_dim, device=device, dtype=torch.float32, generator=generator
        ).to(dtype)
        for n in (queries, keys, keys, queries)
    )
    return q, k, v, grad
