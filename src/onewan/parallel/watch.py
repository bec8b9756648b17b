"""`Watch`: notices that another process of the run has failed, also while this one computes for
minutes or waits for the other, and ends this one.

Each process gives signs of life in the store of the run. It looks for those of a few others only,
and who first sees that one is missing tells all: so the store has as little to do for a thousand
processes as for two, and all name the same one.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType

import psutil
import torch.distributed as dist

from onewan.errors import one_line
from onewan.parallel.place import Place

BEAT_SECONDS = 1.0
"""Between two signs of life."""
STALE_SECONDS = 15.0
"""Without a sign of life, after which a process has failed. The thread that gives it waits for
others of its process only as long as one of them keeps Python from running."""
GRACE_SECONDS = 5.0
"""In which this process may end by itself when another one has failed. It can't where it waits for
the device or the network, and is then ended at once: what it has saved is whole."""
TELL_SECONDS = 3.0
"""In which others hear of a failure before this process ends, and perhaps the store with it."""
_WATCHED = 4
"""Processes that each one watches: the next ones, so that also the first one of a machine with
many is missed by one of another machine."""
_OVER = "over"
_FAILURE, _STOPPED, _HEARD = "failure", "stopped", "heard"


class Watch:
    """Gives this process's signs of life, and looks for those of others, from `start` to `stop`.

    `store` has only keys of these processes, and those of the first one are made before the others
    make theirs. Until `look_for`, this process gives signs and looks for none. `tell` is called
    with the line about a failure where this process can't end by itself. Where the thread that
    creates this object has been at the same place in the code for `patience` seconds, and
    `is_waiting` is False, this process hangs.
    """

    def __init__(
        self,
        store: dist.Store,
        own: Place,
        *,
        patience: float,
        tell: Callable[[str], None],
    ) -> None:
        self._store, self._own = store, own
        self._patience, self._tell = patience, tell
        self.is_waiting = False
        self._places: Sequence[Place] = [own]
        self._watched = list[_Signs]()
        self._neighbours = list[Place]()
        self._found: str | None = None
        self._was_stopped = False
        self._is_decided, self._is_over = threading.Event(), threading.Event()
        self._rounds = 0
        self._main = threading.get_ident()
        self._threads = [
            threading.Thread(target=run, name=f"watch of ranks ({name})", daemon=True)
            for name, run in (("signs", self._exchange), ("end", self._judge))
        ]
        store.set(_beat(own.rank), "0")
        if own.rank == 0:
            store.set(_FAILURE, "")
            store.set(_STOPPED, "")

    def look_for(self, places: Sequence[Place], most: int = _WATCHED) -> None:
        """From now on look for those of `places` that were started beside this process, and for the
        signs of the next `most` by rank. All of them have made their watch."""
        rank = self._own.rank
        others = sorted(
            (place for place in places if place.rank != rank),
            key=lambda place: (place.rank < rank, place.rank),
        )
        known = {signs.place.rank: signs for signs in self._watched}
        # Each is replaced at once, since a thread reads them.
        self._watched = [known.get(place.rank) or _Signs(place) for place in others[:most]]
        self._neighbours = [place for place in others if place.starter == self._own.starter]
        self._places = sorted((*others, self._own), key=lambda place: place.rank)

    @property
    def found(self) -> str | None:
        """The line about the process that has failed, if one has."""
        return self._found

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(2 * BEAT_SECONDS)

    def say_over(self) -> None:
        """Nobody is to expect signs of life of this process any more."""
        self._briefly(lambda: self._store.set(_beat(self._own.rank), _OVER))

    def say_stopped(self) -> None:
        """This process ends since the user asked it to stop."""
        self._briefly(lambda: self._store.set(_STOPPED, str(self._own)))
        self.say_over()

    def say_failed(self, reason: str) -> None:
        """This process ends by an error; returns when the others know."""
        self._is_over.set()
        self._briefly(lambda: self._publish(f"{self._own} failed: {one_line(reason)}"))

    def outcome(self) -> tuple[str | None, bool]:
        """Why another process does not answer, once that is known: the line about the one that has
        failed, or None; and whether the user has stopped it."""
        self._is_decided.wait(STALE_SECONDS + 3 * BEAT_SECONDS + TELL_SECONDS)
        return self._found, self._was_stopped

    # ------------------------------------------------------------------------- signs of life

    def _exchange(self) -> None:
        before = time.monotonic()
        while not self._is_over.wait(BEAT_SECONDS):
            now = time.monotonic()
            try:
                self._store.set(_beat(self._own.rank), str(self._rounds + 1))
                found = self._failure(now - before)
                if found is not None:
                    found = self._publish(found)
            except RuntimeError as error:
                found = self._without_store(next(iter(str(error).splitlines()), ""))
            if found is not None and not self._is_over.is_set():
                self._decide(found)
                return
            self._rounds, before = self._rounds + 1, now

    def _failure(self, elapsed: float) -> str | None:
        """What has become of another process, if it has failed; `elapsed` is the number of seconds
        since this was looked at."""
        # Looked for first: whoever ends in order has said so before.
        watched = self._watched
        gone = [place for place in self._neighbours if not psutil.pid_exists(place.process)]
        names = [_FAILURE, _STOPPED, *(_beat(signs.place.rank) for signs in watched)]
        failure, stopped, *beats = [value.decode() for value in self._store.multi_get(names)]
        if failure:
            return failure
        if stopped and not self._was_stopped:
            self._was_stopped = True
            self._is_decided.set()
        for place in gone:
            if self._store.get(_beat(place.rank)).decode() != _OVER:
                return (
                    f"{place} was killed (by kill -9, or by the system, as when a machine has no "
                    "memory left)"
                )
        for signs, beat in zip(watched, beats, strict=True):
            if signs.silent_for(beat, elapsed) > STALE_SECONDS:
                return (
                    f"{signs.place} has given no sign of life for {STALE_SECONDS:.0f} s: it hangs "
                    "or was killed, or its machine can't be reached"
                )
        return None

    def _publish(self, failure: str) -> str:
        """Tell all processes of a failure, and wait until they know; the failure that was told
        first."""
        first = self._store.compare_set(_FAILURE, "", failure).decode()
        heard = self._store.add(_HEARD, 1)
        end = time.monotonic() + TELL_SECONDS
        # Who tells waits for those who hear. One of them may be the one that has failed.
        while first == failure and heard < len(self._places) - 1 and time.monotonic() < end:
            time.sleep(0.05)
            heard = self._store.add(_HEARD, 0)
        return first

    def _without_store(self, error: str = "") -> str:
        """The line for where the store does not answer."""
        there = [place for place in self._places if place.has_store] or list(self._places[:1])
        ranks = ", ".join(str(place.rank) for place in there)
        return (
            f"rank {ranks} on {there[0].host} ended or can't be reached: the store of the run, "
            f"which is there, does not answer{f' ({error})' if error else ''}"
        )

    # ----------------------------------------------------------------------------- ending

    def _judge(self) -> None:
        """End this process once a failure is known. A thread of its own, since the other one gets
        no answer from a machine that can't be reached."""
        rounds, without_store, before = 0, 0.0, time.monotonic()
        standing = _Standing(self._main)
        while not self._is_over.is_set() and self._found is None:
            self._is_over.wait(BEAT_SECONDS)
            elapsed, before = _counted(time.monotonic() - before), time.monotonic()
            without_store = 0.0 if self._rounds != rounds else without_store + elapsed
            rounds = self._rounds
            if without_store > STALE_SECONDS + TELL_SECONDS:
                self._decide(self._without_store())
            elif standing.seconds(elapsed, self.is_waiting) > self._patience:
                self._hangs(standing.place)
        if self._found is not None and not self._is_over.wait(GRACE_SECONDS):
            self._end(self._found)

    def _hangs(self, place: str) -> None:
        line = (
            f"{self._own} hangs: nothing has happened for {self._patience / 60:g} minutes "
            f"(parallel.timeout_minutes) at {place}"
        )
        self._briefly(lambda: self._publish(line))
        self._decide(line)

    def _decide(self, found: str) -> None:
        who = "" if found.startswith(f"{self._own} ") else f", so {self._own} ends"
        self._found = f"{found}{who}; --resume continues from the newest saved state"
        self._is_decided.set()

    def _end(self, line: str) -> None:
        def say() -> None:
            sys.stderr.write(f"onewan: {line}\n")
            sys.stderr.flush()
            self._tell(line)

        self._briefly(say)
        os._exit(1)

    @staticmethod
    def _briefly(action: Callable[[], object]) -> None:
        """Do what may get no answer: from the network, a full pipe, a disk."""

        def attempt() -> None:
            with suppress(RuntimeError, OSError, ValueError):
                action()

        thread = threading.Thread(target=attempt, name="last words", daemon=True)
        thread.start()
        thread.join(TELL_SECONDS + BEAT_SECONDS)


