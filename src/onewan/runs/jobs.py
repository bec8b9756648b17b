"""`Jobs`: all runs of a folder and its queue; starts what waits as soon as its device is free.

What a program that watches the folder calls again and again is `Jobs.turn`. Runs that were started
from a terminal count too: the device that they use is not free.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from onewan.errors import OnewanError, one_line
from onewan.files import remove_abandoned
from onewan.runs.control import request
from onewan.runs.deletion import delete_run
from onewan.runs.layout import RunLayout
from onewan.runs.processes import force_stop, force_stop_run, trainer_of
from onewan.runs.queue import Entry, Queue
from onewan.runs.statuses import KnownRun, Statuses

_TRY_AGAIN_SECONDS = 15.0
"""After which a start is tried again for which the system could not make a process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedRun:
    """An entry of the queue, and what there is to say about it."""

    entry: Entry
    device: str
    """`entry.device`, one name for each device."""
    reason: str = ""
    """Why it is not started yet."""
    output: str = ""
    """What its trainer printed, if it failed before its run began."""

    @property
    def text(self) -> str:
        """Where it stands, for people."""
        texts = {
            "waiting": self.reason,
            "starting": "is being started",
            "started": "is being trained",
            "failed": "ended before it began",
        }
        returns = "; waits again when it has stopped" if self.entry.returns else ""
        return texts[self.entry.state] + returns


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What `Jobs` knew after a turn."""

    runs: tuple[KnownRun, ...] = ()
    complete: bool = False
    """Whether all runs have been read."""
    queue: tuple[QueuedRun, ...] = ()
    paused: tuple[str, ...] = ()
    """Devices whose queue is paused."""
    problem: str = ""
    """Why runs or queue can't be read or written at present."""

    def run(self, name: str) -> KnownRun | None:
        """The run called `name`; None if there is none."""
        return next((run for run in self.runs if run.name == name), None)

    def queued(self, name: str) -> QueuedRun | None:
        """The place of the run called `name` in the queue; None if it has none."""
        return next((each for each in self.queue if each.entry.run == name), None)


@dataclass(frozen=True, slots=True)
class _Use:
    device: str
    is_waiting: bool = False
    """Whether the run is only the next one on the device."""

    @property
    def words(self) -> str:
        return "is before it" if self.is_waiting else f"uses the device {self.device}"


def device_name(setting: str, accelerators: int) -> str:
    """One name for each device that `model.device` can name: "cuda" is the first of them, and so is
    "auto" where NVIDIA's driver names `accelerators`; elsewhere only PyTorch knows what that is."""
    if setting == "auto":
        setting = os.environ.get("ONEWAN_DEVICE", "auto")
    if setting == "auto" and accelerators:
        return "cuda:0"
    return setting if ":" in setting or setting in ("auto", "cpu", "mps") else f"{setting}:0"


