"""`RunLog`: delivers each event of a run to all sinks; and the run's ``log.txt``.

A sink is the event file, the lines of ``log.txt``, the TensorBoard curves, or a listener such as
the progress display. A run of hours must not end because one of them fails: a sink that raises is
reported once and dropped.
Only the event file is never dropped, since other programs follow the run through it: the failure
is reported at the other sinks and in ``log.txt``, writing is tried again with each event, and when
it works again the number of missing events is reported.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any, Protocol

from onewan.errors import one_line
from onewan.runs.event_file import EventFile
from onewan.runs.event_lines import EventLines
from onewan.runs.events import Event, Note, ProgressEvent, Warned

log = logging.getLogger(__name__)
_shown = logging.getLogger(f"{__name__}.shown")
"""For the lines of `TextSink`."""

Listener = Callable[[Event], None]

PROGRESS_SECONDS = 5.0
"""The event file has a progress event of one activity at most once in this many seconds."""


class Sink(Protocol):
    """One destination of a run's events."""

    label: str
    """Names the sink in warnings."""
    required: bool
    """Whether writing is tried again after a failure, instead of dropping the sink."""

    def write(self, event: Event, /) -> None:
        """Take in one event; an exception is a failure of the sink."""
        ...

    def close(self) -> None: ...


class RunLog:
    """Delivers events, in order, to the sinks that have not failed."""

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = list(sinks)
        self._missing: dict[Sink, int] = {}
        """Required sinks that fail at present, with the number of events that they missed."""
        self._warned: set[str] = set()

    def add(self, sink: Sink) -> None:
        """Also deliver later events to `sink`."""
        self._sinks.append(sink)

    def emit(self, event: Event) -> None:
        # Over a copy, since a sink that fails is removed from the list. Warned afterwards, so that
        # every sink has the event and its warnings in the same order.
        for warning in [self._deliver(event, sink) for sink in tuple(self._sinks)]:
            if warning is not None:
                self.warn(warning)

    def note(self, text: str) -> None:
        self.emit(Note(text=one_line(text)))

    def warn(self, text: str) -> None:
        self.emit(Warned(text=one_line(text)))

    def warn_once(self, text: str, *, prefix: str = "") -> None:
        """Warn with `prefix` and `text`, unless `text` was the subject of a warning before."""
        if text not in self._warned:
            self._warned.add(text)
            self.warn(prefix + text)

    def close(self) -> None:
        """Close all sinks; a failure is only logged, since there may be no sink left for it."""
        # Each is removed first, so that a second call after an error does not close it again.
        while self._sinks:
            _close(self._sinks.pop())

    def _deliver(self, event: Event, sink: Sink) -> str | None:
        """Write `event` to `sink`; returns a warning if the sink begins to fail or recovers."""
        try:
            sink.write(event)
        except Exception as error:  # noqa: BLE001  (whatever it is, training must continue)
            return self._failed(sink, str(error) or type(error).__name__)
        if not (missing := self._missing.pop(sink, 0)):
            return None
        events = "1 event is" if missing == 1 else f"{missing} events are"
        return f"{sink.label}: can be written again; {events} missing in it"

    def _failed(self, sink: Sink, reason: str) -> str | None:
        if sink in self._missing:
            self._missing[sink] += 1
            return None
        # Warned once per failure: a full disk would otherwise give a warning with every step.
        if sink.required:
            self._missing[sink] = 1
            return f"{sink.label}: can't be written ({reason}); tried again with each event"
        self._sinks.remove(sink)
        _close(sink)
        return f"{sink.label}: failed ({reason}); it is off for the rest of this run"


def _close(sink: Sink) -> None:
    try:
        sink.close()
    except Exception:  # what could not be written before can't be flushed now
        log.warning("closing %s failed", sink.label, exc_info=True)


class FileSink:
    """The event file, with only some of the frequent progress events."""

    required = True

    def __init__(self, file: EventFile, label: str = "events.jsonl") -> None:
        self.label = label
        self._file = file
        self._throttle = ProgressThrottle()

    def write(self, event: Event) -> None:
        if not isinstance(event, ProgressEvent) or self._throttle.lets_pass(event):
            self._file.write(event)

    def close(self) -> None:
        self._file.close()


class TextSink:
    """The lines that a terminal shows, for ``log.txt`` (`text_log`)."""

    label = "log.txt"
    required = False

    def __init__(self) -> None:
        self._lines = EventLines()

    def write(self, event: Event) -> None:
        for line in self._lines.of(event):
            _shown.info("%s", one_line(line))

    def close(self) -> None:
        for line in self._lines.rest():
            _shown.info("%s", one_line(line))


class ListenerSink:
    """A function that is called with each event."""

    label = "the progress display"
    required = False

    def __init__(self, listener: Listener) -> None:
        self.write = listener

    def close(self) -> None:
        """The listener belongs to the caller."""


class ProgressThrottle:
    """Lets through the first and the last event of an activity, and one every few seconds."""

    def __init__(
        self, seconds: float = PROGRESS_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds = seconds
        self._clock = clock
        self._activity = ""
        self._last = 0.0

    def lets_pass(self, event: ProgressEvent) -> bool:
        now = self._clock()
        first, last = event.activity != self._activity, event.done >= event.total
        if not (first or last or now - self._last >= self._seconds):
            return False
        # After its last event an activity may begin again, as that of the next sampling does.
        self._activity, self._last = "" if last else event.activity, now
        return True


class _LogFile(WatchedFileHandler):
    """Creates the file again if it was deleted. Nothing is raised or printed when it can't be
    written: its messages are events too, and a full disk would give one with each message."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            super().emit(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closing flushes what could not be written before
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's own name)
        """Does nothing, where logging prints a traceback to the terminal."""


class _Formatter(logging.Formatter):
    """Lets only tracebacks have several lines, so that no name of a file can write a line."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.message = one_line(record.message)
        if record.name != _shown.name:
            record.message = f"{record.levelname} {record.name}: {record.message}"
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        lines = super().formatException(ei).split("\n")
        return "\n".join(f"  {one_line(line)}" for line in lines)


@contextmanager
def text_log(path: Path) -> Generator[None]:
    """Append to the file `path`, each with its time, onewan's log messages and the lines of a
    `TextSink`, for as long as the block lasts.

    An exception that leaves the block has `path` as its attribute ``log_file``.
    """
    handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(_Formatter())
    logger = logging.getLogger("onewan")
    logger.addHandler(handler)
    # A program that uses onewan as a library may have chosen its own level.
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    try:
        yield
    except Exception as error:
        vars(error)["log_file"] = path
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()
