"""`Sharing`: among how many processes blocks' weights and the tokens of a clip are divided."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from onewan.config.schema import ResolvedRun
from onewan.memory.plan.machine import Machine
from onewan.parallel.division import Division
from onewan.parallel.run_division import division_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """What one process has of an expert's weights, and of a clip."""

    shards: int = 1
    """Processes among which the weights of each block are sharded; 1: each has them whole."""
    sequence: int = 1
    """Processes that share the tokens of each clip in training."""
    machine: int = 1
    """Processes on this machine, which have frozen weights that are streamed in its memory once."""
    side_by_side: bool = False
    """Whether a process trains one of two experts only, which others train at the same time."""

    @property
    def is_sharded(self) -> bool:
        """Whether a process has a shard of the blocks' weights."""
        return self.shards > 1


ALONE = Sharing()
"""One process has all weights and all tokens."""


def sharing_in(division: Division, machine_size: int) -> Sharing:
    """That of `division` with `machine_size` consecutive ranks on each machine. Where the machines
    have unequal parts of a group, the smallest part decides: its processes have most."""
    shards = 1
    if division.weights == "sharded":
        shards = len(division.groups[0].ranks)
    elif division.weights == "sharded_per_machine":
        shards = min(
            min(Counter(rank // machine_size for rank in group.ranks).values())
            for group in division.groups
        )
    return Sharing(shards=shards, sequence=division.sequence, side_by_side=division.side_by_side)


def sharing_on(machine: Machine, config: ResolvedRun) -> Sharing:
    """That of the run `config` with the processes that `machine` says it has.

    ConfigError if so many processes can't do what the run file asks for.
    """
    if machine.ranks == 1:
        return ALONE
    sharing = sharing_in(division_of(config, machine.ranks), machine.machine_size)
    return replace(sharing, machine=machine.processes)
