"""Whether tensors hold NaN or infinite values."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no value of `tensor` is NaN or infinite; True for types that have no such values."""
    import torch

    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype == torch.float8_e4m3fn:  # NaN is 0x7f and 0xff, and there is no infinity
        return not bool(((tensor.view(torch.uint8) & 0x7F) == 0x7F).any())
    if tensor.dtype.itemsize == 1:
        tensor = tensor.to(torch.float16)  # e5m2 has float16's exponents
    # One pass without a copy: a NaN anywhere makes both of them NaN.
    smallest, largest = tensor.aminmax()
    return bool(torch.isfinite(smallest) & torch.isfinite(largest))
