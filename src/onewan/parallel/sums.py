"""`Sums` of tensors over processes; those of one process are what it has. See
`onewan.parallel.bucket_sums` for several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Sums(Protocol):
    """Sums over the processes of a group, computed in float32, which travel in messages while the
    caller computes."""

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Begin to replace `tensors` with their sums, of which all processes get the same bits.
        They must not be changed before `finish` has returned.

        All processes send tensors of the same sizes in the same order, in as many calls as they
        like. Other calls of `Ranks` for the same group come between the same tensors on all.
        """
        ...

    def finish(self) -> None:
        """Return when all tensors that were sent are sums."""
        ...


class NoSums:
    """Sums of one process: what it has."""

    def send(self, tensors: Sequence[Tensor]) -> None:
        del tensors

    def finish(self) -> None:
        pass
