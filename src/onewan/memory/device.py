"""The device that a run computes on: its choice, and what PyTorch's device module says about it.

Nothing here names an accelerator. `torch.accelerator` and `torch.get_device_module` have the same
functions for every kind (CUDA, ROCm, XPU, MPS, and those that other packages add to PyTorch).
"""

from __future__ import annotations

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


def reset_peak(device: torch.device) -> None:
    """Let the peak of `device_memory` begin anew, where the device has one."""
    if device.type != _HOST.type:
        reset = getattr(torch.get_device_module(device), "reset_peak_memory_stats", None)
        if reset is not None:
            reset(device)
