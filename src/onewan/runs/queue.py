"""The queue: runs that wait for their device, and those that were started from it, on disk.

The queue is in the folder of runs, in ``.queue/queue.json``, so that it survives its program. Each
change is one atomic write under a lock. A start writes first that it begins, and the trainer
carries the entry's id in its environment, so that a program that was killed in between finds out
whether there is a trainer (`Queue.settle`): no entry is lost, and none is started twice. Never
decides when something is started.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from onewan.config.load import load_run
from onewan.errors import OnewanError
from onewan.files import replacing
from onewan.locks import ProcessId, locked
from onewan.runs import processes
from onewan.runs.event_file import read_backwards, time_of
from onewan.runs.events import Started
from onewan.runs.layout import RunLayout
from onewan.runs.status import is_run, read_state

OUTPUT_BYTES = 1 << 16
"""Of what a trainer has printed, so many bytes from the end are read."""

_CLOCK_SECONDS = 2.0
"""Accuracy of the times in files and events, with which the time of a start is compared."""

EntryState = Literal["waiting", "starting", "started", "failed"]
"""starting: the program that starts the trainer has not written down yet that it exists. failed:
the trainer ended before its run began, and its output says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A run that is to be trained, or is being trained since it was its turn."""

    id: str
    run: str
    """Name of the run's folder, which need not exist yet."""
    arguments: tuple[str, ...]
    """What ``onewan train`` is called with."""
    device: str
    """The setting `model.device` of the run."""
    state: EntryState = "waiting"
    first: bool = False
    """Whether it is started although its queue is paused."""
    returns: bool = False
    """Whether it waits again, to be continued, when its trainer has ended."""
    begun: float = 0.0
    """When the trainer was started, in seconds since 1970."""
    process: ProcessId | None = None


@dataclass(frozen=True, slots=True)
class _Content:
    entries: tuple[Entry, ...] = ()
    paused: tuple[str, ...] = ()
    """Devices."""


