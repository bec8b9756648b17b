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
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onewan.errors import OnewanError
from onewan.files import IS_WINDOWS
from onewan.locks import ProcessId
from onewan.runs.processes import force_stop

_MOST_LINES = 2000
_MOST_KEPT = 50
"""Ended commands that stay in the list."""
_MOST_JSON = 64_000_000
"""Bytes of a command's answer."""


def command_line(arguments: Sequence[str]) -> str:
    """A command as it is typed in a terminal."""
    words = ["onewan", *arguments]
    return subprocess.list2cmdline(words) if IS_WINDOWS else shlex.join(words)


async def _start(arguments: Sequence[str], **streams: Any) -> asyncio.subprocess.Process:
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
        env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
        limit=1_000_000,
        **streams,
        **own_group,
    )


@dataclass(kw_only=True, eq=False)
class Command:
    """A command that was started."""

    title: str
    arguments: tuple[str, ...]
    output: deque[str] = field(default_factory=lambda: deque(maxlen=_MOST_LINES))
    """Its newest lines, of standard output and standard error."""
    result: int | None = None
    """Its exit status; None while it runs."""
    stopped: bool = False
    process: ProcessId | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def line(self) -> str:
        """The command as it is typed in a terminal."""
        return command_line(self.arguments)

    async def stop(self) -> None:
        """End it with all that it started. OnewanError if the system can't."""
        self.stopped = True
        if self.process is not None and self.result is None:
            await asyncio.to_thread(force_stop, self.process)

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

    def start(self, title: str, arguments: Sequence[str]) -> Command:
        """Start ``onewan ARGUMENTS``; its output is read as it comes."""
        command = Command(title=title, arguments=tuple(arguments))
        ended = [each for each in self.started if each.result is not None]
        for each in ended[: max(0, len(ended) - _MOST_KEPT)]:
            self.started.remove(each)
        self.started.append(command)
        task = asyncio.get_running_loop().create_task(self._follow(command))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return command

    async def _follow(self, command: Command) -> None:
        try:
            process = await _start(
                command.arguments,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                cwd=self._folder,
            )
            command.process = ProcessId.of(process.pid)
            if command.stopped:
                await command.stop()
            assert process.stdout is not None
            while line := await _line(process.stdout):
                command.output.append(line.decode("utf-8", "replace").rstrip("\r\n"))
            command.result = await process.wait()
        except OSError as error:
            command.output.append(f"{error}")
            command.result = 1
        finally:
            if command.result is None:
                command.result = 1
            command.ended.set()

    async def json_of(self, arguments: Sequence[str], *, status: Sequence[int] = (0,)) -> Any:
        """The JSON document that ``onewan ARGUMENTS`` prints to standard output.

        OnewanError with what it printed as error if its exit status is none of `status`, or the
        document is missing. If the caller is cancelled, so is the command.
        """
        process = await _start(
            arguments,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=self._folder,
        )
        try:
            out, err = await process.communicate()
        finally:
            if process.returncode is None:
                await asyncio.to_thread(force_stop, ProcessId.of(process.pid))
        text = err.decode("utf-8", "replace").strip()
        if process.returncode in status and len(out) <= _MOST_JSON:
            with contextlib.suppress(ValueError):
                return json.loads(out)
        lines = text.splitlines() or [f"{command_line(arguments)}: ended without an answer"]
        raise OnewanError(lines[0].removeprefix("onewan: "), [line.strip() for line in lines[1:]])


async def _line(stream: asyncio.StreamReader) -> bytes:
    """The next line, or a part of one that is longer than is kept."""
    try:
        return await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        return await stream.readexactly(error.consumed)
