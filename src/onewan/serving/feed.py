"""`Feeds`: what the page shows of runs, read and computed once for all who look at them.

A feed reads its run's folder only while somebody looks. Its answers are bytes that are made again
when something has changed, so that many viewers cost hardly more than one.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import json
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onewan.errors import OnewanError, one_line
from onewan.pages.plots import Plot
from onewan.report.curves import run_plots
from onewan.report.history import History, HistoryReader
from onewan.report.record import RunFiles, RunRecord, SampleVideo, found_samples, record_of
from onewan.runs.event_lines import EventLines
from onewan.runs.events import Exported, ProgressEvent, event_of
from onewan.runs.layout import RunLayout
from onewan.runs.machine import Readings, gauges_of
from onewan.serving.roots import Roots
from onewan.serving.run_texts import samples_data, summary_data

_FRESH_SECONDS = 1.0
"""A run's folder is looked at once in this time, however many ask."""
_REDRAWN_SECONDS = 20.0
"""The curves of a run that goes on are at most so old."""
_REDRAWN_PARTS = 800
"""They are made again after a step, but of long runs only after their steps divided by this."""
_LOADING_SECONDS = 0.3
"""In which a browser loads the scripts, which it would wait for if events were read meanwhile."""
_MOST_FEEDS = 12
_MOST_PARTS = 16
"""Zoomed parts of a run's curves that are kept."""
_MOST_LINES = 3000
"""Of the events that are shown."""
_LOG_BYTES = 1 << 16
_UNSHOWN = frozenset({"heartbeat", "sampled", "validation"})
"""Kinds without lines, or with lines that the page shows elsewhere; a long run has thousands."""


@dataclass(frozen=True, slots=True)
class Answer:
    """JSON, compressed, with a tag that changes with it."""

    body: bytes
    tag: str

    @classmethod
    def of(cls, content: object) -> Answer:
        text = json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")
        tag = hashlib.blake2b(text, digest_size=9).hexdigest()
        return cls(gzip.compress(text, 4, mtime=0), tag)


