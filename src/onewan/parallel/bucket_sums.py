"""`BucketSums`: sums of tensors over processes, in messages that travel while the caller computes.

Which tensors a message has follows from their order and their sizes alone. So one process may send
each of them as soon as it is known, and another one all of them at the end, and their messages
still fit together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from onewan.arithmetic.collectives import SUM_NUMBERS

_UNDERWAY = 4
"""Messages at a time, so that a copy of all gradients of a model never exists."""


class BucketSums:
    """The `Sums` of a group of processes."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        sendable: Callable[[Tensor], Tensor],
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """`sendable` returns a tensor from where the backends of `group` can send it. `waiting` is
        the context of everything that may wait for other processes."""
        self._group, self._sendable, self._waiting = group, sendable, waiting
        self._bucket = list[Tensor]()
        """What the next message will have."""
        self._sent = deque[_Sent]()

    @torch.no_grad()
    def send(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            if self._bucket and not _fits(tensor, self._bucket):
                self._send_bucket()
            self._bucket.append(tensor)

    @torch.no_grad()
    def finish(self) -> None:
        if self._bucket:
            self._send_bucket()
        with self._waiting():
            while self._sent:
                self._sent.popleft().take_sums()

    def _send_bucket(self) -> None:
        bucket, self._bucket = self._bucket, []
        with self._waiting():
            if len(self._sent) == _UNDERWAY:
                self._sent.popleft().take_sums()
            flat = torch.cat([tensor.reshape(-1).float() for tensor in bucket])
            flat = self._sendable(flat)
            work = dist.all_reduce(flat, group=self._group, async_op=True)
            assert work is not None
            self._sent.append(_Sent(bucket, flat, work))


class _Sent(NamedTuple):
    """Tensors whose sums are on their way."""

    bucket: list[Tensor]
    flat: Tensor
    """Their numbers, and then the sums."""
    work: dist.Work

    def take_sums(self) -> None:
        """Wait for the sums, and write them into the tensors."""
        self.work.wait()
        sums = self.flat.split([tensor.numel() for tensor in self.bucket])
        for tensor, total in zip(self.bucket, sums, strict=True):
            tensor.copy_(total.view_as(tensor))


def _fits(tensor: Tensor, bucket: Sequence[Tensor]) -> bool:
    """Whether `tensor` is sent in one message with those of `bucket`, which is not empty."""
    numbers = sum(other.numel() for other in bucket) + tensor.numel()
    return numbers <= SUM_NUMBERS and tensor.device == bucket[0].device
