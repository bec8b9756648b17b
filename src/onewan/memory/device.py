"""The device that a run computes on: its choice, and what PyTorch's device module says about it.

Nothing here names an accelerator. `torch.accelerator` and `torch.get_device_module` have the same
functions for every kind (CUDA, ROCm, XPU, MPS, and those that other packages add to PyTorch).
"""

from __future__ import annotations

import time

import torch

from onewan.errors import ConfigError

_HOST = torch.device("cpu")


def resolve_device(name: str) -> torch.device:
    """The device that `model.device` names, with its index; ConfigError if it can't be used here.

    "auto" is the accelerator that PyTorch finds, or the CPU if there is none.
    """
    try:
        # An empty tensor, since `torch.device` accepts names of devices that are not there. Its own
        # device has an index: "cuda" means "cuda:0", but the two don't compare equal.
        device = torch.empty(0, device=_automatic() if name == "auto" else name).device
    except (RuntimeError, AssertionError, ImportError) as error:
        # PyTorch lists all of its devices, whether they are there or not; the first line is enough.
        reason = str(error).splitlines()[0]
        raise ConfigError(
            "run file", [f"model.device: {name!r} can't be used here ({reason}); try auto or cpu"]
        ) from error
    if device.type == "meta":
        message = f"model.device: {name!r} has no memory, so nothing can be computed there"
        raise ConfigError("run file", [f"{message}; try auto or cpu"])
    return device


def _automatic() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or _HOST


def device_memory(device: torch.device) -> tuple[int | None, int | None]:
    """(allocated now, peak since `reset_peak` or the start of the process) in bytes; None where a
    device, such as the CPU, does not report them."""
    if device.type == _HOST.type:
        return None, None
    module = torch.get_device_module(device)
    names = ("memory_allocated", "max_memory_allocated")
    allocated, peak = (
        getattr(module, name)(device) if hasattr(module, name) else None for name in names
    )
    return allocated, peak


def total_and_free_memory(device: torch.device) -> tuple[int | None, int | None]:
    """Bytes of the whole device, and those that no process uses; None where it does not say."""
    get = getattr(torch.get_device_module(device), "mem_get_info", None)
    if get is None:
        return None, None
    free, total = get(device)
    return total, free


def device_name(device: torch.device) -> str:
    """What its maker calls the device, or PyTorch."""
    get = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(device) if get is None else get(device)


def reset_peak(device: torch.device) -> None:
    """Let the peak of `device_memory` begin anew, where the device has one."""
    if device.type != _HOST.type:
        reset = getattr(torch.get_device_module(device), "reset_peak_memory_stats", None)
        if reset is not None:
            reset(device)


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
    if device.type == _HOST.type:
        return None
    module = torch.get_device_module(device)
    set_fraction = getattr(module, "set_per_process_memory_fraction", None)
    if set_fraction is None or not hasattr(module, "mem_get_info"):
        return None
    _, total = module.mem_get_info(device)
    fraction = MEMORY_FRACTION if vram is None else min(MEMORY_FRACTION, vram / total)
    set_fraction(fraction, device)
    return int(total * fraction)


def empty_cache_near(device: torch.device, limit: int | None) -> None:
    """Give reserved memory that is not in use back, if the allocator has reserved nearly `limit`.

    Blocks of memory for one size of clips do not fit another, and the allocator waits with giving
    them back until an allocation has failed.
    """
    if limit is not None:
        module = torch.get_device_module(device)
        if module.memory_reserved(device) > _NEAR * limit:
            module.empty_cache()


def matrix_product_rate(
    device: torch.device, dtype: torch.dtype, *, seconds: float = 0.2, largest: int = 8192
) -> float | None:
    """FLOP/s that `device` reaches in products of square matrices, measured for about `seconds`;
    None on the CPU, where nobody asks what share of it training reaches.

    Of several sizes, up to `largest`, since small products do not fill a large device.
    """
    if device.type == _HOST.type:
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
    empty_cache = getattr(torch.get_device_module(device), "empty_cache", None)
    if empty_cache is not None:
        empty_cache()
    return best


def _timed_products(
    device: torch.device, dtype: torch.dtype, size: int, end: float
) -> tuple[float, float]:
    """(seconds, FLOP/s) of a few products of [size, size] matrices, or of as many as fit before
    `end`."""
    synchronize = torch.get_device_module(device).synchronize
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
