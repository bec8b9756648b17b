"""The feed-forward chunks of a run: chosen by its first memory plan, and kept.

Chunks change the order in which gradients are summed, so a run keeps the numbers that it began
with, as it keeps its attention backend (`onewan.train.attention`): they are saved with the state,
and a resumed run is planned with them, also on a device for which the plan would choose others.
"""

from __future__ import annotations

from collections.abc import Iterable

from onewan.checkpoint.store import DamagedStateError
from onewan.data.clip import Clip
from onewan.runs.layout import RunLayout
from onewan.train.memory import RunMemory, bucket_of
from onewan.train.run import Run
from onewan.train.saved_state import StateFacts, read_facts

CHUNKS_FIELD = "memory.feed_forward_chunks"


def chosen_chunks(memory: RunMemory, clips: Iterable[Clip]) -> dict[str, int]:
    """The number of chunks that training uses, by the size of `clips`."""
    buckets = dict.fromkeys(map(bucket_of, clips))
    return {str(bucket): memory.feed_forward_chunks(bucket) for bucket in buckets}


def saved_chunks(layout: RunLayout) -> dict[str, int]:
    """The numbers in the newest state of a run that can be read; none if there is no such state,
    which is reported where the state is loaded."""
    for step in reversed(layout.saved_steps()):
        try:
            return read_facts(layout.state(step)).feed_forward_chunks or {}
        except DamagedStateError:  # noqa: PERF203  (a few states)
            continue
    return {}


def chunks_change(run: Run, facts: StateFacts) -> str | None:
    """In one line, how the chunks of `run` differ from those of the state with `facts`.

    On another type of device the results differ anyway.
    """
    if facts.attention is not None and facts.attention.device != run.device.type:
        return None
    present, saved = run.state.feed_forward_chunks, facts.feed_forward_chunks
    if saved is None:  # then only the run file of that time has a number
        before = facts.config.get("memory", {}).get("feed_forward_chunks") or 1
        saved = dict.fromkeys(present, before)
    changed = [
        f"was {saved[size]}, is {count} for {size}"
        for size, count in present.items()
        if saved.get(size, count) != count
    ]
    if not changed:
        return None
    given = run.config.memory.feed_forward_chunks
    why = "" if given is not None else " (what it was does not fit on this device)"
    return f"{CHUNKS_FIELD}: {', '.join(changed)}{why}"
