"""What processes that train together send each other: bytes, messages and seconds. Pure.

Sums and gathered values travel in a ring, as NCCL and gloo send them: each process sends to its
next neighbour only, and all of them send at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SUM_BYTES = 4
"""Of a number of a gradient that is summed: float32."""
SUM_NUMBERS = 16 << 20
"""Numbers that are summed in one message: 64 MiB."""


def bytes_of_sum(amount: float, ranks: int) -> float:
    """Bytes that each of `ranks` processes sends so that all have the sum of `amount` bytes: almost
    all of them twice, in parts to be summed, and summed."""
    return 2 * (ranks - 1) / ranks * amount


def bytes_of_gathering(amount: float, ranks: int) -> float:
    """Bytes that each of `ranks` processes sends so that all have the `amount` bytes of each."""
    return (ranks - 1) * amount


def bytes_of_telling(amount: float, ranks: int) -> float:
    """Bytes that each of `ranks` processes sends, on average, so that all have the `amount` bytes
    of the first one. They go from process to process: each receives them once."""
    return (ranks - 1) / ranks * amount


def steps_of_telling(ranks: int) -> int:
    """How many messages, one after another, it takes that `ranks` processes have what one had: in
    each of them all who have it tell one other."""
    return (ranks - 1).bit_length()


def sums_of(numbers: int) -> int:
    """In how many messages the sum of so many numbers is sent."""
    return -(-numbers // SUM_NUMBERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """The connections between the processes of a run. Ranks follow each other in machines."""

    within: float
    """Bytes/s that a process sends to another one of its machine, such as by NVLink or PCIe."""
    between: float
    """Bytes/s that a machine sends to another one, such as by InfiniBand or Ethernet."""
    machine_size: int = 8
    """Processes of a machine."""
    delay: float = 0.0
    """Seconds from one process of a ring to the next, whatever is sent."""

    def rate(self, ranks: Sequence[int]) -> float:
        """Bytes/s of a ring of `ranks`, which is as fast as its slowest connection."""
        one_machine = len({rank // self.machine_size for rank in ranks}) == 1
        return self.within if one_machine else min(self.within, self.between)

    def seconds_of_sum(self, numbers: int, ranks: Sequence[int]) -> float:
        """Until each of `ranks` has the sums of so many numbers."""
        count = len(ranks)
        sent = bytes_of_sum(SUM_BYTES * numbers, count)
        return sent / self.rate(ranks) + sums_of(numbers) * 2 * (count - 1) * self.delay