class Feed:
    """What is known of one run. Its methods read files: call them in a thread, one at a time."""

    def __init__(self, layout: RunLayout, address: Callable[[Path], str]) -> None:
        """`address` gives the address of a file of the run."""
        self._layout = layout
        self._address = address
        self._reader = HistoryReader(layout.events, self._listen)
        self._lines = EventLines()
        self._events: deque[dict[str, Any]] = deque(maxlen=_MOST_LINES)
        self._told = 0
        self._exporting = False
        """Whether the lines about exported files wait until all of a step are known."""
        self._files: tuple[object, RunFiles] | None = None
        self._samples: tuple[object, Sequence[SampleVideo]] | None = None
        self._record: RunRecord | None = None
        self._summary: tuple[object, dict[str, Any]] | None = None
        self._grid: tuple[object, Answer] | None = None
        self._plots: Answer | None = None
        self._plots_of: tuple[Any, ...] = ()
        self._plots_at = -_REDRAWN_SECONDS
        self._parts: OrderedDict[tuple[Any, ...], Answer] = OrderedDict()

    def refresh(self) -> None:
        """Take in what has changed in the folder. OSError if it can't be read."""
        before = self._reader.history
        self._reader.update()
        history = self._reader.history
        self._tell_exports(history.last_event)
        if history is not before:  # another run is in the folder
            self._plots_at = -_REDRAWN_SECONDS
        record = self._record = record_of(
            self._layout, self._read_files(), history, self._read_samples(history)
        )
        versions = {
            "plots": self._make_plots(record),
            "samples": self._make_grid(record),
            "events": self._told,
            "log": _size(self._layout.log),
        }
        key = (history.last_event, history.damaged_count, record.state, record.reason, versions)
        if self._summary is None or self._summary[0] != key:
            self._summary = key, summary_data(record, versions)

    def summary(self) -> dict[str, Any]:
        """How the run stands, its results, and the versions of the other answers; the same object
        as long as nothing has changed."""
        assert self._summary is not None, "refresh comes first"
        return self._summary[1]

    def samples(self) -> Answer:
        """All sample videos."""
        assert self._grid is not None, "refresh comes first"
        return self._grid[1]

    def plots(self) -> Answer:
        """All plots."""
        assert self._plots is not None, "refresh comes first"
        return self._plots

    def part(self, first: float, last: float) -> Answer:
        """The curves from one step to another, with as many points as those of the whole run."""
        assert self._record is not None, "refresh comes first"
        key = (*self._plots_of, first, last)
        if key not in self._parts:
            self._parts[key] = _drawn(run_plots(self._record.history, (first, last)))
            while len(self._parts) > _MOST_PARTS:
                self._parts.popitem(last=False)
        return self._parts[key]

    def events(self, after: int) -> dict[str, Any]:
        """The lines about events after the first `after`, of which the oldest may be gone."""
        first = self._told - len(self._events)
        # More than there were: of the run that was in the folder before.
        start = 0 if after > self._told else max(0, after - first)
        return {"next": self._told, "new": after > self._told, "lines": [*self._events][start:]}

    def log(self, after: int) -> dict[str, Any]:
        """The lines of the log after its first `after` bytes; of many the last ones."""
        try:
            with self._layout.log.open("rb") as file:
                size = file.seek(0, 2)
                is_new = after > size
                start = max(0 if is_new else after, size - _LOG_BYTES)
                file.seek(start)
                data = file.read(size - start)
        except FileNotFoundError:
            return {"next": 0, "new": after > 0, "lines": []}
        if start > after or is_new:
            # What comes before the first line break is the end of a line.
            cut = data.find(b"\n") + 1 if start else 0
            data, start = data[cut:], start + cut
        data, newline, _ = data.rpartition(b"\n")
        lines = data.decode("utf-8", "replace").split("\n") if newline else []
        return {
            "next": start + len(data) + len(newline),
            "new": is_new,
            "lines": [one_line(line) for line in lines],
        }

    # -------------------------------------------------------------------------- what is read

    def _read_files(self) -> RunFiles:
        layout = self._layout
        key = tuple(_stamp(path) for path in (layout.resolved, layout.run_file, layout.clips))
        if self._files is None or self._files[0] != key:
            self._files = key, RunFiles.read(layout)
        return self._files[1]

    def _read_samples(self, history: History) -> Sequence[SampleVideo]:
        newest = next(reversed(history.samples), None)
        key = (id(history), len(history.samples), newest, _stamp(self._layout.samples_dir))
        if self._samples is None or self._samples[0] != key:
            files = self._read_files()
            self._samples = key, found_samples(self._layout, history, files.settings)
        return self._samples[1]

    def _listen(self, event: Mapping[str, Any]) -> None:
        """Keep the lines about an event that a person reads."""
        kind = event.get("event")
        if kind != Exported.kind:
            self._tell_exports(event)
        if kind in _UNSHOWN:
            return
        made = event_of(event)
        if made is None or isinstance(made, ProgressEvent):
            return
        try:
            self._keep(event, made.kind, self._lines.of(made))
        except (TypeError, ValueError, AttributeError, KeyError):
            return  # a damaged field
        self._exporting = kind == Exported.kind

    def _tell_exports(self, event: Mapping[str, Any]) -> None:
        """Keep the line about the files of a step, which are all known with `event`."""
        if self._exporting:
            self._exporting = False
            self._keep(event, Exported.kind, self._lines.rest())

    def _keep(self, event: Mapping[str, Any], kind: str, lines: Sequence[str]) -> None:
        for line in lines:
            self._told += 1
            self._events.append({"time": event.get("time"), "kind": kind, "text": one_line(line)})

    # -------------------------------------------------------------------------- what is made

    def _make_plots(self, record: RunRecord) -> str:
        history = record.history
        done, now = history.steps.last, time.monotonic()
        key = (done, len(history.validations), history.steps.replaced, record.state)
        if key != self._plots_of:
            few = max(1, done // _REDRAWN_PARTS)
            same = len(self._plots_of) == len(key) and key[1:] == self._plots_of[1:]
            is_due = not same or done - self._plots_of[0] >= few
            if is_due or now - self._plots_at >= _REDRAWN_SECONDS:
                self._plots_of, self._plots_at = key, now
                self._parts.clear()
                self._plots = _drawn(run_plots(history))
        return self.plots().tag

    def _make_grid(self, record: RunRecord) -> str:
        if self._grid is None or self._grid[0] is not record.samples:
            self._grid = record.samples, Answer.of(samples_data(record, self._address))
        return self._grid[1].tag


def _drawn(parts: Mapping[str, Sequence[Plot]]) -> Answer:
    """Plots by the parts of the screen and by their names."""
    return Answer.of(
        {name: {plot.name: plot.as_figure() for plot in plots} for name, plots in parts.items()}
    )


def _size(path: Path) -> int:
    stamp = _stamp(path)
    return 0 if stamp is None else stamp[1]


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


class Feeds:
    """The feeds of the runs that are looked at, by the names of the runs."""

    def __init__(self, roots: Roots, machine: Callable[[], Readings] = Readings) -> None:
        self._roots = roots
        self._machine = machine
        self._feeds: OrderedDict[str, _Shared] = OrderedDict()

    async def ask(self, name: str, question: Callable[[Feed], Any]) -> Any:
        """What `question` gives for the feed of a run, which is up to date.

        OutsideError if there is no such run, OSError if it can't be read.
        """
        folder = await asyncio.to_thread(self._folder, name)
        shared = self._feeds.get(name)
        if shared is None:
            feed = Feed(RunLayout(folder), self._roots.address)
            shared = self._feeds[name] = _Shared(feed)
        self._feeds.move_to_end(name)
        while len(self._feeds) > _MOST_FEEDS:
            self._feeds.popitem(last=False)
        async with shared.lock:
            if time.monotonic() - shared.read_at >= _FRESH_SECONDS:
                await asyncio.to_thread(shared.feed.refresh)
                shared.read_at = time.monotonic()
            return await asyncio.to_thread(question, shared.feed)

    async def read_ahead(self, name: str) -> None:
        """Read a long run while a browser runs the scripts that will ask for it."""
        await asyncio.sleep(_LOADING_SECONDS)
        # The script asks for the same, and tells the user what is wrong.
        with contextlib.suppress(OnewanError, OSError):
            await self.ask(name, Feed.summary)

    async def summary(self, name: str) -> Answer:
        """`Feed.summary` with how busy the machine is; as `ask`."""
        found, now = await self.ask(name, Feed.summary), self._machine()
        shared = self._feeds.get(name)
        if shared is None or shared.summary is None or shared.summary[:2] != (id(found), now):
            answer = Answer.of({**found, "machine": list(gauges_of(now))})
            if shared is None:
                return answer
            shared.summary = id(found), now, answer, found
        return shared.summary[2]

    def _folder(self, name: str) -> Path:
        try:
            return self._roots.run(name)
        except Exception:
            self._feeds.pop(name, None)  # of a run that was deleted
            raise


class _Shared:
    def __init__(self, feed: Feed) -> None:
        self.feed = feed
        self.lock = asyncio.Lock()
        self.read_at = float("-inf")
        self.summary: tuple[int, Readings, Answer, object] | None = None
