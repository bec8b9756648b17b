"""What can be done at present with a run, or with its place in the queue: for buttons, with the
question before what can't be undone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.runs.jobs import Jobs, QueuedRun, Snapshot
from onewan.runs.statuses import KnownRun


@dataclass(frozen=True, slots=True)
class Action:
    """Something that can be done. Two with the same label are equal, since they look the same."""

    label: str
    do: Callable[[], str | None] = field(compare=False)
    """Blocks, and returns what to tell the user. OnewanError if it can't be done any more."""
    title: str = field(default="", compare=False)
    question: Callable[[], str] | None = field(default=None, compare=False)
    """What it means now, if the user is asked first, with a title."""


def actions_of_run(jobs: Jobs, run: KnownRun, now: Snapshot) -> list[Action]:
    """What a list of runs offers for one of those in `now`."""
    name = run.name
    delete = Action(
        "Delete", partial(jobs.delete, name), f"Delete {name}?", partial(_deletion, jobs, name)
    )
    if run.is_trained:
        actions = [Action("Stop", partial(jobs.stop, name))]
        if now.paused or any(each.entry.state == "waiting" for each in now.queue):
            actions.append(Action("Return to queue", partial(jobs.give_back, name)))
        return [*actions, forced_stop(jobs, name)]
    queued = now.queued(name)
    if queued is not None and queued.entry.state != "failed":
        return []
    if run.can_continue:
        return [Action("Continue", partial(jobs.go_on, name)), delete]
    return [delete]


def actions_of_entry(jobs: Jobs, each: QueuedRun, all_queued: Sequence[QueuedRun]) -> list[Action]:
    """What the queue offers for one of its entries."""
    queue, entry = jobs.queue, each.entry
    if entry.state in ("starting", "started"):
        return [Action("Stop", partial(jobs.stop, entry.run))]
    remove = Action("Remove", partial(queue.remove, entry.id))
    if entry.state == "failed":
        return [Action("Return to queue", partial(queue.return_to_queue, entry.id)), remove]
    waiting = [
        other.entry.id
        for other in all_queued
        if other.device == each.device and other.entry.state == "waiting"
    ]
    actions = [Action("Start next", partial(queue.start_first, entry.id))]
    if entry.id != waiting[0]:
        actions.append(Action("Up", partial(queue.move, entry.id, -1)))
    if entry.id != waiting[-1]:
        actions.append(Action("Down", partial(queue.move, entry.id, 1)))
    return [*actions, remove]


def forced_stop(jobs: Jobs, name: str) -> Action:
    """To end the trainer of the run called `name` at once."""

    def question() -> str:
        run = jobs.now.run(name)
        saved = run and run.status and run.status.saved_step
        kept = f"the state of step {saved:,} is kept" if saved else "no state was saved yet"
        return (
            f"The trainer is ended at once, whatever it is doing, and saves nothing: {kept}. "
            "Stop ends it with its state saved."
        )

    title = f"Force {name} to stop?"
    return Action("Force stop", partial(jobs.force_stop, name), title, question)


@dataclass(frozen=True, slots=True, kw_only=True)
class Steering:
    """What can be done with a run on its own screen."""

    is_active: bool = False
    """Whether its trainer takes requests, as far as can be told."""
    can_continue: bool = False
    can_export: bool = False
    note: str = ""
    """What keeps an ended run in the queue."""

    @classmethod
    def of(cls, now: Snapshot, name: str) -> Steering:
        """That of the run called `name`, of which nothing may be known yet."""
        run, queued, note = now.run(name), now.queued(name), ""
        if run is not None and run.is_active:
            return cls(is_active=True, can_export=run.status is not None)
        if queued is not None and queued.entry.state == "failed":
            note = "Its trainer ended before the run began; the screen Runs shows what it said."
        elif queued is not None:
            note = f"In the queue: {queued.reason or 'is being started'}."
        waits = queued is not None and queued.entry.state != "failed"
        status = None if run is None else run.status
        return cls(
            can_continue=status is not None and not waits,
            can_export=status is not None and status.saved_step is not None,
            note=note,
        )


def _deletion(jobs: Jobs, name: str) -> str:
    run = jobs.now.run(name)
    folder = name if run is None else run.folder
    size = f" ({format_bytes(run.status.bytes)})" if run and run.status else ""
    return (
        f"The folder {folder}{size} is deleted, with its weights, samples and saved states. This "
        "can't be undone. Clips, captions and the model stay."
    )
