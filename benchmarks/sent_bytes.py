"""What a process of a run has sent: calls of torch.distributed, and the bytes that the kernel has
sent over the process's connections (Linux only)."""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from figures import ROOT
from torch.distributed import distributed_c10d

sys.path.append(str(ROOT / "tests"))

from support.torchrun import train

from onewan.parallel import shards
from onewan.train import steps as steps_module


class Sending(NamedTuple):
    """What one process has sent in a step, on average over some."""

    calls: float
    size: float


COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "broadcast"),
    "all_to_all_single",
)
"""Functions of torch.distributed that are counted, in any version of it."""
COUNTED_STEPS = 4
"""Of each process; two come before them."""


def counted(run_file: Path, overrides: Sequence[str], machine_size: int) -> Sending:
    """Train a run as one of several processes; what this one has sent in the middle of it. At most
    `machine_size` of them take themselves to be on one machine."""
    local = min(machine_size, int(os.environ["LOCAL_WORLD_SIZE"]))
    os.environ["LOCAL_WORLD_SIZE"] = str(local)
    calls = Counter[str]()

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def count(*given: Any, **named: Any) -> Any:
            calls[name] += 1
            return call(*given, **named)

        return count

    for name in COLLECTIVES:
        if hasattr(dist, name):
            wrapped = counting(name, getattr(dist, name))
            # Objects are gathered and told by functions that call those of their own module.
            for module in (dist, distributed_c10d):
                setattr(module, name, wrapped)
    shards._REDUCE_SCATTER = counting("reduce_scatter", shards._REDUCE_SCATTER)
    before_steps: list[tuple[int, int]] = []
    train_step = steps_module.train_step

    def step(*given: Any) -> Any:
        before_steps.append((calls.total(), bytes_sent()))
        return train_step(*given)

    steps_module.train_step = step
    train(run_file, overrides)
    first, last = before_steps[1], before_steps[1 + COUNTED_STEPS]
    return Sending(*((end - begin) / COUNTED_STEPS for begin, end in zip(first, last, strict=True)))


_TCP_INFO_BYTES_SENT = 200
"""Where the kernel's `tcp_info` has the bytes that a connection has sent, without headers."""


def bytes_sent() -> int:
    """Over all connections of this process but those to the store, by which processes meet and give
    signs of life."""
    store = int(os.environ["MASTER_PORT"])
    return sum(size for port, size in _connections() if port != store)


def _connections() -> Iterator[tuple[int, int]]:
    """(the other end's port, bytes sent) of each."""
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed since, no socket, not connected
            if not os.readlink(entry).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as found:
                if found.family in (socket.AF_INET, socket.AF_INET6):
                    port = found.getpeername()[1]
                    told = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    yield port, struct.unpack_from("<Q", told, _TCP_INFO_BYTES_SENT)[0]
