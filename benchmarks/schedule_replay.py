"""When the copies and computations of a recorded schedule would happen on another machine.

`BlockStream` and the store of kept activations decide what is copied and what waits for what. They
do so in the order in which the host queues work, whatever the device, so a schedule that was
recorded on a CPU is that of every device. `replay` runs through it with the durations of a machine:

- computations happen one after another, in their order;
- copies of weights to the device, of kept tensors to the device and of kept tensors to the host
  have a stream each, in which they happen in their order;
- both streams to the device share the bus, on which one copy happens at a time; the other direction
  of the bus is independent of it (PCIe is full duplex);
- everything starts as early as its stream, the bus and the events that it waits for allow.

The host queues faster than the device computes, and a kernel computes as fast beside a copy as
without one. Imports no torch.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["load", "use", "compute", "done", "leave", "drop", "fetch", "take", "step"]
Part = Literal["all", "first", "rest"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a schedule, in the order in which the host queued them.

    load      the weights of `block` are copied into `buffer`, behind the computations of the block
              that it held before
    use       computations wait for the copy into `buffer`
    compute   the kernels of `block`, of the backward pass if `backward`: all of them, or the `part`
              before the fetch of the next block's kept tensors, or the one behind it
    done      `buffer` may be refilled behind them
    leave     the kept tensors of `block` are copied to the host, behind its kernels
    drop      computations wait for that copy; the memory is free behind them
    fetch     the kept tensors are copied back, behind what has been queued and behind their `leave`
    take      computations wait for them
    step      a step ends
    """

    kind: Kind
    block: int = -1
    buffer: int = -1
    backward: bool = False
    part: Part = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Durations:
    """Seconds of each kind of work for one block."""

    forward: float
    backward: float
    """With the block's recomputation."""
    load: float
    kept: float
    """Of the copy of a block's kept tensors, in one direction."""
    first: float = 0.0
    """Of `backward`, what comes before the fetch of the next block's kept tensors."""

    def of(self, entry: Entry) -> float:
        """Of a computation."""
        if not entry.backward:
            return self.forward
        parts = {"all": self.backward, "first": self.first, "rest": self.backward - self.first}
        return parts[entry.part]


@dataclass(slots=True)
class _Link:
    """One direction of the bus: copies that do not overlap, each as early as possible."""

    starts: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)

    def place(self, earliest: float, duration: float) -> float:
        """The end of a copy that may start at `earliest`, in the first gap that is long enough."""
        position = bisect.bisect_right(self.ends, earliest)
        start = earliest
        while position < len(self.starts) and self.starts[position] < start + duration:
            start = self.ends[position]
            position += 1
        self.starts.insert(position, start)
        self.ends.insert(position, start + duration)
        return start + duration


@dataclass(slots=True)
class _Clock:
    """When each stream has finished what was queued, and when each event happens."""

    durations: Durations
    compute: float = 0.0
    loads: float = 0.0
    fetches: float = 0.0
    leaves: float = 0.0
    to_device: _Link = field(default_factory=_Link)
    to_host: _Link = field(default_factory=_Link)
    free: dict[int, float] = field(default_factory=dict)
    ready: dict[int, float] = field(default_factory=dict)
    written: dict[int, float] = field(default_factory=dict)
    arrived: dict[int, float] = field(default_factory=dict)

    def run(self, entry: Entry) -> None:
        durations = self.durations
        match entry.kind:
            case "load":
                earliest = max(self.loads, self.free.get(entry.buffer, 0.0))
                self.loads = self.to_device.place(earliest, durations.load)
                self.ready[entry.buffer] = self.loads
            case "use":
                self.compute = max(self.compute, self.ready.get(entry.buffer, 0.0))
            case "compute":
                self.compute += durations.of(entry)
            case "done":
                self.free[entry.buffer] = self.compute
            case "leave":
                self.leaves = self.to_host.place(max(self.leaves, self.compute), durations.kept)
                self.written[entry.block] = self.leaves
                self.arrived.pop(entry.block, None)
            case "drop":
                self.compute = max(self.compute, self.written[entry.block])
            case "fetch":
                earliest = max(self.fetches, self.compute, self.written[entry.block])
                self.fetches = self.to_device.place(earliest, durations.kept)
                self.arrived[entry.block] = self.fetches
            case "take":
                written = self.written.get(entry.block, 0.0)
                self.compute = max(self.compute, self.arrived.get(entry.block, written))
            case "step":
                pass


def replay(schedule: Iterable[Entry], durations: Durations) -> list[float]:
    """The times at which the steps of `schedule` end."""
    clock = _Clock(durations)
    ends: list[float] = []
    for entry in schedule:
        clock.run(entry)
        if entry.kind == "step":
            ends.append(clock.compute)
    return ends


def slowdown(schedule: Iterable[Entry], durations: Durations, *, warm_up: int = 1) -> float:
    """Seconds per step, relative to those of its computations alone, after `warm_up` steps.

    ValueError if the schedule has no step behind them.
    """
    entries = list(schedule)
    ends = replay(entries, durations)
    if len(ends) <= warm_up:
        raise ValueError(f"the schedule has {len(ends)} steps, and {warm_up} are warm-up")
    alone = replay([e for e in entries if e.kind in ("compute", "step")], durations)
    return (ends[-1] - ends[warm_up - 1]) / (alone[-1] - alone[warm_up - 1])


def hidden_share(schedule: Iterable[Entry], durations: Durations, *, warm_up: int = 1) -> float:
    """The share of the time of all copies that does not make a step longer: 1 where copies are
    behind computations, 0 where each is waited for; less than 0 can't be.

    ValueError if nothing is copied after `warm_up` steps.
    """
    entries = list(schedule)
    begin = [index for index, entry in enumerate(entries) if entry.kind == "step"][warm_up - 1] + 1
    loads = sum(entry.kind == "load" for entry in entries[begin:])
    kept = sum(entry.kind in ("leave", "fetch") for entry in entries[begin:])
    copied = loads * durations.load + kept * durations.kept
    if copied == 0:
        raise ValueError("nothing is copied, so no copy can be hidden")
    ends = replay(entries, durations)
    alone = replay([e for e in entries if e.kind in ("compute", "step")], durations)
    longer = (ends[-1] - ends[warm_up - 1]) - (alone[-1] - alone[warm_up - 1])
    return 1 - longer / copied
