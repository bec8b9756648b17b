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
WeightPlacement = Literal["replicated", "sharded", "sharded_per_machine"]
"""Whether each process of a group has all weights of its expert's blocks, or a shard of them: among
all processes of the group (FSDP2), or among those of a machine, each of which then has all shards
(HSDP)."""


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
    sequence: int = 1
    """How many of them, which follow each other, share the tokens of each clip."""

    @property
    def first(self) -> int:
        """The rank that speaks for the group."""
        return self.ranks[0]

    def part(self, rank: int) -> Part:
        """Which part of each step's clips a process has."""
        return Part(self.ranks.index(rank) // self.sequence, len(self.ranks) // self.sequence)

    def tokens(self, rank: int) -> Part:
        """Which part of the tokens of these clips it has."""
        return Part(self.ranks.index(rank) % self.sequence, self.sequence)

    def sharing_clips(self, rank: int) -> tuple[int, ...]:
        """The processes that have other tokens of the same clips, and itself."""
        start = self.part(rank).number * self.sequence
        return self.ranks[start : start + self.sequence]


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """How the work of a run is divided among its processes."""

    groups: tuple[Group, ...]
    weights: WeightPlacement = "replicated"

    @property
    def is_sharded(self) -> bool:
        """Whether a process has a shard of the blocks' weights."""
        return self.weights != "replicated"

    @property
    def side_by_side(self) -> bool:
        """Whether two experts are trained at the same time."""
        return len(self.groups) > 1

    @property
    def parts(self) -> int:
        """In how many parts the processes of a group share a step's clips."""
        return len(self.groups[0].ranks) // self.sequence

    @property
    def sequence(self) -> int:
        """How many processes share the tokens of a clip."""
        return self.groups[0].sequence

    @property
    def connected(self) -> list[tuple[int, ...]]:
        """The sets of ranks that send each other tensors."""
        sharing = (group.sharing_clips(rank) for group in self.groups for rank in group.ranks)
        # Of two groups, those that have the same shards of either expert.
        pairs = zip(*(group.ranks for group in self.groups), strict=True)
        sets = [*(group.ranks for group in self.groups), *sharing, *pairs]
        return [ranks for ranks in dict.fromkeys(sets) if len(ranks) > 1]

    def group_of(self, rank: int) -> Group:
        """The group of a process."""
        return next(group for group in self.groups if rank in group.ranks)

    def __str__(self) -> str:
        """What was chosen, as a line for people."""
        count = sum(len(group.ranks) for group in self.groups)
        if count == 1:
            return "one process"
        said = [f"{count} processes"]
        if self.side_by_side:
            said.append("both experts trained at the same time")
        each = f"{len(self.groups[0].ranks)} for each expert" if self.side_by_side else "each"
        if self.parts > 1:
            said.append(f"{each} with a part of every step's clips")
        if self.sequence > 1:
            said.append(f"{self.sequence} of them share the tokens of a clip")
        if self.is_sharded:
            where = " within each machine" if self.weights == "sharded_per_machine" else ""
            said.append(f"the weights of blocks are sharded{where}")
        return ", ".join(said)


def divide(
    experts: Sequence[ExpertName],
    ranks: int,
    placement: ExpertPlacement = "auto",
    *,
    shared: bool = False,
    sequence: int = 1,
    weights: WeightPlacement = "replicated",
) -> Division:
    """The division of a run that trains `experts` among `ranks` processes.

    Experts are trained side by side where there are two of them, an even number of processes, and
    nothing that both train (`shared`: embeddings). `sequence` processes share the tokens of a clip.
    ValueError, which says what prevents it, if `placement` or `sequence` ask for what can't be.
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
    divided: list[tuple[tuple[ExpertName, ...], tuple[int, ...]]]
    if placement == "together" or prevented is not None:
        divided = [(tuple(experts), everyone)]
    else:
        half, (first, second) = ranks // 2, experts
        divided = [((first,), everyone[:half]), ((second,), everyone[half:])]
    if (each := len(divided[0][1])) % sequence:
        raise ValueError(
            f"{each} processes for an expert can't be divided into groups of {sequence}"
        )
    groups = (Group(experts=own, ranks=those, sequence=sequence) for own, those in divided)
    # With one process for each expert there is nobody to share its weights with.
    return Division(groups=tuple(groups), weights=weights if each > 1 else "replicated")
