"""Rounding float32 values to bfloat16 weights so that small updates are not lost.

A bfloat16 has 8 significant bits, so rounding to nearest loses an update of less than 1/512 of its
weight. Stochastic rounding (Gupta et al., 2015) rounds up or down with the probabilities that make
the expected result equal to the value; Kahan summation keeps the rounding error beside the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Rounding: TypeAlias = Literal["none", "stochastic", "kahan"]
"""How an optimizer's float32 result becomes a bfloat16 weight."""

_LOWER_BITS = 16
"""A bfloat16 is the upper half of a float32's bits; this is the size of the lower half."""
_PIECE = 1 << 24
"""Values that are rounded at a time. The largest weight of an A14B expert has 157 million, and
what is computed in between would take another 2 GB for all of them."""


def is_half(weight: Tensor) -> bool:
    """Whether `weight` has 16 bits."""
    return weight.dtype in {torch.bfloat16, torch.float16}


def stochastic_round_(target: Tensor, source: Tensor, generator: torch.Generator) -> None:
    """Write `source` (float32) into `target` (bfloat16, same shape and device).

    Each value becomes one of its two bfloat16 neighbours, and its expected result is the value
    itself. Values that bfloat16 can represent do not change, nor do infinities and NaN.
    """
    if target.dtype != torch.bfloat16 or source.dtype != torch.float32:
        raise TypeError(f"rounds float32 to bfloat16, not {source.dtype} to {target.dtype}")
    noise = torch.randint(
        1 << _LOWER_BITS, source.shape, dtype=torch.int32, device=source.device, generator=generator
    )
    for rounded, values, bits in _pieces(target, source, noise):
        # Without its sign, a float's bits as an integer order it by magnitude. So a carry out of
        # the lower half leads to the neighbour that is farther from zero, for either sign.
        bits += values.view(torch.int32)
        bits &= -(1 << _LOWER_BITS)
        # A NaN whose payload is in the lower bits would become an infinity.
        rounded.copy_(torch.where(values.isfinite(), bits.view(torch.float32), values))


def round_with_residual(source: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`source` (float32) rounded to `dtype`, and the rounding error in `dtype` (Kahan, 1965).

    Their sum has about twice the precision of the first. The error of infinities and NaN is 0.
    """
    rounded = source.to(dtype)
    # Exact in float32: the difference of two values this close needs no more bits.
    residual = source - rounded.float()
    return rounded, torch.where(residual.isfinite(), residual, 0).to(dtype)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of `tensors`, which have the same shape, of about `_PIECE` values each."""
    if tensors[0].dim() == 0:
        yield tensors
        return
    rows = max(1, _PIECE * len(tensors[0]) // max(1, tensors[0].numel()))
    yield from zip(*(tensor.split(rows) for tensor in tensors), strict=True)
