"""Inputs of a model on their way from host memory to its device.

A blocking copy waits for everything that is queued on the device, so a step that makes one for each
of its inputs keeps the device idle.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, itself if it is there; the copy is queued, and the host does not wait.

    A tensor in pageable host memory is copied to pinned (page-locked) memory first, which PyTorch
    uses again when the copy to the device is complete. For inputs: weights would need pinned memory
    of their own size.
    """
    from_host = tensor.device.type == "cpu" and has_stream(device)
    if from_host and not tensor.is_pinned() and can_pin(device.type):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def has_stream(device: torch.device) -> bool:
    """Whether work on `device` is queued, so that it may be unfinished when a call returns."""
    return device.type not in {"cpu", "meta"}


@cache
def can_pin(device_type: str) -> bool:
    """Whether PyTorch pins host memory for this type of device."""
    current = torch.accelerator.current_accelerator()
    if current is None or current.type != device_type:
        return False
    try:
        return torch.empty(1).pin_memory().is_pinned()
    except RuntimeError as error:
        log.warning("host memory can't be pinned, so copies to %s wait (%s)", device_type, error)
        return False
