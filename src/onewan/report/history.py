"""What happened in a run, from its events, as it stands after its restarts: `read_history`, and
`HistoryReader` for a run that goes on.

What a later process computed again replaces what an earlier one did. Damaged lines, events without
their fields and unknown ones are left out; the former two are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from onewan.report.steps import StepTable
from onewan.runs.event_file import EventTail, time_of
from onewan.runs.events import ENDS
from onewan.runs.status import RunState

_MOST_MESSAGES = 500
"""Different warnings and notes that are kept."""


@dataclass(kw_only=True)
class Process:
    """One process that trained the run."""

    begin: datetime | None
    host: str
    pid: int
    end: datetime | None = None
    """Time of its last event."""
    first_step: int = 0
    """The steps that it began after; of a resumed run those of the state."""
    last_step: int = 0
    how: RunState = "running"
    """Until its last event says how it ended; see `onewan.runs.status`."""
    error: str = ""

    @property
    def seconds(self) -> float:
        """From its first to its last event."""
        if self.begin is None or self.end is None:
            return 0.0
        return max(0.0, (self.end - self.begin).total_seconds())


@dataclass(frozen=True, kw_only=True)
class Message:
    """A warning or a note, and how often it came."""

    text: str
    count: int = 1


@dataclass(kw_only=True)
class History:
    """What is known of a run from its events."""

    steps: StepTable = field(default_factory=StepTable)
    processes: list[Process] = field(default_factory=list[Process])
    latest: dict[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    """The newest event of each of the kinds "started", "step", "data", "overview", "plan",
    "memory", "attention" and "environment"."""
    last_event: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The newest event of all; empty if there is none."""
    validations: dict[tuple[int, str], Mapping[str, Any]] = field(
        default_factory=dict[tuple[int, str], Mapping[str, Any]]
    )
    """By step and expert, ascending."""
    samples: dict[tuple[int, str], Mapping[str, Any]] = field(
        default_factory=dict[tuple[int, str], Mapping[str, Any]]
    )
    """By step and name of the file."""
    changes: dict[tuple[int, str], Mapping[str, Any]] = field(
        default_factory=dict[tuple[int, str], Mapping[str, Any]]
    )
    """Settings that changed, by step and name of the field."""
    exports: dict[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    """By name of the file."""
    saved: list[int] = field(default_factory=list[int])
    """Steps of saved states."""
    best: dict[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    """The "best_weights" events of the end, by name of the file."""
    warnings: dict[str, Message] = field(default_factory=dict[str, Message])
    notes: dict[str, Message] = field(default_factory=dict[str, Message])
    damaged: list[int] = field(default_factory=list[int])
    """The first few numbers of lines that are no events, or lack their fields."""
    damaged_count: int = 0
    planned_steps: int = 0
    """Step at which the run ends; 0 if it is not known."""

    @property
    def error(self) -> str:
        """Why the run failed; empty if its last process did not."""
        return self.processes[-1].error if self.processes else ""

    @property
    def seconds(self) -> float:
        """Time of all its processes."""
        return sum(process.seconds for process in self.processes)

    @property
    def experts(self) -> list[str]:
        """Names of the experts that were trained or validated; "high" before "low"."""
        seen = [*self.steps.experts, *(expert for _, expert in self.validations)]
        return sorted(dict.fromkeys(seen))


def read_history(path: Path) -> History:
    """The history in the event file `path`; empty if there is none."""
    reader = HistoryReader(path)
    reader.update()
    return reader.history


class HistoryReader:
    """Keeps a history up to date with an event file that may still grow, or be replaced."""

    def __init__(
        self, path: Path, listen: Callable[[Mapping[str, Any]], None] = lambda _event: None
    ) -> None:
        """`listen` is called with each event but those of steps, of which there are many."""
        self.history = History()
        self._listen = listen
        self._tail = EventTail(path, self._damaged, self._restart)
        self._takers: dict[str, Callable[[Mapping[str, Any]], bool]] = {
            "started": self._started,
            "resumed": self._resumed,
            "validation": self._validation,
            "sampled": self._sampled,
            "exported": self._exported,
            "settings": lambda event: self._keep(self.history.changes, event, "name"),
            "rejected": self._rejected,
            "saved": self._saved,
            "best_weights": self._best_weights,
            "warning": lambda event: self._message(self.history.warnings, event),
            "note": lambda event: self._message(self.history.notes, event),
            "data": self._data,
            **dict.fromkeys(
                ("overview", "plan", "memory", "attention", "environment"), self._newest
            ),
            **dict.fromkeys(ENDS, self._ended),
        }

    def update(self) -> bool:
        """Take in what was written since the last call; returns whether the history has changed.
        OSError if the file can't be read."""
        before, lines = self.history, self.history.damaged_count
        newest = before.last_event
        for event in self._tail.read():
            self._take(event)
        history = self.history
        self._set_end(history)
        if [*history.validations] != sorted(history.validations):
            history.validations = dict(sorted(history.validations.items()))
        return (
            history is not before
            or history.last_event is not newest
            or history.damaged_count != lines
        )

    def _restart(self) -> None:
        self.history = History()

    def _damaged(self, line: int) -> None:
        self.history.damaged_count += 1
        if len(self.history.damaged) < 10:
            self.history.damaged.append(line)

    def _take(self, event: Mapping[str, Any]) -> None:
        history, kind = self.history, event.get("event")
        if kind == "step":
            history.last_event = event
            if not self._step(event):
                history.damaged_count += 1
            return
        if kind == "started":
            self._set_end(history)
        history.last_event = event
        taker = self._takers.get(kind) if isinstance(kind, str) else None
        if taker is not None and not taker(event):
            history.damaged_count += 1
        self._listen(event)

    @staticmethod
    def _set_end(history: History) -> None:
        """Note when the newest process wrote its last event."""
        if history.processes:
            process = history.processes[-1]
            process.end = time_of(history.last_event) or process.end

    def _started(self, event: Mapping[str, Any]) -> bool:
        steps = event.get("steps")
        if isinstance(steps, int):
            self.history.planned_steps = steps
        time = time_of(event)
        # The one before has not said how it ended.
        for process in self.history.processes[-1:]:
            if process.how == "running":
                process.how = "killed"
        self.history.processes.append(
            Process(
                begin=time,
                end=time,
                host=str(event.get("hostname", "")),
                pid=event["pid"] if isinstance(event.get("pid"), int) else 0,
            )
        )
        return self._newest(event)

    def _resumed(self, event: Mapping[str, Any]) -> bool:
        step = event.get("step")
        if not isinstance(step, int):
            return False
        self._drop_after(step)
        if self.history.processes:
            process = self.history.processes[-1]
            process.first_step = process.last_step = step
        return True

    def _drop_after(self, step: int) -> None:
        """Discard what an earlier process did after `step`, since the run resumes from there."""
        history = self.history
        history.steps.drop_after(step)
        history.validations = {k: v for k, v in history.validations.items() if k[0] <= step}
        history.samples = {k: v for k, v in history.samples.items() if k[0] <= step}
        # A change at this step stays: it was made after it, and is recorded in the run.
        history.changes = {k: v for k, v in history.changes.items() if k[0] <= step}
        history.exports = {k: v for k, v in history.exports.items() if v["step"] <= step}
        history.saved = [saved for saved in history.saved if saved <= step]
        history.best.clear()

    def _step(self, event: Mapping[str, Any]) -> bool:
        history, step = self.history, event.get("step")
        if isinstance(step, int) and 0 < step <= history.steps.last:
            self._drop_after(step - 1)
        if not history.steps.add(event):
            return False
        history.latest["step"] = event
        if history.processes:
            history.processes[-1].last_step = history.steps.last
        return True

    def _validation(self, event: Mapping[str, Any]) -> bool:
        return self._keep(self.history.validations, event, "expert")

    def _sampled(self, event: Mapping[str, Any]) -> bool:
        name = file_name(event.get("file"))
        return self._keep(self.history.samples, {**event, "name": name}, "name")

    @staticmethod
    def _keep(
        kept: dict[tuple[int, str], Mapping[str, Any]], event: Mapping[str, Any], name: str
    ) -> bool:
        step, value = event.get("step"), event.get(name)
        if not isinstance(step, int) or not isinstance(value, str) or not value:
            return False
        kept[step, value] = event
        return True

    def _exported(self, event: Mapping[str, Any]) -> bool:
        name = file_name(event.get("file"))
        if not name or not isinstance(event.get("step"), int):
            return False
        self.history.exports[name] = event
        return True

    def _saved(self, event: Mapping[str, Any]) -> bool:
        step = event.get("step")
        if not isinstance(step, int):
            return False
        self.history.saved.append(step)
        return True

    def _best_weights(self, event: Mapping[str, Any]) -> bool:
        name = file_name(event.get("file"))
        if not name or not isinstance(event.get("step"), int):
            return False
        self.history.best[name] = event
        return True

    def _message(self, kept: dict[str, Message], event: Mapping[str, Any]) -> bool:
        words = event.get("text")
        if not isinstance(words, str):
            return False
        if words in kept:
            kept[words] = Message(text=words, count=kept[words].count + 1)
        elif len(kept) < _MOST_MESSAGES:
            kept[words] = Message(text=words)
        return True

    def _rejected(self, event: Mapping[str, Any]) -> bool:
        what, reason = event.get("request"), event.get("reason")
        text = f"a request ({what}) was not followed: {reason}" if reason else None
        return self._message(self.history.warnings, {"text": text})

    def _data(self, event: Mapping[str, Any]) -> bool:
        if isinstance(event.get("steps"), int):
            self.history.planned_steps = event["steps"]
        return self._newest(event)

    def _newest(self, event: Mapping[str, Any]) -> bool:
        self.history.latest[event["event"]] = event
        return True

    def _ended(self, event: Mapping[str, Any]) -> bool:
        if self.history.processes:
            process = self.history.processes[-1]
            process.how = event["event"]
            process.error = str(event.get("error", ""))
        return True


def file_name(path: object) -> str:
    """The name of a file, of a path of any system; empty for what is no path."""
    return path.replace("\\", "/").rpartition("/")[2] if isinstance(path, str) else ""
