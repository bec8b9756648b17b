"""`Connection`: the `Ranks` of a run of several processes, over torch.distributed.

Objects and the host's tensors go through gloo, the device's tensors through the backend that
PyTorch has for it. A thread tells the others that this process is alive, and watches them: one that
was killed, hangs or can't be reached is noticed also while this process computes for minutes or
waits for it.
"""

from __future__ import annotations

import io
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from onewan.devices import collective_backend, is_host
from onewan.errors import Interrupted, RankError

log = logging.getLogger(__name__)

_T = TypeVar("_T")

BEAT_SECONDS = 1.0
"""Between two signs of life."""
STALE_SECONDS = 15.0
"""Without a sign of life, after which a process has failed. A thread that gives it waits for others
of its process only as long as Python code runs."""
GRACE_SECONDS = 5.0
"""In which this process may end by itself when another one has failed. It can't where it waits for
the device or the network, and is then ended without more ado: what it has saved is whole."""
_BUCKET = 16 << 20
"""Numbers that are summed in one message: 64 MiB."""
_MESSAGE = 256 << 20
"""Bytes of a message with a part of a state."""


class Connection:
    """This process, connected with the others of its run."""

    def __init__(self, store: dist.Store, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self._store = store
        self._groups: dict[tuple[int, ...], Any] = {tuple(range(count)): dist.group.WORLD}
        self._places: list[str] = []
        self._backend_devices: frozenset[str] = frozenset()
        self._watch: _Watch | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @classmethod
    @contextmanager
    def open(cls, timeout: float, device: torch.device) -> Iterator[Connection]:
        """Connect with the processes that torchrun has started, as its environment says.

        `timeout` is for the beginning, and for each message, in seconds.
        """
        limit = timedelta(seconds=timeout)
        try:
            store, rank, count = next(dist.rendezvous("env://", timeout=limit))
            own = dist.PrefixStore("onewan", store)
            backend = collective_backend(device)
            dist.init_process_group(
                "gloo" if backend is None else f"cpu:gloo,{device.type}:{backend}",
                store=dist.PrefixStore("torch", store),
                rank=rank,
                world_size=count,
                timeout=limit,
                device_id=None if backend is None else device,
            )
        except (RuntimeError, ValueError, OSError) as error:
            master = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise RankError(
                f"the processes of the run can't reach each other at {master} ({_first(error)}); "
                "check torchrun's --rdzv-endpoint and the network"
            ) from error
        self = cls(own, rank, count)
        if backend is not None:
            self._backend_devices = frozenset({device.type})
        try:
            self._places = self.gathered(place_of(rank))
            self._watch = _Watch(own, rank, self._places)
            self._watch.start()
            yield self
            # The store is in one of the processes, which others may still need.
            self.gathered(None)
        except RankError:
            raise  # another process is to blame, and has said so if it could
        except Interrupted:
            self._say_ended("")  # all have agreed to stop
            raise
        except BaseException as error:
            self._say_ended(_first(error) or type(error).__name__)
            raise
        else:
            self._say_ended("")
        finally:
            if self._watch is not None:
                self._watch.stop()
            with suppress(RuntimeError, ValueError):
                dist.destroy_process_group()

    def prepare(self, groups: Sequence[Sequence[int]]) -> None:
        for ranks in map(tuple, groups):
            if ranks not in self._groups:
                with self._naming_who_failed():
                    self._groups[ranks] = dist.new_group(list(ranks))

    def gathered(self, value: _T) -> list[_T]:
        values: list[_T | None] = [None] * self.count
        with self._naming_who_failed():
            dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]  # each has been replaced

    def from_first(self, value: _T) -> _T:
        values = [value]
        with self._naming_who_failed():
            dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    @torch.no_grad()
    def add(self, tensors: Sequence[Tensor], group: Sequence[int]) -> None:
        if len(group) == 1:
            return
        process_group = self._groups[tuple(group)]
        waiting: list[tuple[list[Tensor], Tensor, dist.Work]] = []
        with self._naming_who_failed():
            for bucket in _buckets(tensors):
                flat = torch.cat([tensor.reshape(-1).float() for tensor in bucket])
                flat = self._sendable(flat)
                work = dist.all_reduce(flat, group=process_group, async_op=True)
                assert work is not None
                waiting.append((bucket, flat, work))
            for bucket, flat, work in waiting:
                work.wait()
                sums = flat.split([tensor.numel() for tensor in bucket])
                for tensor, total in zip(bucket, sums, strict=True):
                    tensor.copy_(total.view_as(tensor))

    def taken_by_first(self, source: int, value: dict[str, Any] | None) -> dict[str, Any] | None:
        with self._naming_who_failed():
            if self.rank == source:
                file = io.BytesIO()
                torch.save(value, file)
                sent = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
                dist.send(torch.tensor([len(sent)]), dst=0)
                for part in sent.split(_MESSAGE):
                    dist.send(part, dst=0)
            elif self.is_first:
                size = torch.zeros(1, dtype=torch.int64)
                dist.recv(size, src=source)
                received = torch.empty(int(size), dtype=torch.uint8)
                for part in received.split(_MESSAGE):
                    dist.recv(part, src=source)
                # As a file of a state: nothing that is received runs code.
                return torch.load(io.BytesIO(received.numpy().data), weights_only=True)
        return None

    def _sendable(self, tensor: Tensor) -> Tensor:
        """`tensor`, on the host if the backends can't send it from where it is."""
        is_sendable = is_host(tensor.device) or tensor.device.type in self._backend_devices
        return tensor if is_sendable else tensor.cpu()

    # ------------------------------------------------------------------------------ failures

    def _say_ended(self, reason: str) -> None:
        with suppress(RuntimeError):
            self._store.set(_ended(self.rank), reason or "-")

    @contextmanager
    def _naming_who_failed(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            found = None if self._watch is None else self._watch.who_failed()
            raise RankError(
                found or f"the processes of the run can't reach each other ({_first(error)})"
            ) from error


class _Watch:
    """The thread that gives this process's signs of life, and looks for those of the others."""

    def __init__(self, store: dist.Store, rank: int, places: Sequence[str]) -> None:
        self._store, self._rank, self._places = store, rank, places
        self._others = [other for other in range(len(places)) if other != rank]
        now = time.monotonic()
        self._beats: dict[int, tuple[bytes, float]] = dict.fromkeys(self._others, (b"", now))
        self._found: str | None = None
        self._is_found, self._is_over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch of ranks", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join(2 * BEAT_SECONDS)

    def who_failed(self) -> str | None:
        """A line about the process that has failed, once it is known; None if none has."""
        self._is_found.wait(STALE_SECONDS + 2 * BEAT_SECONDS)
        return self._found

    def _run(self) -> None:
        beat = 0
        while not self._is_over.wait(BEAT_SECONDS):
            beat += 1
            try:
                self._store.set(f"beat/{self._rank}", str(beat))
                found = next(filter(None, map(self._problem, self._others)), None)
            except RuntimeError as error:
                found = f"the rendezvous of the run does not answer any more ({_first(error)})"
            if found is not None:
                self._found = f"{found}; the newest saved state is whole, and --resume continues it"
                self._is_found.set()
                self._end()
                return

    def _problem(self, other: int) -> str | None:
        if self._store.check([_ended(other)]):
            reason = self._store.get(_ended(other)).decode()
            return None if reason == "-" else f"{self._places[other]} ended: {reason}"
        beat = f"beat/{other}"
        value = self._store.get(beat) if self._store.check([beat]) else b""
        seen, since = self._beats[other]
        if value != seen:
            self._beats[other] = value, time.monotonic()
        elif time.monotonic() - since > STALE_SECONDS:
            return (
                f"{self._places[other]} ended: it was killed, hangs, or its machine can't be "
                f"reached (no sign of life for {STALE_SECONDS:.0f} s)"
            )
        return None

    def _end(self) -> None:
        """End this process if it does not end by itself."""
        if not self._is_over.wait(GRACE_SECONDS):
            sys.stderr.write(f"onewan: {place_of(self._rank)} ends: {self._found}\n")
            sys.stderr.flush()
            os._exit(1)


def place_of(rank: int) -> str:
    """This process, for people."""
    return f"rank {rank} on {socket.gethostname()}"


def _ended(rank: int) -> str:
    return f"ended/{rank}"


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in groups that are sent together, each of one device."""
    bucket, size = list[Tensor](), 0
    for tensor in tensors:
        if bucket and (size + tensor.numel() > _BUCKET or tensor.device != bucket[0].device):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


def _first(error: BaseException) -> str:
    """The first line of an error."""
    return next(iter(str(error).splitlines()), "")
