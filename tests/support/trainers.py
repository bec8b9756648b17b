"""Programs in the place of trainers, and what a trainer does to its folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from onewan.runs import processes
from onewan.runs.event_file import EventFile
from onewan.runs.events import Started, Stopped
from onewan.runs.jobs import Jobs
from onewan.runs.layout import RunLayout
from onewan.runs.processes import force_stop


def run_file(tmp_path: Path, name: str, device: str = "cpu") -> Path:
    """A run file without a model, so that its trainer ends as soon as it looks for it."""
    path = tmp_path / f"{name}.yaml"
    path.write_text(
        f"model: {{path: {tmp_path.as_posix()}/model, variant: ti2v-5b, device: '{device}'}}\n"
        f"video_data: {{sources: [{{path: {tmp_path.as_posix()}/none}}]}}\n",
        encoding="utf-8",
    )
    return path


def eventually(true: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not become true"
        time.sleep(0.02)


def stand_in(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a small program be started in the place of a trainer, of which only that it lives, what
    it prints and how it ends matter here."""
    program = sys.executable
    monkeypatch.setattr(
        processes, "trainer_command", lambda arguments: [program, "-c", command, *arguments]
    )


SLEEP = "import time; time.sleep(60)"


def begin(layout: RunLayout, end: bool = False) -> None:
    """What a trainer does to its folder."""
    layout.create()
    with EventFile(layout.events) as file:
        file.write(Started(run=layout.root, steps=4))
        if end:
            file.write(Stopped(step=2))


@contextmanager
def sleeping_jobs(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    """The jobs of the folder `runs`, whose trainers sleep; they are ended with the block."""
    monkeypatch.delenv("ONEWAN_DEVICE", raising=False)
    stand_in(SLEEP, monkeypatch)
    jobs = Jobs(runs)
    yield jobs
    for entry in jobs.queue.entries():
        if entry.process is not None:
            force_stop(entry.process)
