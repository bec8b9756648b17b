"""How the processes of a run find each other, each in a thread of one process here."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import PrefixStore, TCPStore

from onewan.errors import RankError
from onewan.parallel import watch as watching
from onewan.parallel.meeting import Meeting
from onewan.parallel.place import Place, own_place
from onewan.parallel.watch import Watch


@pytest.fixture
def store() -> Any:  # the type stubs of PyTorch do not have `clone`
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of a test; and no watch ends the process of the test."""
    for name, seconds in (("BEAT", 0.02), ("STALE", 0.5), ("TELL", 0.2), ("GRACE", 600)):
        monkeypatch.setattr(watching, f"{name}_SECONDS", seconds)


def place(rank: int) -> Place:
    """On a machine of its own."""
    return Place(rank, f"host{rank}", 1, (str(rank), 1, ""), rank == 0)


def watch_of(store: Any, name: str, own: Place) -> Watch:
    return Watch(PrefixStore(name, store.clone()), own, patience=60, tell=print)


def meet(
    store: Any, own: Place, count: int, seconds: float = 20.0, *, lives: bool = True
) -> tuple[str, list[Place]]:
    """What a process does, with a connection of its own; without signs of life if it is to be one
    that was killed."""
    store = store.clone()
    meeting = Meeting(store, own, count, seconds)
    watch = watch_of(store, meeting.name, own)
    if lives:
        watch.start()
    try:
        return meeting.name, meeting.complete(watch)
    finally:
        if lives:
            watch.stop()


def met(store: Any, count: int) -> set[str]:
    with ThreadPoolExecutor(count) as threads:
        asked = [threads.submit(meet, store, place(rank), count) for rank in range(count)]
        answers = [answer.result() for answer in asked]
    assert all(places == [place(rank) for rank in range(count)] for _, places in answers)
    return {name for name, _ in answers}


def test_processes_that_are_started_again_do_not_meet_earlier_ones(store: Any) -> None:
    """torchrun keeps its store when it restarts processes."""
    with pytest.raises(RankError):
        meet(store, place(1), 3, 0.05)  # one that has come too early, and has ended
    first, second = met(store, 3), met(store, 3)
    assert len(first) == len(second) == 1
    assert first != second


@pytest.mark.parametrize(("rank", "missing"), [(0, "rank 1, 2"), (2, "rank 0")])
def test_who_does_not_come_is_named(store: Any, rank: int, missing: str) -> None:
    with pytest.raises(RankError, match=f"{missing} did not within 0 s"):
        meet(store, place(rank), 3, 0.1)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("failing", [0, 1])
def test_who_comes_and_is_killed_is_named_by_those_who_wait(store: Any, failing: int) -> None:
    """While they wait for the third process, which does not come."""
    waiting = 1 - failing
    with ThreadPoolExecutor(2) as threads:
        killed = threads.submit(meet, store, place(failing), 3, 0.3, lives=False)
        with pytest.raises(RankError) as raised:
            meet(store, place(waiting), 3)
        with pytest.raises(RankError):
            killed.result()
    assert str(raised.value).startswith(
        f"rank {failing} on host{failing} has given no sign of life for "
    )
    assert str(raised.value).endswith(
        f", so rank {waiting} on host{waiting} ends; --resume continues from the newest saved state"
    )


def watches(store: Any, count: int) -> list[Watch]:
    places = [place(rank) for rank in range(count)]
    made = [watch_of(store, "signs", own) for own in places]
    for watch in made:
        watch.look_for(places)
    return made


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
