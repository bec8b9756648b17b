"""Host memory for weights that are copied to a device: flat, of exact size, pinned if possible.

Only copies from pinned (page-locked) memory run beside computations. PyTorch's own pinned memory
comes from a cache that rounds every request up to a power of two, which for the blocks of Wan would
lock almost half as much again as they need. On CUDA and ROCm anonymous memory is mapped and
registered with the driver instead. How much can be pinned is known to the driver and the system
alone (Windows, WSL2, containers and ``ulimit -l`` limit it), so it is tried.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from onewan.devices import can_pin, has_streams, is_accelerator, page_runtime
from onewan.errors import ConfigError
from onewan.parallel.machine_memory import MachineMemory

log = logging.getLogger(__name__)

PROBE_SIZE = 1 << 20
"""Bytes that are pinned first, to find out whether pinning works at all."""
_LARGEST_PIECE = 64 << 30
"""Bytes that are registered in one call; some drivers refuse larger ones."""
_PORTABLE = 1
"""cudaHostRegisterPortable: the memory counts as pinned for every device of the process."""


@dataclass(frozen=True, slots=True)
class HostBuffer:
    """One flat buffer in host memory."""

    tensor: Tensor
    """uint8 of exactly the requested size, on the CPU."""
    is_pinned: bool


@dataclass(frozen=True, slots=True)
class SharedBuffer(HostBuffer):
    """A buffer that several processes have in common."""

    machine: MachineMemory

    @property
    def is_writer(self) -> bool:
        """Whether this process writes the content for all."""
        return self.machine.is_writer

    def written(self) -> None:
        """Return when the content is there. All processes of the run call this."""
        self.machine.written()


class HostMemory:
    """Allocates host buffers for copies to one device."""

    def __init__(
        self,
        device: torch.device,
        *,
        pinned: bool | None = None,
        notify: Callable[[str], None] = log.warning,
        pages: PageLocker | None = None,
        machine: MachineMemory | None = None,
    ) -> None:
        """`machine` is the memory that other processes have in common with this one, if it is used.
        `pinned`: True makes it an error where memory can't be pinned, False never pins, and None
        pins what can be; `notify` is then told once about the rest. `pages` locks memory that is
        already allocated; by default the driver's, on CUDA and ROCm."""
        self._device = device
        self._required = pinned is True
        self._notify = notify
        # On the CPU there is nothing to copy to, and fake tensors have no memory. Without streams
        # no copy runs beside a computation, and PyTorch pins nothing, which is only said if pinned
        # memory is required.
        can_gain = has_streams(device) or self._required
        self._wanted = pinned is not False and can_gain and not is_without_copies(device)
        self._pages = pages
        self._machine = machine
        self._probed = False

    def allocate(self, size: int) -> HostBuffer:
        """A buffer of `size` bytes with undefined content.

        ConfigError if pinned memory is required and can't be had.
        """
        if not self._wanted or size == 0:
            return HostBuffer(_unpinned(size), is_pinned=False)
        try:
            if not self._probed:
                self._pinned(PROBE_SIZE)
                self._probed = True
            return HostBuffer(self._pinned(size), is_pinned=True)
        except (RuntimeError, OSError) as error:
            self._give_up(size, error)
            return HostBuffer(_unpinned(size), is_pinned=False)

    def shared(self, size: int) -> SharedBuffer | None:
        """A buffer of zeros that the processes of the run on this machine have in common; None if
        there are no others, or they can't share memory. All processes of the run call this.

        ConfigError as `allocate`.
        """
        if self._machine is None or size == 0:
            return None
        region = self._machine.region(size)
        if region is None:
            return None
        tensor, is_pinned = torch.from_numpy(np.frombuffer(region, dtype=np.uint8)), False
        if self._wanted and (pages := self._driver) is not None:
            try:
                tensor, is_pinned = _locked(region, pages), True
            except RuntimeError as error:
                self._give_up(size, error)
        return SharedBuffer(tensor, is_pinned=is_pinned, machine=self._machine)

    def allocate_staging(self, size: int) -> HostBuffer:
        """A small buffer through which unpinned memory is copied: pinned, if that works, whatever
        was asked for the weights."""
        if is_without_copies(self._device) or not has_streams(self._device):
            return HostBuffer(_unpinned(size), is_pinned=False)
        try:
            return HostBuffer(self._pinned(size), is_pinned=True)
        except (RuntimeError, OSError) as error:
            self._notify(
                f"no host memory can be pinned ({_reason(error)}): weights are copied to the "
                "device while it waits, so training may be several times slower"
            )
            return HostBuffer(_unpinned(size), is_pinned=False)

    def _pinned(self, size: int) -> Tensor:
        """A pinned uint8 tensor of `size` bytes; RuntimeError or OSError if that fails."""
        if (pages := self._driver) is not None:
            return _locked(mmap.mmap(-1, size), pages)
        if not can_pin(self._device):
            raise RuntimeError(f"PyTorch pins no memory for copies to {self._device}")
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    @property
    def _driver(self) -> PageLocker | None:
        """What locks memory that is already allocated; None where nothing does."""
        if self._pages is None and (runtime := page_runtime(self._device)) is not None:
            self._pages = DriverPages(self._device, runtime)
        return self._pages

    def _give_up(self, size: int, error: Exception) -> None:
        """Stop trying to pin; ConfigError if it is required."""
        what = f"{size / 1e9:.2f} GB of host memory can't be pinned ({_reason(error)})"
        if self._required:
            problem = (
                f"memory.host_weights: is pinned, but {what}; free memory, raise the limit, or "
                "set it to pageable"
            )
            raise ConfigError("run file", [problem]) from error
        self._wanted = False
        self._notify(
            f"{what}: the weights that follow are copied through a small pinned buffer, which may "
            "be slower; memory.host_weights: pageable does so without trying"
        )


