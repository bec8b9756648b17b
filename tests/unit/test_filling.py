"""Sharing the filling of a cache: what another process has begun is left to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from support.interrupted import claiming
from torch import Tensor

from onewan.data import filling
from onewan.data.cache import EntryCache
from onewan.data.encode import no_progress
from onewan.data.filling import CacheFiller, Filled
from onewan.errors import DataError
from onewan.locks import Claim

ITEMS = [(f"{number:040x}", number) for number in range(6)]
"""Keys, and what their entries are made of."""


@pytest.fixture
def cache(tmp_path: Path) -> EntryCache:
    return EntryCache(tmp_path)


def entry(number: int) -> dict[str, Tensor]:
    return {"text": torch.full((1, 2), float(number))}


class Filling:
    """`CacheFiller.fill` in a thread, as in another process, and what it has encoded so far."""

    def __init__(self, cache: EntryCache, workers: int, filler: CacheFiller | None = None) -> None:
        self.encoded = list[int]()
        self._result: Filled | None = None
        self._filler = filler or CacheFiller(cache)
        self._thread = threading.Thread(target=self._fill, args=(workers,))
        self._thread.start()

    def _fill(self, workers: int) -> None:
        def encode(number: int, read: int) -> Mapping[str, Tensor]:
            assert read == number
            self.encoded.append(number)
            return entry(number)

        self._result = self._filler.fill(
            "text", ITEMS, lambda number: number, encode, no_progress, about=str, workers=workers
        )

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.005)
        assert condition()

    def result(self) -> Filled:
        self._thread.join(20)
        assert self._result is not None
        return self._result


@pytest.fixture(params=[0, 3])
def workers(request: pytest.FixtureRequest) -> Iterator[int]:
    yield request.param


def test_an_entry_that_another_process_makes_is_not_made_again(
    cache: EntryCache, workers: int
) -> None:
    key, number = ITEMS[2]
    claim = Claim(cache.claim_path("text", key))
    assert claim.taken
    running = Filling(cache, workers)
    running.wait_for(lambda: len(running.encoded) == len(ITEMS) - 1)
    cache.save("text", key, entry(number), "")
    claim.release()
    assert running.result().encoded == len(ITEMS) - 1 and number not in running.encoded
    assert not list((cache.folder / "claims").iterdir())


def test_an_entry_whose_process_was_killed_is_made_last(cache: EntryCache, workers: int) -> None:
    key, number = ITEMS[2]
    lock = cache.claim_path("text", key)
    with claiming(lock):
        running = Filling(cache, workers)
        running.wait_for(lambda: len(running.encoded) == len(ITEMS) - 1)
        assert number not in running.encoded
    assert running.result().encoded == len(ITEMS) and running.encoded[-1] == number
    cache.remove_abandoned()
    assert not list((cache.folder / "claims").iterdir())


def test_an_entry_of_a_process_that_makes_nothing_is_made_here_in_the_end(
    cache: EntryCache, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "_MOST_WAITING", 0.3)
    claim = Claim(cache.claim_path("text", ITEMS[2][0]))
    running = Filling(cache, workers)
    assert running.result().encoded == len(ITEMS) and running.encoded[-1] == 2
    claim.release()


def test_a_damaged_entry_that_another_process_has_replaced_is_not_made_again(
    cache: EntryCache,
) -> None:
    for key, number in ITEMS:
        cache.save("text", key, entry(number), "")
    for key, _ in ITEMS[:2]:
        path = cache.path("text", key)
        path.write_bytes(path.read_bytes()[:-1])
    filler = CacheFiller(cache)
    filler.find_damaged("text", [key for key, _ in ITEMS])
    cache.save("text", *ITEMS[0][:1], entry(0), "")
    running = Filling(cache, 0, filler)
    assert running.result().encoded == 1 and running.encoded == [1]
    assert cache.problem("text", ITEMS[1][0]) is None


def test_an_item_that_can_not_be_used_is_claimed_by_nobody_afterwards(cache: EntryCache) -> None:
    def read(number: int) -> int:
        if number in (1, 9):
            raise DataError(f"{number}: is damaged")
        return number

    copies = [*ITEMS, (ITEMS[1][0], 9)]
    filled = CacheFiller(cache).fill(
        "text", copies, read, lambda number, _: entry(number), no_progress, about=str
    )
    assert filled.encoded == len(ITEMS) - 1
    assert {n: str(e) for n, e in filled.errors.items()} == {
        1: "1: is damaged",
        6: "9: is damaged",
    }
    assert not list((cache.folder / "claims").iterdir())
