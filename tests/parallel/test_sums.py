"""Sums over processes: right for any sizes of tensors, and sent a few at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.torchrun import together

from onewan.parallel import connection
from onewan.parallel.ranks import join

BUCKET = 1000
SIZES = (10, 2000, 999, 1, 500, 500, 700, 800, 5000, 3)
"""Of tensors: several in a message, one that fills it, and some that are larger than it."""


class _Counted:
    """A message that is on its way until it is waited for."""

    now = most = count = 0

    def __init__(self, work: dist.Work) -> None:
        self._work = work
        _Counted.count += 1
        _Counted.now += 1
        _Counted.most = max(_Counted.most, _Counted.now)

    def wait(self) -> bool:
        _Counted.now -= 1
        return self._work.wait()


def _sums() -> tuple[list[list[float]], int, int, int]:
    """The different numbers in each sum; how many messages there were, how many of them at a time,
    and how many nobody waited for."""
    connection.SUM_NUMBERS = BUCKET
    send: Callable[..., Any] = dist.all_reduce
    dist.all_reduce = lambda *given, **named: _Counted(send(*given, **named))
    with join(torch.device("cpu"), 60) as ranks:
        group = tuple(range(ranks.count))
        ranks.prepare([group])
        tensors = [torch.full((size,), 10.0 * i + ranks.rank) for i, size in enumerate(SIZES)]
        ranks.add(tensors, group)
    values = [tensor.unique().tolist() for tensor in tensors]
    return values, _Counted.count, _Counted.most, _Counted.now


@pytest.mark.long
def test_sums_are_right_and_few_are_under_way_at_a_time() -> None:
    expected = [[20.0 * i + 1] for i in range(len(SIZES))]
    for values, count, most, left in together(2, _sums):
        assert values == expected
        assert (count, most, left) == (8, connection._UNDERWAY, 0)
