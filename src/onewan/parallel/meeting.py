"""How the processes of a run find each other through torchrun's store.

torchrun keeps its store when it starts the processes anew, so that there may be keys of earlier
ones in it. So each process that comes leaves a token, and the first one answers each token with the
name of the meeting. Whatever is kept under that name is of these processes only.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from onewan.errors import RankError
from onewan.parallel.place import Place
from onewan.parallel.watch import Watch

_FIRST_WAITS, _OTHERS_WAIT = timedelta(seconds=0.05), timedelta(seconds=1)
"""Before a process looks whether others have come, or have failed."""
_ARRIVALS = "onewan/arrivals"


class Meeting:
    """The processes of a run from when this one has come until all have.

    From when it knows the name, each is watched by those that wait for it.
    """

    def __init__(self, store: Any, own: Place, count: int, seconds: float) -> None:
        """Come, and learn the name. RankError if the first process does not come in `seconds`."""
        # `Any`: the type stubs of PyTorch do not have `append`.
        self._store, self._own, self._count, self._seconds = store, own, count, seconds
        token = uuid.uuid4().hex
        store.append(_ARRIVALS, f"{own.rank} {token}\n")
        self.name, self._first = token, own
        """The name is the same for all."""
        if own.rank > 0:
            try:
                store.wait([_answer(token)], timedelta(seconds=seconds))
            except dist.DistStoreError as error:
                raise self._not_here(set(range(1, count))) from error
            self.name, _, first = store.get(_answer(token)).decode().partition(" ")
            self._first = Place.of_json(first)

    def complete(self, watch: Watch) -> list[Place]:
        """Wait until all processes have come; their places, by rank. `watch` has started, and
        looks for all of them from then on.

        RankError, which names those who have not come after the time, or who has failed.
        """
        end, every = time.monotonic() + self._seconds, f"onewan/complete/{self.name}"
        self._store.append(self._present, f"{self._own.to_json()}\n")
        if self._own.rank > 0:
            watch.look_for([self._first])
        answered = {self.name}
        while not self._is_set(every):
            if self._own.rank == 0:
                self._answer(answered)
                places = self._places()
                watch.look_for(places, most=len(places))
                if len(places) == self._count:
                    self._store.set(every, "")
            if watch.found is not None:
                raise RankError(watch.found)
            if time.monotonic() > end:
                raise self._not_here({place.rank for place in self._places()})
        places = self._places()
        watch.look_for(places)
        return places

    def _is_set(self, key: str) -> bool:
        """Whether the store has a key, after some time without it."""
        try:
            self._store.wait([key], _FIRST_WAITS if self._own.rank == 0 else _OTHERS_WAIT)
        except dist.DistStoreError:
            return False
        return True

    def _answer(self, answered: set[str]) -> None:
        """Tell all that have come the name, and where this first process is."""
        # Also set for processes of earlier meetings, which have ended and do not read it.
        for arrival in self._store.get(_ARRIVALS).decode().splitlines():
            token = arrival.split()[1]
            if token not in answered:
                answered.add(token)
                self._store.set(_answer(token), f"{self.name} {self._own.to_json()}")

    @property
    def _present(self) -> str:
        return f"onewan/present/{self.name}"

    def _places(self) -> list[Place]:
        lines = self._store.get(self._present).decode().splitlines()
        return sorted(map(Place.of_json, lines), key=lambda place: place.rank)

    def _not_here(self, present: set[int]) -> RankError:
        missing = ", ".join(str(rank) for rank in range(self._count) if rank not in present)
        return RankError(
            f"not all {self._count} processes of the run have started: rank {missing} did not "
            f"within {self._seconds:.0f} s; what torchrun has printed on the other machines says "
            "why"
        )


def _answer(token: str) -> str:
    return f"onewan/meeting/{token}"
