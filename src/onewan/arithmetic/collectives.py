"""What processes that train together send each other: bytes, messages and seconds. Pure.

Sums and gathered values travel in a ring, as NCCL and gloo send them: each process sends to its
next neighbour only, and all of them send at the same time.
"""

from __future__ import annotations

from collections import Counter
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


def bytes_of_shards(whole: float, ranks: int) -> float:
    """Bytes that each of `ranks` processes sends so that all have the `whole` bytes of which each
    has a shard (an all-gather), or so that each has the sums of its shard (a reduce-scatter): all
    shards but one."""
    return (ranks - 1) / ranks * whole


def bytes_of_exchange(own: float, ranks: int) -> float:
    """Bytes that each of `ranks` processes sends of `own` bytes, of which it has a part for each of
    them (an all-to-all): all parts but its own."""
    return (ranks - 1) / ranks * own


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

    def seconds_of_shards(self, whole: float, ranks: Sequence[int]) -> float:
        """Until each of `ranks` has the `whole` bytes of which each has a shard, or the sums of its
        shard."""
        count = len(ranks)
        return bytes_of_shards(whole, count) / self.rate(ranks) + (count - 1) * self.delay

    def seconds_of_sum_between(self, amount: float, machines: int, at_once: int) -> float:
        """Until each of `machines` has the sum of `amount` bytes, for `at_once` processes of each
        machine at the same time, which share its connection to others."""
        if machines == 1:
            return 0.0
        sent = at_once * bytes_of_sum(amount, machines)
        return sent / self.between + 2 * (machines - 1) * self.delay

    def seconds_of_exchange(self, own: float, ranks: Sequence[int]) -> float:
        """Until each of `ranks` has its part of what all of them have, `own` bytes each. What goes
        to other machines takes the connection that the processes of a machine share."""
        count = len(ranks)
        if count == 1:
            return 0.0
        here = max(Counter(rank // self.machine_size for rank in ranks).values())
        within = own * (here - 1) / count / self.within
        between = own * here * (count - here) / count / self.between
        return max(within, between) + self.delay

    def seconds_of_sum(self, numbers: int, ranks: Sequence[int]) -> float:
        """Until each of `ranks` has the sums of so many numbers."""
        count = len(ranks)
        sent = bytes_of_sum(SUM_BYTES * numbers, count)
        return sent / self.rate(ranks) + sums_of(numbers) * 2 * (count - 1) * self.delay


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSeconds:
    """How long one block takes to compute, and what is sent while others compute."""

    forward: float
    backward: float
    gather: float
    """Until its weights are gathered, in each of the two passes."""
    reduce: float = 0.0
    """Until its gradients are reduce-scattered; 0 if it is frozen."""
    between: float = 0.0
    """Until these are summed over machines (HSDP)."""

    def waiting(self, layers: int) -> float:
        """Seconds of a forward and a backward pass through so many blocks in which nothing is
        computed.

        The weights of a block are gathered while the one before it computes, and the gradients of
        the one behind it are reduce-scattered, over the same connections: a block takes as long as
        what takes longest. Sums over machines, over other connections, follow a block later.
        Nothing hides the first gathering, and the last gradients. The last block stays whole until
        its backward pass.
        """
        forward = self.gather + (layers - 1) * max(0.0, self.gather - self.forward)
        if layers == 1:
            return forward + self.reduce + self.between
        backward = max(0.0, self.gather - self.backward)
        longest = max(self.gather + self.reduce, self.between)
        backward += (layers - 2) * max(0.0, longest - self.backward)
        backward += max(0.0, max(self.reduce, self.between) - self.backward)
        return forward + backward + self.reduce + self.between
