"""Host buffers: exact sizes, pinned where the driver allows it, and what is said otherwise."""

from __future__ import annotations

import gc

import pytest
import torch

from onewan.errors import ConfigError
from onewan.memory import host_memory
from onewan.memory.host_memory import PROBE_SIZE, DriverPages, HostMemory, PageLocker

MIB = 1 << 20


class Pages:
    """A driver that locks up to `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.locked: dict[int, int] = {}
        self.calls = 0

    def lock(self, address: int, size: int) -> None:
        self.calls += 1
        if sum(self.locked.values()) + size > self.limit:
            raise RuntimeError("out of memory\nand more")
        self.locked[address] = size

    def unlock(self, address: int) -> None:
        del self.locked[address]


class Notices(list[str]):
    def __call__(self, text: str) -> None:
        self.append(text)


def memory(pages: PageLocker, **given) -> tuple[HostMemory, Notices]:
    notices = Notices()
    # No tensor is made on this device: everything here is host memory.
    return HostMemory(torch.device("cuda"), pages=pages, notify=notices, **given), notices


def test_buffers_have_the_exact_size_and_are_locked_until_they_are_freed(monkeypatch) -> None:
    monkeypatch.setattr(host_memory, "_LARGEST_PIECE", MIB)
    pages = Pages(100 * MIB)
    host, notices = memory(pages)
    buffer = host.allocate(2 * MIB + 5)
    assert buffer.is_pinned
    tensor = buffer.tensor
    assert tensor.shape == (2 * MIB + 5,) and tensor.dtype == torch.uint8
    start = tensor.data_ptr()
    assert pages.locked == {start: MIB, start + MIB: MIB, start + 2 * MIB: 5}
    view = tensor[1:7].fill_(3)
    del buffer, tensor
    gc.collect()
    assert len(pages.locked) == 3  # a view needs the memory
    assert view.eq(3).all()
    del view
    gc.collect()
    assert pages.locked == {}
    assert notices == []


def test_what_can_not_be_pinned_is_allocated_with_one_notice(monkeypatch) -> None:
    monkeypatch.setattr(host_memory, "_LARGEST_PIECE", MIB)
    pages = Pages(4 * MIB)
    host, notices = memory(pages)
    first, second = host.allocate(2 * MIB), host.allocate(3 * MIB)
    assert (first.is_pinned, second.is_pinned) == (True, False)
    assert sum(pages.locked.values()) == 2 * MIB  # the pieces of the second are unlocked again
    assert second.tensor.fill_(1).sum() == 3 * MIB
    calls = pages.calls
    assert not host.allocate(100).is_pinned
    assert pages.calls == calls
    assert len(notices) == 1
    assert "0.00 GB of host memory can't be pinned (out of memory)" in notices[0]


def test_a_small_probe_comes_first() -> None:
    pages = Pages(PROBE_SIZE - 1)
    host, notices = memory(pages)
    assert not host.allocate(10 * MIB).is_pinned
    assert pages.calls == 1
    assert len(notices) == 1


def test_pinning_can_be_required() -> None:
    host, notices = memory(Pages(0), pinned=True)
    with pytest.raises(
        ConfigError, match=r"memory\.host_weights: is pinned, but 0\.01 GB .*out of memory"
    ):
        host.allocate(10 * MIB)
    assert notices == []


def test_pinning_can_be_refused_but_not_for_the_staging_buffers() -> None:
    pages = Pages(100 * MIB)
    host, notices = memory(pages, pinned=False)
    assert not host.allocate(MIB).is_pinned
    assert pages.calls == 0
    assert host.allocate_staging(MIB).is_pinned
    assert notices == []


def test_without_any_pinned_memory_it_is_said_that_copies_wait() -> None:
    host, notices = memory(Pages(0), pinned=False)
    assert not host.allocate_staging(MIB).is_pinned
    assert len(notices) == 1 and "while it waits" in notices[0]


def test_on_the_cpu_nothing_is_pinned() -> None:
    host = HostMemory(torch.device("cpu"), pinned=True)
    assert not host.allocate(10).is_pinned
    assert host.allocate(0).tensor.shape == (0,)


class Runtime:
    """The functions of the CUDA runtime that are used; `code` is what they return."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.registered: list[tuple[int, int, int]] = []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        self.registered.append((address, size, flags))
        return self.code

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del address
        return self.code

    def cudaGetErrorString(self, code: int) -> str:  # noqa: N802
        return f"error number {code}"


def test_return_codes_of_the_driver_are_checked() -> None:
    device = torch.device("cpu")
    runtime = Runtime(0)
    pages = DriverPages(device, runtime)
    pages.lock(4096, 100)
    pages.unlock(4096)
    assert runtime.registered == [(4096, 100, 1)]
    pages = DriverPages(device, Runtime(2))
    with pytest.raises(RuntimeError, match="cudaHostRegister: error number 2"):
        pages.lock(4096, 100)
    with pytest.raises(RuntimeError, match="cudaHostUnregister: error number 2"):
        pages.unlock(4096)
