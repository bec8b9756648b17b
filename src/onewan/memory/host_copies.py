"""Copies between host memory and a device that the host does not wait for.

A blocking copy waits for everything that is queued on the device, so a training step that makes one
for each of its tensors keeps the device idle. Copies here go through pinned (page-locked) memory
and are queued on the device's current stream, behind the computations that wrote what they read.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor

from onewan.devices import copy_, current_stream, has_streams
from onewan.memory.host_memory import HostMemory

_GATHERED = 64 << 20
"""Bytes of small tensors that are gathered on the device to be copied at once: many enough for the
full rate of the bus, and few beside a step's activations."""

Key = TypeVar("Key", bound=Hashable)


class QueuedCopies:
    """Whether the copies that were queued on a device's current stream are complete."""

    def __init__(self) -> None:
        self._behind: torch.Event | None = None
        """Recorded behind the latest copies; None if they are known to be complete."""

    def record(self, device: torch.device) -> None:
        """Take in the copies that have been queued on the current stream of `device` so far."""
        if has_streams(device):
            self._behind = current_stream(device).record_event()

    @property
    def are_done(self) -> bool:
        """Whether all of them are complete; does not wait."""
        if self._behind is not None and self._behind.query():
            self._behind = None
        return self._behind is None

    def wait(self) -> None:
        """Return when all of them are complete."""
        if not self.are_done:
            assert self._behind is not None
            self._behind.synchronize()
            self._behind = None


class HostCopies(Generic[Key]):
    """Copies of tensors in pinned host memory, each in a place of its own that is used again.

    Memory is allocated when a tensor of a new key or size is stored, and kept: new pages cost more
    time than the copy. Not for two threads at once.
    """

    def __init__(self) -> None:
        self._places: dict[Key, Tensor] = {}
        self._queued = QueuedCopies()

    @torch.no_grad()
    def store(self, tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """Queue the copies of `tensors` into host memory; returns the copies.

        Their values are there when `is_done` is true, or after `wait`. They share memory with the
        next copies of the same keys.
        """
        places = self.reserve(tensors)
        for keys in self._runs(tensors):
            self._copy(keys, tensors)
        self._record(tensors)
        return places

    @torch.no_grad()
    def load(self, targets: Mapping[Key, Tensor]) -> None:
        """Queue copies of what was stored under the same keys into `targets`."""
        for key, target in targets.items():
            copy_(target, self._places[key])
        self._record(targets)

    def reserve(self, tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """The places for copies of `tensors`, to write values for `load` into them. With copies
        under way, `wait` comes first."""
        missing: dict[torch.dtype, dict[Key, Tensor]] = {}
        for key, tensor in tensors.items():
            place = self._places.get(key)
            if place is None or not _is_alike(place, tensor):
                missing.setdefault(tensor.dtype, {})[key] = tensor
        # Tensors of one dtype are neighbours, so that they can be copied at once.
        for dtype, group in missing.items():
            size = sum(tensor.numel() for tensor in group.values()) * dtype.itemsize
            device = next(iter(group.values())).device
            flat = HostMemory(device).allocate(size).tensor.view(dtype)
            start = 0
            for key, tensor in group.items():
                self._places[key] = flat.as_strided(tensor.shape, _strides_of_copy(tensor), start)
                start += tensor.numel()
        return {key: self._places[key] for key in tensors}

    @property
    def is_done(self) -> bool:
        """Whether all copies are complete; does not wait."""
        return self._queued.are_done

    def wait(self) -> None:
        """Return when all copies are complete."""
        self._queued.wait()

    def _record(self, tensors: Mapping[Key, Tensor]) -> None:
        for device in {tensor.device for tensor in tensors.values()}:
            self._queued.record(device)

    def _runs(self, tensors: Mapping[Key, Tensor]) -> Iterator[list[Key]]:
        """The keys in groups that can be copied at once: contiguous tensors of one device whose
        places are neighbours, of at most `_GATHERED` bytes together."""
        run: list[Key] = []
        size = 0
        for key, tensor in tensors.items():
            place = self._places[key]
            if run and not (
                size + place.nbytes <= _GATHERED
                and tensor.device == tensors[run[-1]].device
                and tensor.is_contiguous()
                and tensors[run[-1]].is_contiguous()
                and _are_neighbours(self._places[run[-1]], place)
            ):
                yield run
                run, size = [], 0
            run.append(key)
            size += place.nbytes
        if run:
            yield run

    def _copy(self, keys: list[Key], tensors: Mapping[Key, Tensor]) -> None:
        first = self._places[keys[0]]
        if len(keys) == 1:
            copy_(first, tensors[keys[0]].detach())
            return
        count = sum(tensors[key].numel() for key in keys)
        flat = first.as_strided((count,), (1,), first.storage_offset())
        gathered = torch.cat([tensors[key].detach().reshape(-1) for key in keys])
        copy_(flat, gathered)


def _strides_of_copy(tensor: Tensor) -> tuple[int, ...]:
    """The strides that `Tensor.to` gives a copy."""
    return torch.empty_like(tensor, device="meta").stride()


def _is_alike(place: Tensor, tensor: Tensor) -> bool:
    """Whether `place` is where a copy of `tensor` can be."""
    if place.shape != tensor.shape or place.dtype != tensor.dtype:
        return False
    return place.stride() == tensor.stride() or place.stride() == _strides_of_copy(tensor)


def _are_neighbours(first: Tensor, second: Tensor) -> bool:
    """Whether two contiguous tensors are parts of one buffer, the second right behind the first."""
    return (
        first.dtype == second.dtype
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and first.storage_offset() + first.numel() == second.storage_offset()
    )