class Queue:
    """The queue of the folder of runs `runs`. Thread-safe; several programs may use one queue."""

    def __init__(self, runs: Path) -> None:
        self._runs = runs
        self._folder = runs / ".queue"
        self._file = self._folder / "queue.json"
        self._threads = threading.RLock()

    # --------------------------------------------------------------------------------- reading

    def entries(self) -> tuple[Entry, ...]:
        """All entries in their order; those of one device are started in this order."""
        return self._read().entries

    def entry(self, key: str) -> Entry:
        """The entry with the id `key`; OnewanError if it is no longer in the queue."""
        return _entry(self._read(), key)

    def paused(self) -> tuple[str, ...]:
        """The devices on which nothing is started, except what `start_first` was called for."""
        return self._read().paused

    def output_of(self, entry: Entry) -> str:
        """The end of what the entry's trainer has printed; empty if it was not started yet."""
        try:
            with self._output(entry).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - OUTPUT_BYTES))
                return file.read().decode("utf-8", errors="replace")
        except FileNotFoundError:
            return ""

    # -------------------------------------------------------------------------------- changing

    def add(self, run: Path, options: Sequence[str] = (), overrides: Sequence[str] = ()) -> Entry:
        """Append `run`: a run file, or with an option such as ``--resume`` a run's folder.

        ConfigError if its settings, with `overrides`, are wrong; OnewanError if its folder would
        not be in the folder of runs, or it is in the queue already.
        """
        config = load_run(run, overrides)
        folder = config.output.dir.resolve()
        if folder != self._runs.resolve():
            raise OnewanError(
                f"{run}: output.dir: is {folder}, and only runs in {self._runs} are shown here; "
                f"set it to {self._runs.resolve()}"
            )
        entry = Entry(
            id=secrets.token_hex(8),
            run=str(config.output.name),
            arguments=(*options, str(Path(os.path.abspath(run))), *overrides),
            device=config.model.device,
        )
        with self._changing() as write:
            content = self._read()
            same = [e for e in content.entries if e.run == entry.run and e.state != "failed"]
            if same:
                raise OnewanError(f"{entry.run}: is in the queue already; remove it there first")
            # A new try takes the place of one that failed.
            others = tuple(self._discarded(content.entries, lambda e: e.run == entry.run))
            write(replace(content, entries=(*others, entry)))
        return entry

    def move(self, key: str, places: int) -> None:
        """Move a waiting entry by `places` towards the end of its device's queue, or towards the
        front if negative."""

        def moved(content: _Content, entry: Entry) -> tuple[Entry, ...]:
            own = [e for e in content.entries if _waits_with(entry, e)]
            if entry not in own:
                raise OnewanError(f"{entry.run}: does not wait any more, so it can't be moved")
            place = own.index(entry)
            own.insert(max(0, place + places), own.pop(place))
            ordered = iter(own)
            return tuple(next(ordered) if _waits_with(entry, e) else e for e in content.entries)

        self._change(key, moved)

    def start_first(self, key: str) -> None:
        """Let a waiting or failed entry be the next that is started on its device, also if its
        queue is paused."""

        def first(content: _Content, entry: Entry) -> tuple[Entry, ...]:
            _check_not_started(entry)
            others = [e for e in content.entries if e.id != key]
            return (replace(entry, state="waiting", first=True), *others)

        self._change(key, first)

    def return_to_queue(self, key: str) -> None:
        """Let an entry wait again at the end: at once if it failed, or when its trainer has ended
        if it was started; it is then continued from its last saved state.

        The trainer is not asked to stop.
        """

        def back(content: _Content, entry: Entry) -> tuple[Entry, ...]:
            others = tuple(e for e in content.entries if e.id != key)
            if entry.state in ("waiting", "failed"):
                return (*others, replace(entry, state="waiting"))
            return (*others, replace(entry, returns=True))

        self._change(key, back)

    def remove(self, key: str) -> None:
        """Remove an entry that waits or has failed; its run is not deleted."""

        def without(content: _Content, entry: Entry) -> tuple[Entry, ...]:
            _check_not_started(entry)
            return tuple(self._discarded(content.entries, lambda e: e.id == key))

        self._change(key, without)

    def pause(self, device: str, paused: bool) -> None:
        """Start nothing on `device` any more, or go on; what is trained is not stopped."""
        with self._changing() as write:
            content = self._read()
            others = tuple(name for name in content.paused if name != device)
            write(replace(content, paused=(*others, device) if paused else others))

    def start(self, key: str) -> Entry:
        """Start the trainer of a waiting entry, which outlives this process.

        OnewanError if the entry does not wait, such as when another program has started it; OSError
        if no process can be started, and the entry waits again.
        """
        with self._changing() as write:
            content = self._read()
            entry = _entry(content, key)
            if entry.state != "waiting":
                raise OnewanError(f"{entry.run}: does not wait any more, so it was not started")
            self._output(entry).unlink(missing_ok=True)
            beginning = replace(entry, state="starting", first=False, begun=time.time())
            write(_with(content, beginning))
            try:
                process = processes.start(entry.arguments, self._output(entry), entry.id)
            except OSError:
                write(_with(content, entry))
                raise
            started = replace(beginning, state="started", process=process)
            write(_with(content, started))
        return started

    def settle(self) -> None:
        """Bring the entries up to date with their trainers: those that have ended leave the queue,
        wait again, or have failed; those whose start was interrupted are found or wait again."""
        if not any(entry.state in ("starting", "started") for entry in self.entries()):
            return
        with self._changing() as write:
            content = self._read()
            settled = [self._settled(entry) for entry in content.entries]
            entries = tuple(entry for entry in settled if entry is not None)
            if entries != content.entries:
                write(replace(content, entries=entries))

    # ------------------------------------------------------------------------------- internals

    def _settled(self, entry: Entry) -> Entry | None:
        """The entry as it is now; None if it has left the queue."""
        if entry.state in ("waiting", "failed"):
            return entry
        if entry.state == "starting":
            # Its starter was killed, or its lock would be held. Of what it started, the trainer is
            # the process that is nobody else's child.
            if found := processes.marked(entry.id):
                own = min(found, key=lambda process: process.create_time())
                return replace(entry, state="started", process=ProcessId.of(own.pid))
            if not self.output_of(entry) and not self._has_begun(entry):
                return replace(entry, state="waiting")
        # None, that it can't be told, is of an entry of another host, whose program settles it.
        elif entry.process is None or entry.process.is_alive is not False:
            return entry
        return self._ended(entry)

    def _ended(self, entry: Entry) -> Entry | None:
        layout = RunLayout(self._runs / entry.run)
        if not self._has_begun(entry):
            return replace(entry, state="failed", process=None)
        if entry.returns and read_state(layout)[0] != "finished":
            again = ("--resume=auto", str(layout.root.resolve()))
            return replace(entry, state="waiting", returns=False, process=None, arguments=again)
        self._keep_output(entry, layout)
        return None

    def _has_begun(self, entry: Entry) -> bool:
        """Whether the entry's trainer came so far that its run tells the rest."""
        layout = RunLayout(self._runs / entry.run)
        if not is_run(layout.root):
            return False
        part = f'"event": "{Started.kind}"'
        newest = next((event for _, event in read_backwards(layout.events, part)), None)
        begun = None if newest is None else time_of(newest)
        return begun is not None and begun.timestamp() >= entry.begun - _CLOCK_SECONDS

    def _keep_output(self, entry: Entry, layout: RunLayout) -> None:
        """Move what the trainer printed into the folder of its run."""
        if self._output(entry).exists():
            os.replace(self._output(entry), layout.output)

    def _output(self, entry: Entry) -> Path:
        return self._folder / f"{entry.id}.txt"

    def _discarded(
        self, entries: Sequence[Entry], is_discarded: Callable[[Entry], bool]
    ) -> Iterator[Entry]:
        """The other entries; what was printed by the discarded ones is deleted."""
        for entry in entries:
            if is_discarded(entry):
                self._output(entry).unlink(missing_ok=True)
            else:
                yield entry

    def _change(self, key: str, changed: Callable[[_Content, Entry], tuple[Entry, ...]]) -> None:
        with self._changing() as write:
            content = self._read()
            write(replace(content, entries=changed(content, _entry(content, key))))

    @contextmanager
    def _changing(self) -> Generator[Callable[[_Content], None]]:
        """Gives what writes the queue, for a block in which nobody else changes it."""
        lock, remedy = self._folder / ".lock", "try again"
        with self._threads, locked(lock, self._file, remedy):
            yield self._write

    def _read(self) -> _Content:
        try:
            data = json.loads(self._file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return _Content()
        except ValueError:
            raise OnewanError(self._damaged()) from None
        try:
            return _Content(tuple(map(_from_data, data["entries"])), tuple(data["paused"]))
        except (KeyError, TypeError, AttributeError):
            raise OnewanError(self._damaged()) from None

    def _damaged(self) -> str:
        return f"{self._file}: is no queue that this version can read; move it away to start anew"

    def _write(self, content: _Content) -> None:
        data = {"entries": [asdict(e) for e in content.entries], "paused": list(content.paused)}
        with replacing(self._file) as temporary:
            temporary.write_text(json.dumps(data, indent=1), encoding="utf-8")


def _from_data(data: dict[str, Any]) -> Entry:
    process = data.pop("process")
    arguments = tuple(data.pop("arguments"))
    return Entry(
        **data, arguments=arguments, process=None if process is None else ProcessId(**process)
    )


def _entry(content: _Content, key: str) -> Entry:
    for entry in content.entries:
        if entry.id == key:
            return entry
    raise OnewanError("this run is no longer in the queue; look at the list of runs")


def _with(content: _Content, changed: Entry) -> _Content:
    entries = tuple(changed if entry.id == changed.id else entry for entry in content.entries)
    return replace(content, entries=entries)


def _waits_with(entry: Entry, other: Entry) -> bool:
    return other.state == "waiting" and other.device == entry.device


def _check_not_started(entry: Entry) -> None:
    if entry.state in ("starting", "started"):
        raise OnewanError(f"{entry.run}: is being trained; stop it first")
