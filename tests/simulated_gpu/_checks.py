"""What the simulation is for: counts, places, memory, the order of streams, late copies."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from simulated_gpu import _device, _native

WAITS = ("wait_item", "wait_shape", "wait_copy", "wait_stream", "wait_event", "wait_device")
"""The kinds of waits of the host for the device."""


# ------------------------------------------------------------------ options
@dataclass(frozen=True)
class _Options:
    sanitize: bool = False
    late: bool = False
    trace: bool = False
    where: bool = False


_options = _Options()


@contextmanager
def _switched_on(**chosen: bool) -> Iterator[None]:
    global _options
    before = _options
    _set(replace(before, **{name: True for name, on in chosen.items() if on}))
    try:
        yield
    finally:
        _set(before)


def _set(options: _Options) -> None:
    global _options
    _options = options
    _native.set_options(options.sanitize, options.late, options.trace, options.where)


# ------------------------------------------------------------------ places
_HIDDEN = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<frozen")


def _frames(most: int) -> list[str]:
    """The lines that are at work, innermost first, without those of PyTorch and of this package."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < most:
        name = frame.f_code.co_filename
        if not name.startswith(_HIDDEN):
            found.append(f"{'/'.join(Path(name).parts[-3:])}:{frame.f_lineno}")
        frame = frame.f_back
    node = torch._C._current_autograd_node()
    if node is not None:
        found.append(f"backward of {node.name()}")
    return found


_listeners: list[Callable[[str, str, int, str], None]] = []


def _on_event(kind: str, operator: str, size: int) -> None:
    at = " < ".join(_frames(4))
    for listen in _listeners:
        listen(kind, operator, size, at)


_native.set_hooks(_on_event, lambda: ", ".join(_frames(1)))


# ------------------------------------------------------------------ counts and memory
def counters() -> dict[str, tuple[int, int]]:
    """The number of transfers and waits of each kind, and the bytes that they moved."""
    return _native.counters()


def reset_counters() -> None:
    _native.reset_counters()


def set_capacity(size: int | None) -> None:
    """The bytes of the device; past them torch.OutOfMemoryError is raised. None: 1 TiB."""
    _native.set_capacity(-1 if size is None else size)


def capacity() -> int:
    return _native.capacity()


def pinned_bytes() -> int:
    """Bytes of pinned host memory that are in use now."""
    return _native.pinned_bytes()


def set_available(available: bool) -> None:
    """Whether `torch.sim.is_available()`, and so whether programs that look for an accelerator find
    this one. It works in either case."""
    _device._available = available


def resident() -> list[tuple[int, int, str]]:
    """What is in device memory: (bytes, number of allocations, operator), most bytes first.

    With the place, for what was allocated under `sanitizer` or `trace(where=True)`.
    """
    sizes: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    for size, made_by in _native.live_blocks():
        sizes[made_by] += size
        numbers[made_by] += 1
    return [(size, numbers[made_by], made_by) for made_by, size in sizes.most_common()]


@dataclass
class Trace:
    """Transfers and waits in their order."""

    events: list[tuple[str, str, int, str]] = field(default_factory=list)
    """(kind, operator, bytes, place)"""

    def waits(self) -> Counter[str]:
        """How often the host waited, by kind and place."""
        return Counter(f"{kind} {place}" for kind, _, _, place in self.events if kind in WAITS)

    def clear(self) -> None:
        self.events.clear()


@contextmanager
def trace(where: bool = False) -> Iterator[Trace]:
    """Collect transfers and waits; with `where`, `resident` knows the places of allocations."""
    made = Trace()

    def listen(*event: Any) -> None:
        made.events.append(event)

    _listeners.append(listen)
    try:
        with _switched_on(trace=True, where=where):
            yield made
    finally:
        _listeners.remove(listen)


# ------------------------------------------------------------------ order of streams
class Report(list[str]):
    """What the sanitizer found, one line for each pair of accesses."""

    def raise_if_any(self) -> None:
        if self:
            raise AssertionError("\n".join(self))


@contextmanager
def sanitizer(*, where: bool = True) -> Iterator[Report]:
    """Check that accesses to memory which depend on each other are ordered.

    The report is filled on the way out; work that is still under way then counts as waited for.
    Without `where` the report does not name the lines of Python, which takes half the time.
    """
    found = Report()
    _native.take_reports()
    try:
        with _switched_on(sanitize=True, where=where):
            try:
                yield found
            finally:
                _native.finish_all()
    finally:
        found.extend(_native.take_reports())


@contextmanager
def late_copies() -> Iterator[None]:
    """Deliver asynchronous copies between pinned and device memory as late as their order allows:
    when something that is ordered after them uses their memory. Until then there is NaN."""
    with _switched_on(late=True):
        try:
            yield
        finally:
            _native.finish_all()
