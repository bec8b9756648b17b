"""Real trainers of the demonstration's model, started by a page that is a process of its own; both
are killed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import httpx
import pytest
from support.page import served
from support.trainers import eventually

from onewan.demo import prepare_demo
from onewan.files import IS_WINDOWS
from onewan.runs.control import request
from onewan.runs.layout import RunLayout
from onewan.runs.processes import force_stop_run, marked, trainer_of
from onewan.runs.queue import Entry, Queue
from onewan.runs.status import read_status

pytestmark = [pytest.mark.long, pytest.mark.skipif(IS_WINDOWS, reason="SIGKILL")]


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    return prepare_demo(tmp_path, "ti2v-5b", lambda _line: None)


def test_a_run_outlives_its_page_and_goes_on_where_it_was_killed(
    tmp_path: Path, run_file: Path
) -> None:
    runs = tmp_path / "runs"
    queue, layout = Queue(runs), RunLayout(runs / run_file.stem)
    forever = ["train.steps=100000", "train.save_every=5", "sample.every=0", "validation.clips=0"]
    added = queue.add(run_file, overrides=forever)

    def step() -> int:
        return read_status(layout.root).step if layout.events.exists() else 0

    def entry() -> Entry:
        return queue.entry(added.id)

    try:
        with served(runs) as page:
            eventually(lambda: bool(layout.saved_steps()), 180)
            page.process.kill()
            page.process.wait()
        trainer = entry().process
        assert trainer is not None and trainer == trainer_of(layout)
        before = step()
        eventually(lambda: step() > before + 3)

        with served(runs) as page:
            eventually(lambda: '"running"' in httpx.get(page.root).text)
            assert entry().process == trainer
            # The trainer, and what it has started, are still those of the first page.
            assert trainer.number in {process.pid for process in marked(added.id)}

            os.kill(trainer.number, signal.SIGKILL)
            killed = time.monotonic()
            eventually(lambda: '"killed"' in httpx.get(page.root).text)
            assert time.monotonic() - killed < 5
            assert queue.entries() == () and layout.output.exists()

            saved = layout.saved_steps()[-1]
            queue.add(layout.root, ["--resume=auto"])
            # What is requested before the new trainer has begun is not meant for it.
            eventually(lambda: read_status(layout.root).state == "running", 180)
            eventually(lambda: step() > saved + 1, 180)
            request(layout, "stop")
            eventually(lambda: read_status(layout.root).state == "stopped")
            eventually(lambda: queue.entries() == ())
    finally:
        for process in marked(added.id):
            process.kill()


def test_a_trainer_is_forced_to_stop_in_the_middle_of_its_work(
    tmp_path: Path, run_file: Path
) -> None:
    runs = tmp_path / "runs"
    queue, layout = Queue(runs), RunLayout(runs / run_file.stem)
    entry = queue.start(queue.add(run_file, overrides=["train.steps=100000"]).id)
    eventually(lambda: layout.events.exists() and read_status(layout.root).step > 0, 180)
    assert marked(entry.id)
    force_stop_run(layout)
    assert not marked(entry.id) and read_status(layout.root).state == "killed"
