"""Work that is done in threads, ahead of whoever takes its results.

Threads and not processes: decoding, converting and resizing frames are done by FFmpeg and Pillow,
which release Python's lock, so two threads take 1.0 times the CPU time of one, and decoded clips,
100 MB and more, need not be copied between processes.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, TypeVar

from onewan.parallel.environment import local_count

_T = TypeVar("_T")
_R = TypeVar("_R")

_MOST_BYTES = 2 * 2**30
"""Memory for results that are made ahead: five clips of 121 frames at 1280x720."""
_MOST_AUTOMATIC = 4
"""Workers of `auto` on machines with many cores: more would take memory, and the encoder is then
the slower part."""


def usable_cores() -> int:
    """The number of cores that this process may use, where it is one of several of a run its share
    of the machine's."""
    share = max(1, (os.cpu_count() or 1) // local_count())
    affinity = getattr(os, "sched_getaffinity", None)  # not on Windows and macOS
    return share if affinity is None else min(share, len(affinity(0)))


def worker_count(workers: int | Literal["auto"]) -> int:
    """The number of threads that `video_data.workers` stands for."""
    return min(_MOST_AUTOMATIC, usable_cores()) if workers == "auto" else workers


def results_ahead(
    function: Callable[[_T], _R],
    items: Sequence[_T],
    *,
    workers: int,
    size: Callable[[_T], int] = lambda _: 0,
) -> Generator[tuple[_T, Callable[[], _R]]]:
    """Each item, and a function that returns `function(item)` or raises what that has raised.

    In the order of the items, whatever order they are finished in. While one result is used, up to
    `workers` others are being made in as many threads; with 0 workers each is made when it is asked
    for. `size` is the memory that the result of an item takes, in bytes: if it is large, fewer are
    made ahead. Close the generator (`contextlib.closing`) to end the threads when an exception
    leaves the loop; what is being made then is waited for.
    """
    if not workers:
        yield from ((item, partial(function, item)) for item in items)
        return
    waiting = deque[tuple[_T, Future[_R]]]()
    submitted = used = 0
    pool = ThreadPoolExecutor(workers, thread_name_prefix="onewan-ahead")
    try:
        while submitted < len(items) or waiting:
            while submitted < len(items) and len(waiting) <= workers:
                # Whoever uses the results may end with the next one, and what is read for others
                # would be in vain.
                if waiting and _has_failed(waiting[0][1]):
                    break
                item = items[submitted]
                if waiting and used + size(item) > _MOST_BYTES:
                    break
                waiting.append((item, pool.submit(function, item)))
                submitted, used = submitted + 1, used + size(item)
            item, future = waiting.popleft()
            yield item, future.result
            used -= size(item)
    finally:
        pool.shutdown(cancel_futures=True)


def _has_failed(future: Future[Any]) -> bool:
    return future.done() and future.exception() is not None