class Jobs:
    """The runs and the queue of the folder `runs`. `turn` is called by one thread at a time, the
    other methods by any."""

    def __init__(self, runs: Path, accelerators: Callable[[], int] = lambda: 0) -> None:
        """`accelerators` says how many devices NVIDIA's driver names."""
        self._runs = runs
        self._accelerators = accelerators
        self._statuses = Statuses(runs)
        self._not_before: dict[str, float] = {}
        """When entries that could not be started are tried again."""
        self.queue = Queue(runs)
        self.now = Snapshot()
        """Replaced as a whole, so that any thread may read it."""
        remove_abandoned(runs)  # folders whose deletion was interrupted

    def turn(self) -> Snapshot:
        """Look at runs and queue, and start what can be started."""
        try:
            self._statuses.refresh()
            self.queue.settle()
            entries, paused = self.queue.entries(), self.queue.paused()
            queue = tuple(self._looked_at(entries, {self._device(name) for name in paused}))
        except (OSError, OnewanError) as error:
            queue, paused, problem = self.now.queue, self.now.paused, one_line(str(error))
        else:
            problem = ""
        self.now = Snapshot(
            runs=self._statuses.runs,
            complete=self._statuses.complete,
            queue=queue,
            paused=tuple(sorted({self._device(name) for name in paused})),
            problem=problem,
        )
        return self.now

    def pause(self, device: str, paused: bool) -> None:
        """As `Queue.pause`, for a device by the name that a `Snapshot` has."""
        same = [name for name in self.queue.paused() if self._device(name) == device]
        for name in same if not paused else []:
            self.queue.pause(name, False)
        self.queue.pause(device, paused)

    def stop(self, name: str) -> str:
        """Let the run's trainer save its state and end; returns what happens, for the user.

        OnewanError if it is not trained.
        """
        layout = RunLayout(self._runs / name)
        trainer = trainer_of(layout)
        if trainer is not None and trainer.is_alive is not False:
            request(layout, "stop")
            return f"{name}: stops after the current step, with its state saved"
        for entry in self.queue.entries():
            if entry.run == name and entry.process is not None and entry.process.is_alive:
                force_stop(entry.process)
                return f"{name}: was stopped before it had begun"
        raise OnewanError(f"{name}: is not being trained")

    def force_stop(self, name: str) -> None:
        """End the run's trainer at once, without saving; see `processes.force_stop_run`."""
        for entry in self.queue.entries():
            if entry.run == name and entry.process is not None and entry.process.is_alive:
                force_stop(entry.process)  # which may not have come so far as to lock its run
                return
        force_stop_run(RunLayout(self._runs / name))

    def give_back(self, name: str) -> str:
        """As `stop`, but the run waits at the end of its queue to be continued."""
        for entry in self.queue.entries():
            if entry.run == name and entry.state == "started":
                self.queue.return_to_queue(entry.id)
                break
        else:
            self.go_on(name)
        return f"{self.stop(name)}; then it waits in the queue"

    def go_on(self, name: str) -> None:
        """Add the run to the queue, to be continued from its newest saved state."""
        self.queue.add(self._runs / name, ["--resume=auto"])

    def delete(self, name: str) -> None:
        """Delete the run and its place in the queue. OnewanError if it is trained."""
        own = [entry for entry in self.queue.entries() if entry.run == name]
        if any(entry.state in ("starting", "started") for entry in own):
            raise OnewanError(f"{name}: is being trained; stop it first")
        delete_run(self._runs, name)
        for entry in own:
            self.queue.remove(entry.id)

    # ------------------------------------------------------------------------------- internals

    def _device(self, setting: str) -> str:
        return device_name(setting, self._accelerators())

    def _looked_at(self, entries: Sequence[Entry], paused: set[str]) -> Iterator[QueuedRun]:
        """The entries, after those that can be started were."""
        used = self._used(entries)
        for entry in entries:
            device, now, reason = self._device(entry.device), entry, ""
            if entry.state == "waiting":
                if device in paused and not entry.first:
                    reason = "this queue is paused"
                else:
                    reason = self._reason(entry, device, used) or self._try_to_start(entry)
                    used.setdefault(entry.run, _Use(device, is_waiting=bool(reason)))
                    now = entry if reason else self.queue.entry(entry.id)
            output = self.queue.output_of(entry) if entry.state == "failed" else ""
            yield QueuedRun(entry=now, device=device, reason=reason, output=output)

    def _used(self, entries: Sequence[Entry]) -> dict[str, _Use]:
        """The devices in use, by the runs that are trained on this machine."""
        used = {e.run: _Use(self._device(e.device)) for e in entries if e.state == "started"}
        for run in self._statuses.runs:
            if run.is_trained:
                setting = run.status and run.status.device
                used[run.name] = _Use(self._device(setting or "auto"))
        return used

    def _reason(self, entry: Entry, device: str, used: Mapping[str, _Use]) -> str:
        """Why the entry can't be started now; empty if it can."""
        if entry.run in used:
            return f"waits until {entry.run} has ended, to continue it"
        for run, use in used.items():
            # What "auto" stands for is not known on every machine.
            if use.device == device or "auto" in (use.device, device):
                return f"waits for {run}, which {use.words}"
        if not self._statuses.complete:
            return "waits until all runs have been looked at"
        if time.monotonic() < self._not_before.get(entry.id, 0.0):
            return "could not be started; this is tried again in a few seconds"
        return ""

    def _try_to_start(self, entry: Entry) -> str:
        """Start the entry; returns why that failed."""
        try:
            self.queue.start(entry.id)
        except OSError as error:
            self._not_before[entry.id] = time.monotonic() + _TRY_AGAIN_SECONDS
            return f"could not be started ({error}); this is tried again in a few seconds"
        return ""
