"""`Commands`: the commands of onewan that the page runs, each in a process of its own.

What they print is kept, their command line can be copied into a terminal, and each can be stopped
with everything that it started.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel

from onewan.errors import OnewanError
from onewan.files import IS_WINDOWS
from onewan.locks import ProcessId
from onewan.runs.processes import force_stop

_MOST_LINES = 2000
_MOST_KEPT = 50
"""Ended commands that stay in the list."""
_MOST_JSON = 64_000_000
"""Bytes of a command's answer."""
_STOPPING_SECONDS = 10.0
"""How long a command that was asked to stop may take to clean up before it is killed."""


def command_line(arguments: Sequence[str]) -> str:
    """A command as it is typed in a terminal."""
    words = ["onewan", *arguments]
    return subprocess.list2cmdline(words) if IS_WINDOWS else shlex.join(words)


async def _start(
    arguments: Sequence[str], *, progress: bool = False, **streams: Any
) -> asyncio.subprocess.Process:
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    if progress:
        environment["ONEWAN_PROGRESS"] = "json"
    own_group: dict[str, Any] = (
        {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}  # type: ignore[attr-defined]
        if IS_WINDOWS
        else {"start_new_session": True}
    )
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "onewan",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        env=environment,
        limit=1_000_000,
        **streams,
        **own_group,
    )


class Progress(BaseModel):
    """How far a command is."""

    activity: str
    done: int
    total: int
    unit: str
    note: str = ""

    @property
    def text(self) -> str:
        """Such as "writing: 120 of 340 MB"."""
        plural = "" if self.total == 1 or self.unit.isupper() else "s"
        return f"{self.activity}: {self.done:,} of {self.total:,} {self.unit}{plural}"


class _ProgressLine(BaseModel):
    progress: Progress


@dataclass(kw_only=True, eq=False)
class Command:
    """A command that was started."""

    title: str
    arguments: tuple[str, ...]
    destination: Path | None = None
    """The file or folder that it writes, or whose name begins those that it writes."""
    output: deque[str] = field(default_factory=lambda: deque(maxlen=_MOST_LINES))
    """Its newest lines, of standard output and standard error."""
    progress: Progress | None = None
    """How far it is, if it has told."""
    result: int | None = None
    """Its exit status; None while it runs."""
    stopped: bool = False
    process: ProcessId | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def line(self) -> str:
        """The command as it is typed in a terminal."""
        return command_line(self.arguments)

    @property
    def state(self) -> str:
        """How far it is, or how it has ended, as people read it."""
        if self.result is None:
            if self.stopped:
                return "Stopping ..."
            return "Starting ..." if self.progress is None else self.progress.text
        if self.stopped:
            return "Stopped; what was not complete is removed."
        if self.result == 0:
            return "Done."
        return f"It ended with an error (exit status {self.result})."

    def written(self) -> list[Path]:
        """What it has written if it succeeded: its destination, or beside it the files that its
        lines name, which are several where each expert has its own."""
        if self.result != 0 or self.destination is None:
            return []
        if self.destination.is_dir():
            return [self.destination]
        files = [Path(line.rpartition(": ")[0]) for line in self.output]
        folder = self.destination.parent
        return [file for file in files if file.parent == folder and file.is_file()]

    async def stop(self) -> None:
        """Ask it to stop, as Ctrl-C does, so that it removes what it has not completed; if it has
        not ended after some seconds, end it with all that it started. OnewanError if the system
        can't."""
        self.stopped = True
        if self.process is None or self.result is not None:
            return
        if (found := self.process.find()) is not None:
            number: Any = getattr(signal, "CTRL_BREAK_EVENT" if IS_WINDOWS else "SIGINT")
            with contextlib.suppress(OSError, psutil.Error):
                found.send_signal(number)
        try:
            await asyncio.wait_for(self.ended.wait(), _STOPPING_SECONDS)
        except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
            await asyncio.to_thread(force_stop, self.process)

    def take(self, line: str) -> None:
        """Take a line that it has printed."""
        try:
            self.progress = _ProgressLine.model_validate_json(line).progress
        except ValueError:
            self.output.append(line)
        self.wake()

    def wake(self) -> None:
        """Wake those that wait for news."""
        self._news.set()
        self._news = asyncio.Event()

    async def news(self) -> None:
        """Wait for a line, for progress or for its end; returns at once if it has ended."""
        if self.result is None:
            await self._news.wait()

    async def wait(self) -> int:
        """Its exit status."""
        await self.ended.wait()
        assert self.result is not None
        return self.result


class Commands:
    """The commands that this page has started, the newest last."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the one in which they run, so that relative paths mean what they did."""
        self._folder = folder
        self._tasks: set[asyncio.Task[None]] = set()
        self.started: list[Command] = []

    def start(
        self, title: str, arguments: Sequence[str], destination: Path | None = None
    ) -> Command:
        """Start ``onewan ARGUMENTS``; its output is read as it comes."""
        command = Command(title=title, arguments=tuple(arguments), destination=destination)
        ended = [each for each in self.started if each.result is not None]
        for each in ended[: max(0, len(ended) - _MOST_KEPT)]:
            self.started.remove(each)
        self.started.append(command)
        self._keep(self._follow(command))
        return command

    def running(self, *names: str) -> list[Command]:
        """The commands of these names, such as ``convert``, that have not ended."""
        return [each for each in self.started if each.result is None and each.arguments[0] in names]

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` beside this, and keep a reference to it until it ends."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self, command: Command) -> None:
        try:
            process = await _start(
                command.arguments,
                progress=True,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                cwd=self._folder,
            )
            command.process = ProcessId.of(process.pid)
            if command.stopped:
                self._keep(command.stop())
            assert process.stdout is not None
            while line := await _line(process.stdout):
                command.take(line.decode("utf-8", "replace").rstrip("\r\n"))
            command.result = await process.wait()
        except OSError as error:
            command.output.append(f"{error}")
            command.result = 1
        finally:
            if command.result is None:
                command.result = 1
            command.ended.set()
            command.wake()

    async def json_of(
        self,
        arguments: Sequence[str],
        *,
        status: Sequence[int] = (0,),
        told: Callable[[str], None] = lambda _: None,
    ) -> Any:
        """The JSON document that ``onewan ARGUMENTS`` prints to standard output; `told` gets the
        lines of standard error, such as those about progress, as they come.

        OnewanError with what it printed as error if its exit status is none of `status`, or the
        document is missing. If the caller is cancelled, so is the command.
        """
        process = await _start(
            arguments,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=self._folder,
        )
        lines = list[str]()

        async def listen(stream: asyncio.StreamReader) -> None:
            while line := await _line(stream):
                lines.append(line.decode("utf-8", "replace").rstrip())
                del lines[:-_MOST_LINES]
                told(lines[-1])

        assert process.stdout is not None and process.stderr is not None
        try:
            out, *_ = await asyncio.gather(process.stdout.read(), listen(process.stderr))
            await process.wait()
        finally:
            if process.returncode is None:
                await asyncio.to_thread(force_stop, ProcessId.of(process.pid))
        if process.returncode in status and len(out) <= _MOST_JSON:
            with contextlib.suppress(ValueError):
                return json.loads(out)
        if not (lines := [line for line in lines if line]):
            lines = [f"{command_line(arguments)}: ended without an answer"]
        raise OnewanError(lines[0].removeprefix("onewan: "), [line.strip() for line in lines[1:]])


async def _line(stream: asyncio.StreamReader) -> bytes:
    """The next line, or a part of one that is longer than is kept."""
    try:
        return await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        return await stream.readexactly(error.consumed)
