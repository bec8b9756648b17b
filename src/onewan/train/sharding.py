"""`Sharding`: which weights of a trainable are sharded over processes, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # a run of one process imports nothing of torch.distributed
    from onewan.parallel.shards import ShardGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """The shards of one trainable."""

    group: ShardGroup
    """The processes that have them."""
    shapes: Mapping[str, torch.Size]
    """Of the whole weights that are sharded, by their names; all others are whole everywhere."""

    def total_norm(self, names: Sequence[str], norms: Sequence[Tensor]) -> Tensor:
        """The norm of all gradients together, 0-d float32, from those of this process's parts."""
        return self.group.norm(norms, is_shard=[name in self.shapes for name in names])

    def draws_of(self, name: str) -> tuple[str, ...]:
        """What else than its name keys the random draws for a weight: another number of shards
        gives other draws."""
        part = self.group.part
        return (f"shard {part.number} of {part.count}",) if name in self.shapes else ()

    def local(self, name: str, value: Any) -> Any:
        """This process's rows of a whole tensor that belongs to the weight `name`, such as its
        moments; anything else is returned as it is."""
        is_split = name in self.shapes and isinstance(value, Tensor)
        return self.group.shard(value) if is_split and value.shape == self.shapes[name] else value

    def local_entry(self, name: str, entry: Any) -> Any:
        """The same for a weight's entry in the saved state of an optimizer."""
        if name not in self.shapes:
            return entry
        state = {key: self.local(name, value) for key, value in entry["state"].items()}
        shape = list(self.group.shard(torch.empty(self.shapes[name], device="meta")).shape)
        return {**entry, "state": state, "rest": self.local(name, entry["rest"]), "shape": shape}