class _Signs:
    """The signs of life of another process."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._seen, self._silent = "", 0.0

    def silent_for(self, beat: str, elapsed: float) -> float:
        """Seconds without another sign than `beat`, of which `elapsed` are new."""
        if beat in {self._seen, _OVER}:
            self._silent = 0.0 if beat == _OVER else self._silent + _counted(elapsed)
        else:
            self._seen, self._silent = beat, 0.0
        return self._silent


class _Standing:
    """Where a thread is in the code, and for how long."""

    def __init__(self, thread: int) -> None:
        self._thread = thread
        self._stack: tuple[tuple[int, int], ...] = ()
        self._seconds = 0.0
        self.place = ""

    def seconds(self, elapsed: float, is_waiting: bool) -> float:
        """Seconds at the present place, of which `elapsed` are new; 0 while `is_waiting`."""
        frame = sys._current_frames().get(self._thread)
        stack = tuple(_positions(frame))
        is_same = stack == self._stack and not is_waiting
        self._stack, self._seconds = stack, self._seconds + elapsed if is_same else 0.0
        if frame is not None:
            self.place = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        return self._seconds


def _positions(frame: FrameType | None) -> list[tuple[int, int]]:
    """The frames of a stack, each with its position in the code."""
    positions: list[tuple[int, int]] = []
    while frame is not None:
        positions.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return positions


def _counted(elapsed: float) -> float:
    """Of the seconds that have passed those that count: a process that was itself stopped for some
    time, as by Ctrl-Z, does not hold that against others."""
    return min(elapsed, 3 * BEAT_SECONDS)


def _beat(rank: int) -> str:
    return f"beat/{rank}"
