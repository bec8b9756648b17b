"""How the processes of a run find each other, and what they know of each other's places."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from onewan.errors import RankError

_POLL_SECONDS = 0.05
_ARRIVALS = "onewan/arrivals"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process runs."""

    rank: int
    host: str
    process: int
    """Its number in the system."""
    starter: tuple[str, int, str]
    """The same for processes that one torchrun has started, which can see each other's numbers."""
    has_store: bool
    """Whether the store, through which processes find each other, is on its machine."""

    def __str__(self) -> str:
        """For people."""
        return f"rank {self.rank} on {self.host}"


def own_place(rank: int, environment: Mapping[str, str] = os.environ) -> Place:
    """The place of this process."""
    host = socket.gethostname()
    starter = (host, os.getppid(), environment.get("GROUP_RANK", ""))
    return Place(rank, host, os.getpid(), starter, _is_here(environment.get("MASTER_ADDR", "")))


def meet(store: Any, rank: int, count: int, seconds: float) -> str:
    """Wait until all processes of the run have come; a name of this meeting, the same for all.

    torchrun keeps its store when it starts the processes anew, so that there may be keys of earlier
    ones in it. Whatever is kept under the name is of these processes only.
    RankError, which names those who have not come after `seconds`.
    """
    # `Any`: the type stubs of PyTorch do not have `append`.
    own = uuid.uuid4().hex
    store.append(_ARRIVALS, f"{rank} {own}\n")
    if rank == 0:
        return _receive(store, own, count, seconds)
    meeting, limit = None, timedelta(seconds=seconds)
    try:
        store.wait([f"onewan/meeting/{own}"], limit)
        meeting = store.get(f"onewan/meeting/{own}").decode()
        store.append(f"onewan/present/{meeting}", f"{rank}\n")
        store.wait([f"onewan/complete/{meeting}"], limit)
    except dist.DistStoreError as error:
        present = set(range(1, count)) if meeting is None else _present(store, meeting)
        raise _not_here(present, count, seconds) from error
    return meeting


def _receive(store: Any, own: str, count: int, seconds: float) -> str:
    """What the first process does: it tells all others the name of the meeting."""
    store.append(f"onewan/present/{own}", "0\n")
    told, end = {own}, time.monotonic() + seconds
    while len(present := _present(store, own)) < count:
        # Also set for processes of earlier meetings, which have ended and do not read it.
        for arrival in store.get(_ARRIVALS).decode().splitlines():
            name = arrival.split()[1]
            if name not in told:
                told.add(name)
                store.set(f"onewan/meeting/{name}", own)
        if time.monotonic() > end:
            raise _not_here(present, count, seconds)
        time.sleep(_POLL_SECONDS)
    store.set(f"onewan/complete/{own}", "")
    return own


def _present(store: Any, meeting: str) -> set[int]:
    return {int(rank) for rank in store.get(f"onewan/present/{meeting}").split()}


def _not_here(present: set[int], count: int, seconds: float) -> RankError:
    missing = ", ".join(str(rank) for rank in range(count) if rank not in present)
    return RankError(
        f"not all {count} processes of the run have started: rank {missing} did not within "
        f"{seconds:.0f} s; what torchrun has printed on the other machines says why"
    )


def _is_here(address: str) -> bool:
    """Whether a host name or an address is that of this machine."""
    with suppress(OSError):
        for family, kind, _, _, name in socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family, kind) as tried:
                tried.bind(name)  # only possible with an own address
                return True
    return False
