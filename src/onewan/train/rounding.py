"""Writing float32 numbers into weights of lower precision so that small updates survive.

A bfloat16 has 8 significant bits, so an update below 1/256 of its weight is lost by rounding to the
nearest. Stochastic rounding (Gupta et al., 2015) rounds up or down with the probability that makes
the mean right; Kahan's way keeps what was rounded off beside the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = 16  # of a float32 that a bfloat16 lacks: it is the upper half of one


def stochastic_round_(target: Tensor, source: Tensor, generator: torch.Generator) -> None:
    """Write `source` (float32) into `target` (bfloat16, same shape and device).

    Each number becomes one of its two neighbours in bfloat16, with the mean at the number itself;
    numbers that a bfloat16 has stay as they are, and so do infinities and NaN.
    """
    if target.dtype != torch.bfloat16 or source.dtype != torch.float32:
        raise TypeError(f"rounds float32 to bfloat16, not {source.dtype} to {target.dtype}")
    noise = torch.randint(
        1 << _BITS, source.shape, dtype=torch.int32, device=source.device, generator=generator
    )
    # The bits of a float are its magnitude in order: a carry out of the lower half moves it to the
    # neighbour that is farther from zero, for either sign.
    bits = source.view(torch.int32) + noise
    bits &= -(1 << _BITS)
    target.copy_(torch.where(source.isfinite(), bits.view(torch.float32), source))


def split(source: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`source` (float32) as a number of `dtype` and the rest, of `dtype` too (Kahan, 1965).

    Their sum has about twice the precision of one. The rest of infinities and NaN is 0.
    """
    high = source.to(dtype)
    rest = source - high.float()
    return high, torch.where(rest.isfinite(), rest, 0).to(dtype)