class PageLocker(Protocol):
    """Locks memory that is already allocated."""

    def lock(self, address: int, size: int) -> None:
        """Pin `size` bytes from `address` on; RuntimeError if that fails."""
        ...

    def unlock(self, address: int) -> None:
        """Undo `lock` of the same address; RuntimeError if that fails."""
        ...


class DriverPages:
    """The driver of CUDA or ROCm, which PyTorch calls cudart for both."""

    def __init__(self, device: torch.device, runtime: Any) -> None:
        """`runtime` has the functions of the CUDA runtime (`onewan.devices.page_runtime`)."""
        self._device = device
        self._runtime = runtime

    def lock(self, address: int, size: int) -> None:
        code = self._runtime.cudaHostRegister(address, size, _PORTABLE)
        if int(code):
            # The driver reports this error again to the next kernel, which has nothing to do with
            # it; PyTorch has no other way to make it forget.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=self._device)
            raise RuntimeError(f"cudaHostRegister: {self._text(code)}")

    def unlock(self, address: int) -> None:
        code = self._runtime.cudaHostUnregister(address)
        if int(code):
            raise RuntimeError(f"cudaHostUnregister: {self._text(code)}")

    def _text(self, code: Any) -> str:
        return str(self._runtime.cudaGetErrorString(code))


def is_without_copies(device: torch.device) -> bool:
    """Whether tensors on `device` are host memory, or have no memory: on the CPU, on the meta
    device, and under `FakeTensorMode`."""
    # Tensors are fake only while a mode is active.
    return not is_accelerator(device) or isinstance(torch.empty(0), FakeTensor)


def _unpinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cpu")


def _locked(memory: mmap.mmap, pages: PageLocker) -> Tensor:
    """The memory as a uint8 tensor, locked until the tensor is freed."""
    array = np.frombuffer(memory, dtype=np.uint8)
    tensor = torch.from_numpy(array)
    start, size = tensor.data_ptr(), len(array)
    locked: list[int] = []
    # The array outlives the tensor and all views of it, and is freed before the mapping.
    unlock = weakref.finalize(array, _unlock, pages, locked)
    try:
        for offset in range(0, size, _LARGEST_PIECE):
            pages.lock(start + offset, min(_LARGEST_PIECE, size - offset))
            locked.append(start + offset)
    except RuntimeError:
        unlock()
        raise
    return tensor


def _unlock(pages: PageLocker, addresses: list[int]) -> None:
    for address in addresses:
        try:
            pages.unlock(address)
        except RuntimeError as error:  # noqa: PERF203  (one call per 64 GiB)
            # Nobody can handle an error here, and the memory is about to be freed.
            log.warning("pinned host memory was not released: %s", error)


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0]
