"""Sums over processes: right for any sizes of tensors, sent a few at a time, and those of gradients
while the backward pass computes others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.equal_runs import first_gradients_in_small_messages
from support.runs import CLASS_WORD, RunFile
from support.torchrun import together

from onewan.memory import block_runner
from onewan.parallel import bucket_sums
from onewan.parallel.ranks import join

pytestmark = pytest.mark.long

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
    bucket_sums.SUM_NUMBERS = BUCKET
    send: Callable[..., Any] = dist.all_reduce
    dist.all_reduce = lambda *given, **named: _Counted(send(*given, **named))
    with join(torch.device("cpu"), 60) as ranks:
        group = tuple(range(ranks.count))
        ranks.prepare([group])
        tensors = [torch.full((size,), 10.0 * i + ranks.rank) for i, size in enumerate(SIZES)]
        own = ranks.adding(group)
        # One process has them one after another, and the other one all at the end.
        for part in [[tensor] for tensor in tensors] if ranks.is_first else [tensors]:
            own.send(part)
        own.finish()
    values = [tensor.unique().tolist() for tensor in tensors]
    return values, _Counted.count, _Counted.most, _Counted.now


def test_sums_are_right_and_few_are_under_way_at_a_time() -> None:
    expected = [[20.0 * i + 1] for i in range(len(SIZES))]
    for values, count, most, left in together(2, _sums):
        assert values == expected
        assert (count, most, left) == (8, bucket_sums._UNDERWAY, 0)


def _order_of_a_step(run_yaml: Path, overrides: Sequence[str]) -> list[str]:
    """What happens in the first step: "sum" where a message with gradients leaves, and "block 1"
    where the backward pass of block 1 begins."""
    happened = list[str]()
    send, backward = dist.all_reduce, block_runner._ForwardPass.backward

    def sent(*given: Any, **named: Any) -> Any:
        happened.append("sum")
        return send(*given, **named)

    def computed(self: Any, index: int, *given: Any) -> Any:
        happened.append(f"block {index}")
        return backward(self, index, *given)

    dist.all_reduce = sent
    block_runner._ForwardPass.backward = computed  # pyright: ignore[reportAttributeAccessIssue]
    first_gradients_in_small_messages(run_yaml, overrides)
    return happened


@pytest.mark.parametrize("passes", ["one", "two", "a preservation pass"])
def test_gradients_of_later_blocks_leave_before_the_backward_pass_of_earlier_ones(
    run_file: RunFile, tmp_path: Path, passes: str
) -> None:
    settings = ["wan_config.max_frames=1", "method={kind: lora, rank: 8}", "train.batch_size=1"]
    # The last process has two of three batches: only its last backward pass sends.
    settings += [f"train.accumulation={3 if passes == 'two' else 2}"]
    if passes == "a preservation pass":
        settings += [*CLASS_WORD, "train.preservation_weight=1"]
    run_file("ti2v-5b", *settings)
    first, last = together(2, _order_of_a_step, tmp_path / "run.yaml", settings)
    assert first.count("sum") == last.count("sum") > 4
    more = ["block 1", "block 0"]
    assert _without_sums(first) == (2 if passes == "a preservation pass" else 1) * more
    assert _without_sums(last) == (1 if passes == "one" else 2) * more
    for happened in (first, last):
        *_, later, earlier = (i for i, what in enumerate(happened) if what != "sum")
        assert later < happened.index("sum") < earlier


def _without_sums(happened: Sequence[str]) -> list[str]:
    return [what for what in happened if what != "sum"]
