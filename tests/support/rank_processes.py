"""Runs of several processes in which something goes wrong: `Processes`, started as torchrun does it
but from a process that has imported PyTorch already, and `Torchrun`, which it starts itself."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onewan.cli import main
from onewan.runs.event_file import read_events
from onewan.runs.layout import RunLayout
from support.torchrun import MODULE, environment_of


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Look for something every few milliseconds; an AssertionError names `what` did not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.02)


def count(layout: RunLayout, kind: str) -> int:
    """Events of a kind that a run has written so far."""
    if not layout.events.is_file():
        return 0
    return sum(event["event"] == kind for event in read_events(layout.events))


class Processes:
    """`onewan ARGUMENTS` in so many processes, with what each has printed; killed at the end."""

    def __init__(
        self,
        folder: Path,
        processes: int,
        arguments: Sequence[str],
        *,
        before: Callable[[int], object] | None = None,
    ) -> None:
        """`before(rank)` is called in each process first."""
        from torch.distributed import TCPStore

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["onewan.train.trainer", "onewan.parallel.connection"])
        self._printed = [folder / f"printed_{rank}.txt" for rank in range(processes)]
        self.processes: list[Any] = []
        for rank, printed in enumerate(self._printed):
            environment = environment_of(rank, processes, self._store.port)
            printed.unlink(missing_ok=True)
            given = (rank, environment, printed, list(arguments), before)
            process = context.Process(target=_command, args=given)
            process.start()
            self.processes.append(process)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def status(self, rank: int, seconds: float) -> int:
        """The exit status of a process, which ends within so many seconds."""
        self.processes[rank].join(seconds)
        status = self.processes[rank].exitcode
        assert status is not None, f"rank {rank} has not ended within {seconds:.0f} s"
        return status

    @property
    def is_running(self) -> bool:
        return any(process.exitcode is None for process in self.processes)

    def lines(self, rank: int) -> list[str]:
        """What a process has said as an error."""
        text = self._printed[rank].read_text("utf-8")
        return [line for line in text.splitlines() if line.startswith("onewan: ")]


def _command(
    rank: int,
    environment: Mapping[str, str],
    printed: Path,
    arguments: Sequence[str],
    before: Callable[[int], object] | None,
) -> None:
    os.environ |= environment
    file = os.open(printed, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    if before is not None:
        before(rank)
    sys.exit(main(arguments))


class Torchrun:
    """A torchrun that trains, in a session of its own, all of which is killed at the end."""

    def __init__(
        self, printed: Path, options: Sequence[str], arguments: Sequence[str], *, inside: Any = ()
    ) -> None:
        """`inside` is a command that runs the command which follows it."""
        self._printed = printed
        with printed.open("w") as file:
            self.process = subprocess.Popen(
                [*inside, *MODULE, *options, "-m", "onewan", *arguments],
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for rank in self.ranks().values():  # torchrun gives each a session
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        self.process.wait()

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def ranks(self) -> dict[int, int]:
        """The system's number of each process that trains, by rank."""
        return dict(_ranks(self.process.pid))

    @property
    def text(self) -> str:
        return self._printed.read_text("utf-8", errors="replace")

    def lines(self) -> list[str]:
        """What its processes have said as errors."""
        return [line for line in self.text.splitlines() if line.startswith("onewan: ")]


def _ranks(root: int) -> Iterator[tuple[int, int]]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, KeyError):
            variables = dict(
                entry.split("=", 1)
                for entry in (folder / "environ").read_text(errors="replace").split("\0")
                if "=" in entry
            )
            session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
            if session == root or _has_ancestor(int(folder.name), root):
                yield int(variables["RANK"]), int(folder.name)


def _has_ancestor(process: int, root: int) -> bool:
    while process > 1:
        if process == root:
            return True
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return False
