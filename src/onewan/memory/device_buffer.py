"""`DeviceBuffer`: memory on the device that holds one block after another."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from onewan.memory.block_weights import FlatLayout
from onewan.memory.copiers import Load
from onewan.memory.copy_queue import Event, InOrderQueue

Content = TypeVar("Content")


@dataclass(slots=True, eq=False)
class DeviceBuffer(Generic[Content]):
    """A flat buffer, and the events that order what reads and writes it."""

    number: int
    memory: Tensor
    """uint8."""
    free: Event
    """Behind the kernels that used what it holds."""
    ready: Event
    """Behind the copy of what it holds to the device."""
    holds: Content | None = None
    load: Load | None = None
    """The latest copy into the buffer."""
    store: Load | None = None
    """The latest copy from the buffer to host memory."""
    stored: Event = None
    """Behind it; None if there was none."""
    in_use: bool = False
    views: dict[FlatLayout, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def allocate(cls, number: int, size: int, queue: InOrderQueue) -> DeviceBuffer[Content]:
        memory = torch.empty(size, dtype=torch.uint8, device=queue.device)
        buffer = cls(number, memory, queue.event(), queue.event())
        # Kernels that have been queued may still use this memory under another name.
        queue.computed(buffer.free)
        return buffer

    def views_of(self, layout: FlatLayout) -> list[Tensor]:
        """The tensors of a block with that layout."""
        if (found := self.views.get(layout)) is None:
            found = self.views[layout] = layout.views(self.memory)
        return found

    def before_loading(self) -> list[Event]:
        """What a copy into the buffer has to wait for."""
        if self.store is None:
            return [self.free]
        self.store.wait_until_queued()
        return [self.free, self.stored]

    def wait_until_stored(self, queue: InOrderQueue) -> None:
        """Kernels that are queued from now on start after the copy to host memory."""
        if self.store is not None:
            self.store.wait_until_queued()
            queue.compute_after(self.stored)

    def wait_until_loaded(self, queue: InOrderQueue) -> None:
        """Kernels that are queued from now on start after the copy to the device."""
        if self.load is not None:
            self.load.wait_until_queued()
        queue.compute_after(self.ready)

    def retire(self, queue: InOrderQueue) -> None:
        """Make freeing the buffer safe: memory is reused in the order of the computing stream, so
        that stream waits for all copies."""
        self.holds = None
        for copy, event in ((self.load, self.ready), (self.store, self.stored)):
            if copy is not None:
                # What went wrong is raised where the block is used.
                with contextlib.suppress(Exception):
                    copy.wait_until_queued()
                queue.compute_after(event)
        self.load = self.store = None
