"""What processes send each other, by arithmetic."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from onewan.arithmetic import collectives
from onewan.arithmetic.collectives import (
    SUM_NUMBERS,
    BlockSeconds,
    Network,
    bytes_of_exchange,
    bytes_of_gathering,
    bytes_of_shards,
    bytes_of_sum,
    bytes_of_telling,
    steps_of_telling,
    sums_of,
)
from onewan.parallel import bucket_sums
from onewan.parallel.bucket_sums import BucketSums

NETWORK = Network(within=100.0, between=10.0, machine_size=4, delay=0.5)


@pytest.mark.parametrize(("ranks", "sent"), [(1, 0), (2, 12), (3, 16), (4, 18)])
def test_a_sum_goes_around_the_ring_twice(ranks: int, sent: int) -> None:
    # Of 12 bytes in as many parts as ranks, all parts but one: to be summed, and summed.
    assert bytes_of_sum(12, ranks) == pytest.approx(sent)


def test_bytes_of_what_is_gathered_and_told() -> None:
    assert bytes_of_gathering(12, 1) == bytes_of_telling(12, 1) == 0
    assert bytes_of_gathering(12, 4) == 36
    assert bytes_of_telling(12, 4) == 9  # three of four receive it


@pytest.mark.parametrize(("ranks", "steps"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (1024, 10)])
def test_all_who_have_heard_tell_others(ranks: int, steps: int) -> None:
    assert steps_of_telling(ranks) == steps


def test_a_ring_is_as_fast_as_its_slowest_connection() -> None:
    assert NETWORK.rate(range(4)) == NETWORK.rate(range(4, 8)) == 100
    assert NETWORK.rate(range(2, 6)) == NETWORK.rate(range(8)) == 10
    # Machines whose network is faster than what is within them.
    assert Network(within=5.0, between=10.0).rate(range(16)) == 5


def test_a_sum_takes_the_time_of_its_bytes_and_its_messages() -> None:
    assert NETWORK.seconds_of_sum(0, range(4)) == 0
    assert NETWORK.seconds_of_sum(1000, [0]) == 0
    assert NETWORK.seconds_of_sum(1000, range(4)) == pytest.approx(6000 / 100 + 6 * 0.5)
    assert NETWORK.seconds_of_sum(1000, range(8)) == pytest.approx(7000 / 10 + 14 * 0.5)
    one, two = (NETWORK.seconds_of_sum(SUM_NUMBERS + more, [0, 1]) for more in (0, 1))
    assert two - one == pytest.approx(2 * 0.5 + 4 / 100, rel=1e-4)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("count", [0, 1, 4, 5, 9])
def test_the_number_of_messages_is_that_of_the_sums(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    for module in (collectives, bucket_sums):
        monkeypatch.setattr(module, "SUM_NUMBERS", 100)
    sent = list[torch.Tensor]()

    def sendable(flat: torch.Tensor) -> torch.Tensor:
        sent.append(flat)
        return flat

    assert dist.group.WORLD is not None
    own = BucketSums(dist.group.WORLD, sendable, contextlib.nullcontext)
    tensors = [torch.ones(25) for _ in range(count)]
    for half in (tensors[: count // 2], tensors[count // 2 :]):  # in as many calls as one likes
        own.send(half)
    own.finish()
    assert len(sent) == sums_of(sum(tensor.numel() for tensor in tensors)) == -(-count // 4)


def test_of_shards_each_process_sends_all_but_one() -> None:
    assert bytes_of_shards(12, 1) == bytes_of_exchange(12, 1) == 0
    # A sum is a reduce-scatter and an all-gather.
    assert 2 * bytes_of_shards(12, 4) == bytes_of_sum(12, 4) == 18
    assert bytes_of_exchange(12, 4) == 9


def test_shards_take_the_time_of_a_ring() -> None:
    assert NETWORK.seconds_of_shards(1000, [2]) == 0
    assert NETWORK.seconds_of_shards(1000, range(4)) == pytest.approx(750 / 100 + 3 * 0.5)
    assert NETWORK.seconds_of_shards(1000, range(8)) == pytest.approx(875 / 10 + 7 * 0.5)


def test_processes_of_a_machine_share_its_connection_to_others() -> None:
    assert NETWORK.seconds_of_sum_between(1000, machines=1, at_once=4) == 0
    seconds = NETWORK.seconds_of_sum_between(1000, machines=2, at_once=4)
    assert seconds == pytest.approx(4 * 1000 / 10 + 2 * 0.5)
    assert NETWORK.seconds_of_exchange(1000, [0]) == 0
    assert NETWORK.seconds_of_exchange(1000, range(4)) == pytest.approx(750 / 100 + 0.5)
    # Four processes of each machine send a half of what they have to the other one.
    assert NETWORK.seconds_of_exchange(1000, range(8)) == pytest.approx(4 * 500 / 10 + 0.5)


@pytest.mark.parametrize(
    ("block", "layers", "seconds"),
    [
        # Only the first gathering and the last gradients have nothing beside them.
        (BlockSeconds(forward=5, backward=10, gather=2, reduce=4), 6, 2 + 4),
        (BlockSeconds(forward=5, backward=10, gather=2), 6, 2),
        (BlockSeconds(forward=5, backward=10, gather=2, reduce=4), 1, 2 + 4),
        # Forward: 2 more for each block but the first. Backward: 11 beside 10 in the four between.
        (BlockSeconds(forward=5, backward=10, gather=7, reduce=4), 6, 7 + 5 * 2 + 4 * 1 + 4),
        # The last block's backward pass has a gathering beside it, the first one's gradients.
        (BlockSeconds(forward=1, backward=2, gather=3, reduce=4), 2, 3 + 2 + 1 + 2 + 4),
        (BlockSeconds(forward=5, backward=10, gather=2, reduce=4, between=3), 6, 2 + 4 + 3),
        (BlockSeconds(forward=5, backward=10, gather=2, between=12), 6, 2 + 5 * 2 + 12),
    ],
)
def test_a_block_takes_as_long_as_what_takes_longest(
    block: BlockSeconds, layers: int, seconds: float
) -> None:
    assert block.waiting(layers) == pytest.approx(seconds)
