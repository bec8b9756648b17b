"""How the weights of a block get from host memory into a buffer on the device.

`DirectCopier` is for pinned masters. `StagedCopier` is for memory that is not pinned, including
mapped files: a thread copies it piece by piece into a few pinned buffers, and from there
asynchronously to the device, while the main thread goes on.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from onewan.devices import copy_
from onewan.memory.block_weights import BlockInHostMemory
from onewan.memory.copy_queue import Event, InOrderQueue
from onewan.memory.host_memory import HostMemory

PIECE_SIZE = 64 << 20
"""Bytes of a pinned buffer: enough for the full rate of the bus, and little enough to be had."""
THREAD_NAME = "weights to device"
NUM_PIECES = 3
"""One is filled while another is copied to the device, and one more evens out their rates."""


class Copier(Protocol):
    """Copies blocks to the device."""

    def load(
        self, block: BlockInHostMemory, target: Tensor, after: Sequence[Event], ready: Event
    ) -> Load:
        """Queue the copy of `block` into the uint8 tensor `target`.

        It starts after the events `after`, and `ready` is recorded behind it.
        """
        ...

    def store(self, block: BlockInHostMemory, source: Tensor, free: Event) -> Load:
        """Queue the copy of the uint8 tensor `source` on the device into the master of `block`.

        It starts after the event `free`, and `block.stored` is recorded behind it, which later
        loads of the block wait for.
        """
        ...

    def close(self) -> None:
        """End what runs in the background."""
        ...


class Load:
    """A copy that has been queued, or will be by a thread."""

    def wait_until_queued(self) -> None:
        """Return when waiting for its event is possible; raise what went wrong in the thread."""


class DirectCopier:
    """One asynchronous copy from a pinned master."""

    def __init__(self, queue: InOrderQueue) -> None:
        self._queue = queue

    def load(
        self, block: BlockInHostMemory, target: Tensor, after: Sequence[Event], ready: Event
    ) -> Load:
        for event in after:
            self._queue.copy_in_after(event)
        if block.stored is not None:
            self._queue.copy_in_after(block.stored)
        with self._queue.copying_in():
            for offset, source in block.sources:
                copy_(target[offset : offset + source.numel()], source)
        self._queue.copied_in(ready)
        return _QUEUED

    def store(self, block: BlockInHostMemory, source: Tensor, free: Event) -> Load:
        ((_, master),) = block.sources
        self._queue.copy_out_after(free)
        with self._queue.copying_out():
            copy_(master, source)
        self._queue.copied_out(block.stored)
        return _QUEUED

    def close(self) -> None:
        """There is nothing in the background."""


class _Task(Load):
    """A copy for the thread."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work
        self.error: BaseException | None = None
        self.queued = threading.Event()

    def wait_until_queued(self) -> None:
        self.queued.wait()
        if self.error is not None:
            raise self.error


@dataclass(frozen=True, slots=True)
class Piece:
    """A pinned buffer between unpinned memory and the device."""

    memory: Tensor
    """uint8 [PIECE_SIZE]."""
    copied: Event
    """Behind the latest copy from it to the device, or from the device to it."""

    def wait_until_copied(self) -> None:
        """Block the calling thread until the memory may be written again."""
        if self.copied is not None:
            self.copied.synchronize()


class StagedCopier:
    """Copies through pinned buffers, by a thread that ends with `close`."""

    def __init__(
        self,
        copy_queue: InOrderQueue,
        host: HostMemory,
    ) -> None:
        self._queue = copy_queue
        self._pieces = [
            Piece(host.allocate_staging(PIECE_SIZE).tensor, copy_queue.event())
            for _ in range(NUM_PIECES)
        ]
        self._next_piece = 0
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        self._thread.start()

    def load(
        self, block: BlockInHostMemory, target: Tensor, after: Sequence[Event], ready: Event
    ) -> Load:
        return self._begin(lambda: self._copy_in(block, target, after, ready))

    def store(self, block: BlockInHostMemory, source: Tensor, free: Event) -> Load:
        return self._begin(lambda: self._copy_out(block, source, free))

    def close(self) -> None:
        self._tasks.put(None)
        self._thread.join()

    def _begin(self, work: Callable[[], None]) -> Load:
        task = _Task(work)
        self._tasks.put(task)
        return task

    @torch.no_grad()
    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task.work()
            except BaseException as error:  # noqa: BLE001  (raised again in the main thread)
                task.error = error
            task.queued.set()

    def _free_piece(self) -> Piece:
        piece = self._pieces[self._next_piece]
        self._next_piece = (self._next_piece + 1) % len(self._pieces)
        piece.wait_until_copied()
        return piece

    def _copy_in(
        self, block: BlockInHostMemory, target: Tensor, after: Sequence[Event], ready: Event
    ) -> None:
        for event in after:
            self._queue.copy_in_after(event)
        size = block.layout.size
        for start in range(0, size, PIECE_SIZE):
            stop = min(start + PIECE_SIZE, size)
            piece = self._free_piece()
            _gather(block.sources, start, stop, piece.memory)
            with self._queue.copying_in():
                copy_(target[start:stop], piece.memory[: stop - start])
            self._queue.copied_in(piece.copied)
        self._queue.copied_in(ready)

    def _copy_out(self, block: BlockInHostMemory, source: Tensor, free: Event) -> None:
        ((_, master),) = block.sources
        self._queue.copy_out_after(free)
        arriving: list[tuple[Piece, int, int]] = []
        for start in range(0, source.numel(), PIECE_SIZE):
            if len(arriving) == len(self._pieces):
                _empty(arriving.pop(0), master)
            stop = min(start + PIECE_SIZE, source.numel())
            piece = self._free_piece()
            with self._queue.copying_out():
                copy_(piece.memory[: stop - start], source[start:stop])
            self._queue.copied_out(piece.copied)
            arriving.append((piece, start, stop))
        self._queue.copied_out(block.stored)
        for filled in arriving:
            _empty(filled, master)


def _gather(sources: list[tuple[int, Tensor]], start: int, stop: int, piece: Tensor) -> None:
    """Copy bytes `start` to `stop` of a block into `piece`; gaps between tensors stay undefined."""
    for offset, source in sources:
        first, last = max(start, offset), min(stop, offset + source.numel())
        if first < last:
            piece[first - start : last - start].copy_(source[first - offset : last - offset])


def _empty(filled: tuple[Piece, int, int], master: Tensor) -> None:
    piece, start, stop = filled
    piece.wait_until_copied()
    master[start:stop].copy_(piece.memory[: stop - start])


_QUEUED = Load()
