"""Copies between host memory and a device, beside the computations on it.

`StreamQueue` has private streams, and events that order them with the stream of the computations.
Where there are no streams (on the CPU, on MPS, under `FakeTensorMode`) `InOrderQueue` copies at
once. The waits are methods of their own, so that a test can remove each of them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from onewan.devices import current_stream, has_streams, new_event, new_stream, on_stream
from onewan.memory.host_memory import is_without_copies

Event = Any
"""An event of the device's module; None without streams."""


class InOrderQueue:
    """Everything happens in the order of the calls."""

    is_async = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def event(self) -> Event:
        """A new event; waiting for it before it is recorded is no wait."""
        return None

    def computed(self, event: Event) -> None:
        """Record `event` behind the kernels that have been queued so far."""

    def copied_in(self, event: Event) -> None:
        """Record `event` behind the copies to the device."""

    def copied_out(self, event: Event) -> None:
        """Record `event` behind the copies to the host."""

    def copy_in_after(self, event: Event) -> None:
        """Later copies to the device start after `event`."""

    def copy_out_after(self, event: Event) -> None:
        """Later copies to the host start after `event`."""

    def compute_after(self, event: Event) -> None:
        """Kernels that are queued later start after `event`."""

    def host_after(self, event: Event) -> None:
        """Wait, here on the host, for `event`."""

    def copying_in(self) -> AbstractContextManager[Any]:
        """The context, per thread, in which `onewan.devices.copy_` is a copy to the device."""
        return nullcontext()

    def copying_out(self) -> AbstractContextManager[Any]:
        """The context, per thread, in which `onewan.devices.copy_` is a copy to the host."""
        return nullcontext()


class StreamQueue(InOrderQueue):
    """One stream for the copies of each direction, so that both may run at the same time."""

    is_async = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._in = new_stream(device)
        self._out = new_stream(device)

    def event(self) -> Event:
        return new_event(self.device)

    def computed(self, event: Event) -> None:
        event.record(current_stream(self.device))

    def copied_in(self, event: Event) -> None:
        event.record(self._in)

    def copied_out(self, event: Event) -> None:
        event.record(self._out)

    def copy_in_after(self, event: Event) -> None:
        self._in.wait_event(event)

    def copy_out_after(self, event: Event) -> None:
        self._out.wait_event(event)

    def compute_after(self, event: Event) -> None:
        current_stream(self.device).wait_event(event)

    def host_after(self, event: Event) -> None:
        event.synchronize()

    def copying_in(self) -> AbstractContextManager[Any]:
        return on_stream(self.device, self._in)

    def copying_out(self) -> AbstractContextManager[Any]:
        return on_stream(self.device, self._out)


def copy_queue(device: torch.device) -> InOrderQueue:
    """The queue for `device`: one per run, since its streams are meant to live that long."""
    has_queue = has_streams(device) and not is_without_copies(device)
    return StreamQueue(device) if has_queue else InOrderQueue(device)
