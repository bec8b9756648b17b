"""How the processes of a run find each other, each in a thread of one process here."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import PrefixStore, TCPStore

from onewan.errors import RankError
from onewan.parallel import watch as watching
from onewan.parallel.meeting import Place, meet, own_place
from onewan.parallel.watch import Watch


@pytest.fixture
def store() -> Any:  # the type stubs of PyTorch do not have `clone`
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def met(store: Any, count: int) -> set[str]:
    with ThreadPoolExecutor(count) as threads:
        # A connection of its own for each, as processes have them.
        asked = [threads.submit(meet, store.clone(), rank, count, 20.0) for rank in range(count)]
        return {answer.result() for answer in asked}


def test_processes_that_are_started_again_do_not_meet_earlier_ones(store: Any) -> None:
    """torchrun keeps its store when it restarts processes."""
    with pytest.raises(RankError):
        meet(store.clone(), 1, 3, 0.05)  # one that has come too early, and has ended
    first, second = met(store, 3), met(store, 3)
    assert len(first) == len(second) == 1
    assert first != second


@pytest.mark.parametrize(("rank", "missing"), [(0, "rank 1, 2"), (2, "rank 0")])
def test_who_does_not_come_is_named(store: Any, rank: int, missing: str) -> None:
    with pytest.raises(RankError, match=f"{missing} did not within 0 s"):
        meet(store, rank, 3, 0.1)


def watches(store: Any, count: int) -> list[Watch]:
    places = [Place(rank, f"host{rank}", 1, (str(rank), 1, ""), rank == 0) for rank in range(count)]
    made = []
    for rank in range(count):
        own = PrefixStore("signs", store.clone())
        Watch.prepare(own, rank)
        made.append(Watch(own, places, rank, patience=60, tell=print))
    return made


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of a test; and no watch ends the process of the test."""
    for name, seconds in (("BEAT", 0.02), ("STALE", 0.5), ("TELL", 0.2), ("GRACE", 600)):
        monkeypatch.setattr(watching, f"{name}_SECONDS", seconds)


@pytest.mark.usefixtures("quick")
def test_all_name_the_process_that_has_failed_first(store: Any) -> None:
    """Also those that do not watch it."""
    all_watches = watches(store, 8)
    for watch in all_watches[:-1]:
        watch.start()
    all_watches[7].say_failed("a clip\ncan't be read")
    all_watches[6].say_failed("rank 7 has gone")
    found = [watch.outcome() for watch in all_watches[:6]]
    for watch in all_watches[:-1]:
        watch.stop()
    assert found == [
        (
            f"rank 7 on host7 failed: a clip\\ncan't be read, so rank {rank} on host{rank} ends; "
            "--resume continues from the newest saved state",
            False,
        )
        for rank in range(6)
    ]


@pytest.mark.usefixtures("quick")
def test_a_process_without_signs_of_life_is_named_by_those_before_it(store: Any) -> None:
    all_watches = watches(store, 3)
    for watch in all_watches[:2]:  # the third is not alive
        watch.start()
    found = [watch.outcome()[0] or "" for watch in all_watches[:2]]
    for watch in all_watches[:2]:
        watch.stop()
    assert all(line.startswith("rank 2 on host2 has given no sign of life") for line in found)


@pytest.mark.usefixtures("quick")
def test_a_process_that_has_ended_in_order_is_not_missed(store: Any) -> None:
    stays, ends = watches(store, 2)
    ends.say_over()
    stays.start()
    found = stays.outcome()
    stays.stop()
    assert found == (None, False)


def test_the_place_of_the_store_is_known() -> None:
    assert own_place(0, {"MASTER_ADDR": "127.0.0.1"}).has_store
    assert not own_place(0, {"MASTER_ADDR": "192.0.2.1"}).has_store  # no machine has this address
