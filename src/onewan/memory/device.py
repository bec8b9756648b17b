"""How much of a device's memory a run takes, and how fast the device is."""

from __future__ import annotations

import time

import torch

from onewan.devices import (
    empty_cache,
    is_accelerator,
    limit_share,
    reserved_memory,
    synchronize,
    total_and_free_memory,
)

MEMORY_FRACTION = 0.95
"""Share of a device's memory that PyTorch may allocate. The rest is for the driver, the display and
libraries. On Windows a process that goes past it gets host memory in its place, without an error,
and trains many times slower."""
_NEAR = 0.9
"""Share of the limit from which on reserved memory is given back at a change of bucket."""


def limit_memory(device: torch.device, vram: int | None = None) -> int | None:
    """Let PyTorch allocate at most `vram` bytes, or less if the device has less; `MEMORY_FRACTION`
    of what it has is the most.

    Past the limit an allocation is a `torch.OutOfMemoryError`. Returns the limit in bytes; None for
    a device without one, such as the CPU.
    """
    total, _ = total_and_free_memory(device)
    if total is None:
        return None
    share = MEMORY_FRACTION if vram is None else min(MEMORY_FRACTION, vram / total)
    return int(total * share) if limit_share(device, share) else None


def empty_cache_near(device: torch.device, limit: int | None) -> None:
    """Give reserved memory that is not in use back, if the allocator has reserved nearly `limit`.

    Blocks of memory for one size of clips do not fit another, and the allocator waits with giving
    them back until an allocation has failed.
    """
    if limit is not None and (reserved_memory(device) or 0) > _NEAR * limit:
        empty_cache(device)


def matrix_product_rate(
    device: torch.device, dtype: torch.dtype, *, seconds: float = 0.2, largest: int = 8192
) -> float | None:
    """FLOP/s that `device` reaches in products of square matrices, measured for about `seconds`;
    None on the CPU, where nobody asks what share of it training reaches.

    Of several sizes, up to `largest`, since small products do not fill a large device.
    """
    if not is_accelerator(device):
        return None
    best, size, end = 0.0, 512, time.monotonic() + seconds
    while size <= largest:
        # The largest one is repeated until the time is over.
        taken, rate = _timed_products(device, dtype, size, end if size == largest else 0.0)
        best = max(best, rate)
        # Twice the size takes eight times as long.
        if time.monotonic() + 8 * taken > end:
            break
        size *= 2
    # What is left of the matrices is of no use to the run.
    empty_cache(device)
    return best


def _timed_products(
    device: torch.device, dtype: torch.dtype, size: int, end: float
) -> tuple[float, float]:
    """(seconds, FLOP/s) of a few products of [size, size] matrices, or of as many as fit before
    `end`."""
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    out = matrix @ matrix  # the first product of a size chooses its kernel
    synchronize(device)
    count, begin = 0, time.monotonic()
    while not count or time.monotonic() < end:
        for _ in range(4):
            torch.matmul(matrix, matrix, out=out)
        synchronize(device)
        count += 4
    taken = time.monotonic() - begin
    return taken, 2 * size**3 * count / taken
