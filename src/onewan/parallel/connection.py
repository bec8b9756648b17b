"""`Connection`: the `Ranks` of a run of several processes, over torch.distributed.

Objects and the host's tensors go through gloo, the device's tensors through the backend that
PyTorch has for it. A `Watch` notices when another process has failed.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from onewan.devices import collective_backend, is_host, make_current
from onewan.errors import ConfigError, Interrupted, RankError
from onewan.parallel.bucket_sums import BucketSums
from onewan.parallel.meeting import Meeting
from onewan.parallel.place import own_place
from onewan.parallel.shards import ShardGroup
from onewan.parallel.sums import NoSums, Sums
from onewan.parallel.watch import Watch

_T = TypeVar("_T")

MEETING_SECONDS = 300.0
"""In which all processes of a run have to come: torchrun starts them at about the same time."""
_PATIENT = timedelta(days=7)
"""For messages through the host. A process may take hours to answer, as the one that makes sample
videos does; whether it can still answer is for the watch to find out."""
_MESSAGE = 256 << 20
"""Bytes of a message with a part of a state."""


class Connection:
    """This process, connected with the others of its run."""

    def __init__(
        self,
        rank: int,
        count: int,
        device: torch.device,
        backend_devices: frozenset[str],
        host: dist.ProcessGroup,
        watch: Watch,
    ) -> None:
        """Once the processes are connected; `host` sends what is in the host's memory."""
        self.rank, self.count = rank, count
        self._device = device
        self._groups: dict[tuple[int, ...], Any] = {tuple(range(count)): dist.group.WORLD}
        self._backend_devices = backend_devices
        self._host, self._watch = host, watch

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @classmethod
    @contextmanager
    def open(
        cls, timeout: float, device: torch.device, tell: Callable[[str], None]
    ) -> Iterator[Connection]:
        """Connect with the processes that torchrun has started, as its environment says.

        `timeout` is the number of seconds for the sum of gradients, and in which something has to
        happen in a process. `tell` is called with the line about a process that has failed where
        this one is ended by it before it can raise an error.
        """
        within = min(timeout, MEETING_SECONDS)
        with _reaching():
            found: tuple[Any, int, int] = next(
                dist.rendezvous("env://", timeout=timedelta(seconds=within))
            )
            store, rank, count = found
            own = own_place(rank)
            meeting = Meeting(store, own, count, within)
            # Its own connection: others wait in theirs until a key is there.
            signs = dist.PrefixStore(f"onewan/{meeting.name}", store.clone())
            watch = Watch(signs, own, patience=timeout, tell=tell)
        make_current(device)
        backend = collective_backend(device)
        devices = frozenset[str]() if backend is None else frozenset({device.type})
        watch.start()
        try:
            with _telling(watch):
                with _naming_who_failed(watch, _unreachable):
                    meeting.complete(watch)
                    dist.init_process_group(
                        "gloo" if backend is None else f"cpu:gloo,{device.type}:{backend}",
                        store=dist.PrefixStore(f"torch/{meeting.name}", store),
                        rank=rank,
                        world_size=count,
                        timeout=timedelta(seconds=timeout),
                        device_id=None if backend is None else device,
                    )
                    host = dist.new_group(backend="gloo", timeout=_PATIENT)
                assert isinstance(host, dist.ProcessGroup)
                yield (self := cls(rank, count, device, devices, host, watch))
                # The store is in one of the processes, which others may still need.
                self.gathered(None)
        finally:
            watch.stop()
            with suppress(RuntimeError, ValueError):
                if dist.is_initialized():
                    dist.destroy_process_group()

    def prepare(self, groups: Sequence[Sequence[int]]) -> None:
        for ranks in map(tuple, groups):
            if ranks not in self._groups:
                with self.waiting():
                    self._groups[ranks] = dist.new_group(list(ranks))

    def gathered(self, value: _T) -> list[_T]:
        values: list[_T | None] = [None] * self.count
        with self.waiting():
            dist.all_gather_object(values, value, group=self._host)
        return values  # type: ignore[return-value]  # each has been replaced

    def from_first(self, value: _T) -> _T:
        values = [value]
        with self.waiting():
            dist.broadcast_object_list(values, src=0, group=self._host)
        return values[0]

    def add(self, tensors: Sequence[Tensor], group: Sequence[int]) -> None:
        sums = self.adding(group)
        sums.send(tensors)
        sums.finish()

    def adding(self, group: Sequence[int]) -> Sums:
        if len(group) == 1:
            return NoSums()
        return BucketSums(self._groups[tuple(group)], self._sendable, self.waiting)

    @torch.no_grad()
    def exchanged(
        self, rows: Tensor, given: Sequence[int], taken: Sequence[int], group: Sequence[int]
    ) -> Tensor:
        if len(group) == 1:
            return rows
        sent = self._sendable(rows.contiguous())
        received = sent.new_empty((sum(taken), *sent.shape[1:]))
        with self.waiting():
            # As bytes, since backends do not have an all-to-all for each dtype.
            dist.all_to_all_single(
                received.view(torch.uint8),
                sent.view(torch.uint8),
                list(taken),
                list(given),
                group=self._groups[tuple(group)],
            )
        return received.to(rows.device)

    def shard_group(self, members: Sequence[int], shards: int) -> ShardGroup:
        if not is_host(self._device) and not self._backend_devices:
            raise ConfigError(
                "run file",
                [
                    f"parallel.weights: can't be sharded on {self._device.type}, for which PyTorch "
                    "has no backend of torch.distributed; choose replicated"
                ],
            )
        shape = (self.count // len(members), len(members) // shards, shards)
        names = ("experts", "replicas", "shards")
        with self.waiting():
            host_mesh = mesh = init_device_mesh(self._device.type, shape, mesh_dim_names=names)
            if not is_host(self._device):
                host_mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        return ShardGroup(
            ranks=self,
            members=tuple(members),
            mesh=mesh["replicas", "shards"],
            host_mesh=host_mesh["replicas", "shards"],
            process_group=self._groups[tuple(members)],
        )

    def taken_by_first(self, source: int, value: dict[str, Any] | None) -> dict[str, Any] | None:
        with self.waiting():
            if self.rank == source:
                file = io.BytesIO()
                torch.save(value, file)
                sent = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
                dist.send(torch.tensor([len(sent)]), dst=0, group=self._host)
                for part in sent.split(_MESSAGE):
                    dist.send(part, dst=0, group=self._host)
            elif self.is_first:
                size = torch.zeros(1, dtype=torch.int64)
                dist.recv(size, src=source, group=self._host)
                received = torch.empty(int(size), dtype=torch.uint8)
                for part in received.split(_MESSAGE):
                    dist.recv(part, src=source, group=self._host)
                # As a file of a state: nothing that is received runs code.
                return torch.load(io.BytesIO(received.numpy().data), weights_only=True)
        return None

    def _sendable(self, tensor: Tensor) -> Tensor:
        """`tensor`, on the host if the backends can't send it from where it is."""
        is_sendable = is_host(tensor.device) or tensor.device.type in self._backend_devices
        return tensor if is_sendable else tensor.cpu()

    def waiting(self) -> AbstractContextManager[None]:
        return _naming_who_failed(self._watch, _silent)


@contextmanager
def _naming_who_failed(
    watch: Watch, unknown: Callable[[BaseException], RankError]
) -> Iterator[None]:
    """While this process waits for others; a RankError names the one that has failed, or is made by
    `unknown` where none is known to have."""
    before, watch.is_waiting = watch.is_waiting, True
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        found, was_stopped = watch.outcome()
        if was_stopped and found is None:
            raise Interrupted from error
        raise (unknown(error) if found is None else RankError(found)) from error
    finally:
        watch.is_waiting = before


@contextmanager
def _telling(watch: Watch) -> Iterator[None]:
    """Tell the other processes how this one ends."""
    try:
        yield
    except RankError as error:
        if watch.found is None:  # else another process is to blame, and all know it
            watch.say_failed(_first(error))
        raise
    except Interrupted:
        watch.say_stopped()
        raise
    except KeyboardInterrupt:
        watch.say_failed("stopped by Ctrl-C")
        raise
    except BaseException as error:
        watch.say_failed(_first(error) or type(error).__name__)
        raise
    else:
        watch.say_over()


@contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        raise _unreachable(error) from error


def _silent(error: BaseException) -> RankError:
    return RankError(f"the processes of the run can't reach each other ({_first(error)})")


def _unreachable(error: BaseException) -> RankError:
    """The same before they have been connected."""
    address, port = (os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT"))
    if "EADDRINUSE" in str(error):
        return RankError(
            f"MASTER_PORT: {port} is used by another program on this machine; choose another "
            "one, or let torchrun choose it (--standalone, or --rdzv-backend c10d)"
        )
    return RankError(
        f"the processes of the run can't reach each other at {address}:{port} (MASTER_ADDR and "
        f"MASTER_PORT, from torchrun's --rdzv-endpoint; {_first(error)}); check that this "
        "is an address of the first machine, which the others can reach, and its firewall"
    )


def _first(error: BaseException) -> str:
    """The first line of an error."""
    return next(iter(str(error).splitlines()), "")
