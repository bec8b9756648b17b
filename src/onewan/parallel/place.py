"""`Place`: where a process of a run is."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass


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

    def to_json(self) -> str:
        """In one line, for the store."""
        return json.dumps(asdict(self))

    @classmethod
    def of_json(cls, line: str) -> Place:
        """The reverse of `to_json`."""
        fields = json.loads(line)
        host, process, group = fields.pop("starter")
        return cls(**fields, starter=(host, process, group))


def own_place(rank: int, environment: Mapping[str, str] = os.environ) -> Place:
    """The place of this process."""
    host = socket.gethostname()
    starter = (host, os.getppid(), environment.get("GROUP_RANK", ""))
    return Place(rank, host, os.getpid(), starter, _is_here(environment.get("MASTER_ADDR", "")))


def _is_here(address: str) -> bool:
    """Whether a host name or an address is that of this machine."""
    with suppress(OSError):
        for family, kind, _, _, name in socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family, kind) as tried:
                tried.bind(name)  # only possible with an own address
                return True
    return False
