"""Inputs of a model on their way from host memory to its device.

A blocking copy waits for everything that is queued on the device, so a step that makes one for each
of its inputs keeps the device idle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onewan.devices import can_pin, is_host, moved


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, itself if it is there; the copy is queued, and the host does not wait.

    A tensor in pageable host memory is copied to pinned (page-locked) memory first, which PyTorch
    uses again when the copy to the device is complete. For inputs: weights would need pinned memory
    of their own size.
    """
    if is_host(tensor.device) and can_pin(device) and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return moved(tensor, device)
