"""Results that threads make ahead: in order, within bounds, and gone when nobody wants them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing

import pytest

from onewan.data import ahead
from onewan.data.ahead import results_ahead, worker_count


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_results_and_errors_come_in_the_order_of_the_items(workers: int) -> None:
    def double(number: int) -> int:
        time.sleep(0.002 * (number % 3))  # they finish in another order
        if number % 4 == 1:
            raise ValueError(f"{number} is refused")
        return 2 * number

    def outcome(result: Callable[[], int]) -> int | str:
        try:
            return result()
        except ValueError as error:
            return str(error)

    with closing(results_ahead(double, range(12), workers=workers)) as results:
        found = [(number, outcome(result)) for number, result in results]
    assert found == [(n, f"{n} is refused" if n % 4 == 1 else 2 * n) for n in range(12)]


class Recorder:
    """Counts how many results exist that have not been used up."""

    def __init__(self) -> None:
        self.made = 0
        self.lock = threading.Lock()

    def make(self, number: int) -> int:
        with self.lock:
            self.made += 1
        return number

    def settled(self, expected: Callable[[int], bool]) -> int:
        deadline = time.monotonic() + 5
        while not expected(self.made) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)  # for one too many
        return self.made


@pytest.mark.parametrize("workers", [1, 3])
def test_as_many_are_made_ahead_as_there_are_workers(workers: int) -> None:
    recorder = Recorder()
    with closing(results_ahead(recorder.make, range(20), workers=workers)) as results:
        for number, _ in results:
            expected = min(20, number + 1 + workers)
            assert recorder.settled(lambda made, n=expected: made >= n) == expected


def test_fewer_are_made_ahead_if_they_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_MOST_BYTES", 100)
    recorder = Recorder()
    sizes = [40, 50, 30, 300, 10]
    # 40 and 50, but not 30; then 50, 30; then 30 alone, since 300 are too many; 300 alone; 10.
    expected = [2, 3, 3, 4, 5]
    with closing(
        results_ahead(recorder.make, range(5), workers=4, size=lambda number: sizes[number])
    ) as results:
        made = [
            recorder.settled(lambda made, n=expected[number]: made >= n) for number, _ in results
        ]
    assert made == expected


def test_nothing_is_made_after_the_loop_was_left() -> None:
    recorder = Recorder()
    with (
        pytest.raises(KeyboardInterrupt),
        closing(results_ahead(recorder.make, range(1000), workers=2)) as results,
    ):
        for number, _ in results:
            if number == 3:
                raise KeyboardInterrupt
    made = recorder.made
    assert made <= 3 + 1 + 2
    assert not [t for t in threading.enumerate() if t.name.startswith("onewan-ahead")]
    assert recorder.settled(lambda _: True) == made


def test_auto_is_a_worker_for_each_core_up_to_four(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, workers in ((1, 1), (2, 2), (64, 4)):
        monkeypatch.setattr(ahead, "usable_cores", lambda n=cores: n)
        assert worker_count("auto") == workers
    assert worker_count(0) == 0 and worker_count(7) == 7
