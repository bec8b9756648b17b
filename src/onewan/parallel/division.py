"""`Division`: which experts a process trains, and which part of each step's clips. Pure.

The numbers of a run do not depend on it: a step's global batch is that of the run file, whatever
the number of processes, and each clip's random draws are keyed by its index in that batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from onewan.variants import ExpertName

ExpertPlacement = Literal["auto", "together", "side_by_side"]
"""Whether all processes train the same expert at a time, or half of them one and half the other."""


@dataclass(frozen=True, slots=True)
class Part:
    """One of several equal parts of what processes share."""

    number: int
    """From 0."""
    count: int

    def of(self, count: int) -> range:
        """The indices of this part of `count` things: consecutive ones, as many as in the other
        parts or one more."""
        return range(count * self.number // self.count, count * (self.number + 1) // self.count)

    def of_batches(self, sizes: Sequence[int]) -> Iterator[tuple[int, range]]:
        """(index of a batch, indices within it) of this part of batches of `sizes`.

        Whole batches where there is at least one for each part, whose gradients then have the bits
        that one process gives them; else parts of batches.
        """
        if len(sizes) >= self.count:
            yield from ((index, range(sizes[index])) for index in self.of(len(sizes)))
            return
        own, begin = self.of(sum(sizes)), 0
        for index, size in enumerate(sizes):
            within = range(max(own.start, begin) - begin, min(own.stop, begin + size) - begin)
            if within:
                yield index, within
            begin += size


WHOLE = Part(0, 1)
"""What a process has that shares nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Processes that train the same experts, with the same weights, on parts of the same steps."""

    experts: tuple[ExpertName, ...]
    ranks: tuple[int, ...]

    @property
    def first(self) -> int:
        """The rank that speaks for the group."""
        return self.ranks[0]

    def part(self, rank: int) -> Part:
        """Which part of each step's clips a process has."""
        return Part(self.ranks.index(rank), len(self.ranks))


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """How the work of a run is divided among its processes."""

    groups: tuple[Group, ...]

    @property
    def side_by_side(self) -> bool:
        """Whether two experts are trained at the same time."""
        return len(self.groups) > 1

    @property
    def parts(self) -> int:
        """In how many parts the processes of a group share a step's clips."""
        return len(self.groups[0].ranks)

    def group_of(self, rank: int) -> Group:
        """The group of a process."""
        return next(group for group in self.groups if rank in group.ranks)

    def group_for(self, expert: ExpertName) -> Group:
        """The group that trains an expert."""
        return next(group for group in self.groups if expert in group.experts)

    def __str__(self) -> str:
        """What was chosen, as a line for people."""
        count = sum(len(group.ranks) for group in self.groups)
        if count == 1:
            return "one process"
        if not self.side_by_side:
            return f"{count} processes, each with a part of every step's clips"
        each = self.parts
        part = "" if each == 1 else f", {each} for each expert with parts of a step's clips"
        return f"{count} processes, both experts trained at the same time{part}"


def divide(
    experts: Sequence[ExpertName],
    ranks: int,
    placement: ExpertPlacement = "auto",
    *,
    shared: bool = False,
) -> Division:
    """The division of a run that trains `experts` among `ranks` processes.

    Experts are trained side by side where there are two of them, an even number of processes, and
    nothing that both train (`shared`: embeddings). ValueError, which says what prevents it, if
    `placement` asks for what can't be.
    """
    prevented = None
    if len(experts) < 2:
        prevented = "the run trains one expert only"
    elif shared:
        prevented = "both experts train the same embeddings, so that their steps must alternate"
    elif ranks % 2:
        prevented = f"{ranks} processes can't be divided into two equal groups"
    if placement == "side_by_side" and prevented is not None:
        raise ValueError(prevented)
    everyone = tuple(range(ranks))
    if placement == "together" or prevented is not None:
        return Division(groups=(Group(experts=tuple(experts), ranks=everyone),))
    half = ranks // 2
    first, second = experts
    return Division(
        groups=(
            Group(experts=(first,), ranks=everyone[:half]),
            Group(experts=(second,), ranks=everyone[half:]),
        )
    )
