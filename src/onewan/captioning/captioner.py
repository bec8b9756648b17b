"""Asks a server for the captions of many clips at the same time, and writes each when it is there.

A caption is written at once, completely or not at all, and never over a file that exists, so that
an interrupted call loses at most what is being asked, and a repeated one does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from onewan.captioning.answers import NoCaptionError
from onewan.captioning.prompts import Template, material
from onewan.captioning.server import ChatServer, ServerFailure
from onewan.captioning.tasks import CaptionTask
from onewan.data.captions import CaptionSettings
from onewan.data.report import ClipProblem
from onewan.errors import DataError
from onewan.files import creating

_POLL_SECONDS = 0.5
"""On Windows, Ctrl-C does not interrupt a thread that waits for longer."""
_MOST_FAILURES_IN_A_ROW = 10
"""After so many clips without an answer between them, the others are not tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenCaption:
    """A caption that was written."""

    task: CaptionTask
    text: str
    had_thinking: bool


@dataclass(slots=True)
class CaptionReport:
    """What became of the tasks."""

    written: list[WrittenCaption] = field(default_factory=list[WrittenCaption])
    kept: list[CaptionTask] = field(default_factory=list[CaptionTask])
    """Those whose caption file somebody else has written meanwhile; it was left as it is."""
    problems: list[ClipProblem] = field(default_factory=list[ClipProblem])
    """Files that got no caption, each with the reason."""
    not_asked: int = 0
    """Tasks that are left: because of `stopped`, or since the call was interrupted."""
    stopped: str = ""
    """Why the others were left; empty if all were asked."""

    @property
    def is_complete(self) -> bool:
        """Whether every file has a caption now."""
        return not self.problems and not self.not_asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Captioner:
    """Captions clips by a server."""

    server: ChatServer
    template: Template
    trigger_word: str = ""
    """In place of that of the sources."""
    parallel: int = 4
    """Requests at the same time."""

    def trigger(self, task: CaptionTask) -> str:
        """The trigger word of `task`, which its caption contains; empty if there is none."""
        return self.trigger_word or task.trigger_word

    def request(self, task: CaptionTask) -> str:
        """The text that goes to the server with the frames of `task`."""
        shown = material(len(task.moments), task.seconds)
        return self.template.request(shown, self.trigger(task))

    def run(
        self, tasks: Sequence[CaptionTask], report: CaptionReport, advance: Callable[[int], None]
    ) -> None:
        """Ask for the captions of `tasks` and write them; `report` says what became of each, also
        if an exception (KeyboardInterrupt) leaves.

        `advance` is called with the number of tasks that are done.
        """
        report.not_asked = len(tasks)
        waiting = iter(tasks)
        running = dict[Future[WrittenCaption | None], CaptionTask]()
        in_a_row = 0
        pool = ThreadPoolExecutor(self.parallel, thread_name_prefix="onewan-caption")
        try:
            while True:
                # Not all at once: what is not submitted needs not be taken back.
                while len(running) < self.parallel and not report.stopped:
                    if (task := next(waiting, None)) is None:
                        break
                    running[pool.submit(self._caption, task)] = task
                if not running:
                    break
                finished, _ = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in finished:
                    answered = self._note(running.pop(future), future, report)
                    in_a_row = 0 if answered else in_a_row + 1
                    advance(len(tasks) - report.not_asked)
                if in_a_row >= _MOST_FAILURES_IN_A_ROW and not report.stopped:
                    report.stopped = f"{in_a_row} clips in a row got no caption"
        finally:
            self.server.stop()
            pool.shutdown(cancel_futures=True)
            for future, task in running.items():  # captions that were just being written
                if not future.cancelled() and future.exception() is None:
                    self._note(task, future, report)

    def _caption(self, task: CaptionTask) -> WrittenCaption | None:
        """Ask, and write the answer; None if there is a file by now."""
        caption = self.server.caption(self.request(task), task.images())
        settings = CaptionSettings(trigger_word=self.trigger(task))
        (text,) = settings.captions([caption.text], seed=0)
        try:
            with creating(task.target) as temporary:
                temporary.write_bytes(f"{text}\n".encode())
        except FileExistsError:
            return None
        return WrittenCaption(task=task, text=text, had_thinking=caption.had_thinking)

    def _note(
        self, task: CaptionTask, future: Future[WrittenCaption | None], report: CaptionReport
    ) -> bool:
        """Add what became of `task` to `report`; whether the server has answered."""
        answered = True
        try:
            written = future.result()
            if written is None:
                report.kept.append(task)
            else:
                report.written.append(written)
        except ServerFailure as failure:
            answered = False
            if failure.for_all:
                report.stopped = report.stopped or str(failure)
                return answered
            report.problems.append(ClipProblem(path=task.path, reason=str(failure)))
        except NoCaptionError as error:
            report.problems.append(ClipProblem(path=task.path, reason=str(error)))
        except DataError as error:
            report.problems.append(ClipProblem.from_error(task.path, error))
        report.not_asked -= 1
        return answered


def as_data(report: CaptionReport) -> dict[str, Any]:
    """`report` as plain data."""
    return {
        "ok": report.is_complete,
        "captions": [
            {"path": str(each.task.path), "caption_file": str(each.task.target), "text": each.text}
            for each in report.written
        ],
        "kept": [str(task.target) for task in report.kept],
        "problems": [problem_data(problem) for problem in report.problems],
        "not_asked": report.not_asked,
        "stopped": report.stopped,
    }


def problem_data(problem: ClipProblem) -> Mapping[str, str]:
    """`problem` as plain data."""
    return {"path": str(problem.path), "text": problem.reason}
