"""`TensorMoves`: how the weights of a module get onto a device and off it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from onewan.devices import HOST, moved
from onewan.memory.host_copies import HostCopies


@dataclass(frozen=True, slots=True)
class _Original:
    """Where a frozen weight came from, and how to see that its copy on the device is unchanged."""

    in_host_memory: Tensor
    on_device: Tensor
    """The copy; held so that no other tensor gets its address."""
    version: int
    """PyTorch's count of the changes in place."""


class TensorMoves:
    """Moves tensors to one device and back without changing their identity.

    Frozen weights keep their original in host memory, which takes their place again when they
    leave, so they are copied in one direction only. Trained ones, and others that were changed on
    the device, leave through pinned memory. Copies are queued on the device's current stream, in
    whose order its memory is reused (`onewan.memory.residency.DeviceResidency.settle`).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._originals: dict[str, _Original] = {}
        self._copies = HostCopies[str]()

    def enter(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors`, by names that stay the same, on the device. Repeatable."""
        for name, tensor in tensors.items():
            if tensor.device == self._device:
                continue
            before = tensor.data
            _put(tensor, moved(before, self._device))
            if not tensor.requires_grad:
                self._originals[name] = _Original(before, tensor.data, tensor._version)

    def leave(self, tensors: Mapping[str, Tensor], to: torch.device = HOST) -> None:
        """Put `tensors` in host memory, or on another device. Repeatable."""
        changed: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if tensor.device == to:
                continue
            original = self._originals.pop(name, None)
            if original is not None and _is_copy(tensor, original):
                _put(tensor, original.in_host_memory)
            elif to == HOST:
                changed[name] = tensor
            else:
                _put(tensor, tensor.data.to(to))
        self._originals.clear()
        for name, copy in self._copies.store(changed).items():
            _put(changed[name], copy)


def _is_copy(tensor: Tensor, original: _Original) -> bool:
    is_same = tensor.data_ptr() == original.on_device.data_ptr()
    return is_same and tensor._version == original.version


def _put(tensor: Tensor, values: Tensor) -> None:
    """Give `tensor` other values and their device, its gradient too, as `nn.Module.to` does."""
    gradient = tensor.grad if tensor.is_leaf else None
    if gradient is not None:
        tensor.grad = None  # which has to be on the tensor's device
    tensor.data = values
    if gradient is not None:
        tensor.grad = gradient.to(values.device)
