"""`Ranks`: this process among those of its run, and what they send each other.

`alone()` is a run of one process, which sends nothing. `join()` makes the connection with the
others that torchrun has started; see `onewan.parallel.connection`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from onewan.errors import ConfigError
from onewan.parallel.environment import is_started_by_torchrun
from onewan.parallel.sums import NoSums, Sums

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from onewan.parallel.shards import ShardGroup

_T = TypeVar("_T")

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that torchrun sets."""


class Ranks(Protocol):
    """A process of a run. Each call that sends something has to be made by all processes, or by all
    of `group`, in the same order. A RankError, which says who has failed and why, comes from any of
    them if a process has ended or does not answer."""

    rank: int
    """From 0."""
    count: int
    """Number of processes."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run's folder."""
        ...

    def prepare(self, groups: Sequence[Sequence[int]]) -> None:
        """Make groups of processes, which `add` can then use."""
        ...

    def gathered(self, value: _T) -> list[_T]:
        """The values of all processes, by rank."""
        ...

    def from_first(self, value: _T) -> _T:
        """The value of the first process; `value` of others is not used."""
        ...

    def add(self, tensors: Sequence[Tensor], group: Sequence[int]) -> None:
        """Replace each tensor with its sum over the processes of `group`, which all get the same
        bits. Sums are computed in float32."""
        ...

    def adding(self, group: Sequence[int]) -> Sums:
        """The same for tensors that become known one after another."""
        ...

    def exchanged(
        self, rows: Tensor, given: Sequence[int], taken: Sequence[int], group: Sequence[int]
    ) -> Tensor:
        """An all-to-all: each process of `group` gives every other one some rows of a tensor.

        `given` says how many consecutive `rows`, [n, ...] of any dtype, each process of `group`
        gets, this one included, and `taken` how many this one gets from each. Returns these, one
        behind the other, on the device of `rows`, without a gradient.
        """
        ...

    def waiting(self) -> AbstractContextManager[None]:
        """Around messages that PyTorch itself sends."""
        ...

    def shard_group(self, members: Sequence[int], shards: int) -> ShardGroup:
        """The `members`, each `shards` of which have all shards of a weight together. A call of
        all processes of the run, with their own members and the same numbers."""
        ...

    def taken_by_first(self, source: int, value: dict[str, Any] | None) -> dict[str, Any] | None:
        """What the process `source` gives the first one, which gets it; None for all others.
        Containers of tensors and numbers, as a file that `torch.load(weights_only=True)` reads."""
        ...


class Alone:
    """A run of one process."""

    rank, count, is_first = 0, 1, True

    def prepare(self, groups: Sequence[Sequence[int]]) -> None:
        del groups

    def gathered(self, value: _T) -> list[_T]:
        return [value]

    def from_first(self, value: _T) -> _T:
        return value

    def add(self, tensors: Sequence[Tensor], group: Sequence[int]) -> None:
        del tensors, group

    def adding(self, group: Sequence[int]) -> Sums:
        del group
        return NoSums()

    def exchanged(
        self, rows: Tensor, given: Sequence[int], taken: Sequence[int], group: Sequence[int]
    ) -> Tensor:
        del given, taken, group
        return rows

    def waiting(self) -> AbstractContextManager[None]:
        return nullcontext()

    def shard_group(self, members: Sequence[int], shards: int) -> ShardGroup:
        del members, shards
        raise AssertionError("one process has all weights")

    def taken_by_first(self, source: int, value: dict[str, Any] | None) -> dict[str, Any] | None:
        del source
        return value


@contextmanager
def first_alone(ranks: Ranks, *, together: bool = False) -> Iterator[bool]:
    """A block in which the first process does something that the others wait for, such as writing
    files, or with `together` all do something; it yields whether this one does."""
    yield together or ranks.is_first
    ranks.from_first(None)


@contextmanager
def join(
    device: torch.device,
    timeout: float,
    environment: Mapping[str, str] = os.environ,
    *,
    tell: Callable[[str], None] | None = None,
) -> Iterator[Ranks]:
    """The processes of this run, connected until the block ends; one process sends nothing.

    Each computes on a `device` of its own. `timeout` is the number of seconds after which a process
    in which nothing happens has failed. `tell` is called with the line about a process that has
    failed where this one is ended by it before it can raise an error.
    ConfigError if the environment is not one that torchrun makes.
    """
    if not is_started_by_torchrun(environment) or environment.get("WORLD_SIZE") == "1":
        yield Alone()
        return
    problems = [f"{name}: is missing" for name in _TORCHRUN if name not in environment]
    problems += [
        f"{name}: is {environment[name]!r}, and should be a number"
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if not environment.get(name, "0").isdecimal()
    ]
    if problems:
        raise ConfigError("environment of torchrun", problems)
    # Imported only here: a run of one process has no use for it.
    from onewan.parallel.connection import Connection

    with Connection.open(timeout, device, tell or _say_nothing) as connection:
        yield connection


def _say_nothing(line: str) -> None:
    del line
