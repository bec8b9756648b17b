"""`MachineMemory`: host memory that all processes of a run on one machine have in common."""

from __future__ import annotations

import mmap
import os
import socket
from contextlib import suppress

from onewan.parallel.ranks import Ranks


class MachineMemory:
    """Regions of memory for what is the same in all processes, such as frozen weights."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.is_writer = False
        """Whether this process fills the regions: the first one of its machine."""

    def region(self, size: int) -> mmap.mmap | None:
        """`size` bytes of zeros, which the processes of the machine share; None, in all processes
        of the run, where a machine can't do that. All processes call this with the same size."""
        machine, own = socket.gethostname(), None
        with suppress(OSError, AttributeError):  # only Linux has such files
            own = os.memfd_create("onewan weights")
        # A file without a name, in no file system: nothing is left of it when the processes end.
        place = None if own is None else f"/proc/{os.getpid()}/fd/{own}"
        places = self._ranks.gathered((machine, size, place))
        first = next(rank for rank, (name, _, _) in enumerate(places) if name == machine)
        self.is_writer = first == self._ranks.rank
        found = None
        with suppress(OSError):
            found = self._opened(own, places[first][2], size)
        is_shared = all(self._ranks.gathered(found is not None and places[first][1] == size))
        if own is not None:
            os.close(own)
        return found if is_shared else None

    def _opened(self, own: int | None, place: str | None, size: int) -> mmap.mmap | None:
        if own is None or place is None:
            return None
        if self.is_writer:
            os.ftruncate(own, size)
            return mmap.mmap(own, size)
        other = os.open(place, os.O_RDWR)
        try:
            # Its size may not be set yet; it is the same that the writer sets.
            os.ftruncate(other, size)
            return mmap.mmap(other, size)
        finally:
            os.close(other)

    def written(self) -> None:
        """Return when the writer of each machine has filled its region. All processes call this."""
        self._ranks.gathered(None)
