"""The queue on disk: order, starts, and that a kill at any moment loses and repeats nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.trainers import SLEEP, begin, eventually, run_file, stand_in

from onewan.errors import ConfigError, OnewanError
from onewan.files import IS_WINDOWS
from onewan.locks import ProcessId
from onewan.runs.layout import RunLayout
from onewan.runs.processes import force_stop, marked
from onewan.runs.queue import Queue


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def names(queue: Queue, device: str = "cpu") -> list[str]:
    return [entry.run for entry in queue.entries() if entry.device == device]


def test_entries_of_a_device_are_kept_and_moved_among_themselves(
    tmp_path: Path, runs: Path
) -> None:
    queue = Queue(runs)
    a, x, b, y, c = (
        queue.add(run_file(tmp_path, name, device))
        for name, device in [
            ("a", "cpu"),
            ("x", "cuda:1"),
            ("b", "cpu"),
            ("y", "cuda:1"),
            ("c", "cpu"),
        ]
    )
    assert names(Queue(runs)) == ["a", "b", "c"] and names(queue, "cuda:1") == ["x", "y"]
    queue.move(c.id, -2)
    queue.move(x.id, 1)
    assert names(Queue(runs)) == ["c", "a", "b"] and names(queue, "cuda:1") == ["y", "x"]
    queue.move(c.id, 99)
    queue.move(a.id, -99)
    assert names(queue) == ["a", "b", "c"]
    queue.start_first(b.id)
    assert names(queue) == ["b", "a", "c"] and queue.entry(b.id).first
    queue.return_to_queue(b.id)
    queue.remove(a.id)
    assert names(queue) == ["c", "b"] and names(queue, "cuda:1") == ["y", "x"]
    assert queue.entry(y.id).arguments == (str(tmp_path / "y.yaml"),)
    with pytest.raises(OnewanError, match="no longer in the queue"):
        queue.move(a.id, 1)


def test_a_queue_is_paused_by_its_device(runs: Path) -> None:
    queue = Queue(runs)
    queue.pause("cpu", True)
    queue.pause("cuda:0", True)
    queue.pause("cpu", True)
    assert Queue(runs).paused() == ("cuda:0", "cpu")
    queue.pause("cuda:0", False)
    assert queue.paused() == ("cpu",) and queue.entries() == ()


def test_what_can_not_be_started_is_refused_when_it_is_added(tmp_path: Path, runs: Path) -> None:
    queue = Queue(runs)
    file = run_file(tmp_path, "a")
    with pytest.raises(ConfigError, match=r"train\.steps"):
        queue.add(file, overrides=["train.steps=-1"])
    with pytest.raises(OnewanError, match=r"output.dir: is .*elsewhere, and only runs in"):
        queue.add(file, overrides=[f"output.dir={tmp_path}/elsewhere"])
    queue.add(file)
    with pytest.raises(OnewanError, match="a: is in the queue already"):
        queue.add(file)
    assert names(queue) == ["a"]


def test_a_trainer_that_ends_before_its_run_begins_has_failed_with_its_output(
    tmp_path: Path, runs: Path
) -> None:
    queue = Queue(runs)
    added, file = queue.add(run_file(tmp_path, "a")), tmp_path / "a.yaml"
    file.write_text(file.read_text("utf-8").replace("variant: ti2v-5b", "variant: wan"), "utf-8")
    entry = queue.start(added.id)
    assert entry.process is not None
    with pytest.raises(OnewanError, match="does not wait any more"):
        queue.start(entry.id)
    with pytest.raises(OnewanError, match="is being trained"):
        queue.remove(entry.id)
    queue.settle()
    assert queue.entry(entry.id).state == "started"
    eventually(lambda: entry.process is not None and entry.process.is_alive is False)
    queue.settle()
    failed = queue.entry(entry.id)
    assert failed.state == "failed"
    assert f"onewan: {file}: 1 problem\n  model.variant: " in queue.output_of(failed)
    # A new try takes its place.
    again = queue.add(run_file(tmp_path, "a"))
    assert [e.id for e in queue.entries()] == [again.id] and queue.output_of(failed) == ""


def test_a_run_that_has_begun_leaves_the_queue_or_returns_to_it(
    tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in("print('hello', flush=True); " + SLEEP, monkeypatch)
    queue = Queue(runs)
    one, two = (queue.start(queue.add(run_file(tmp_path, name)).id) for name in ("one", "two"))
    queue.return_to_queue(two.id)
    eventually(lambda: "hello" in queue.output_of(one) and "hello" in queue.output_of(two))
    begin(RunLayout(runs / "one"), end=True)
    begin(RunLayout(runs / "two"), end=True)
    queue.settle()
    assert [entry.state for entry in queue.entries()] == ["started", "started"]
    for entry in (one, two):
        assert entry.process is not None
        force_stop(entry.process)
    queue.settle()
    (left,) = queue.entries()
    assert left.id == two.id and left.state == "waiting" and not left.returns
    assert left.arguments == ("--resume=auto", str(runs / "two"))
    assert RunLayout(runs / "one").output.read_text("utf-8").strip() == "hello"


def test_an_earlier_process_of_the_run_does_not_hide_that_continuing_it_failed(
    tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in("print('no state'); raise SystemExit(1)", monkeypatch)
    begin(RunLayout(runs / "a"), end=True)
    events = RunLayout(runs / "a").events
    lines = [json.loads(line) for line in events.read_text("ascii").splitlines()]
    old = [line | {"time": "2026-01-02T03:00:00.000Z"} for line in lines]
    events.write_text("".join(f"{json.dumps(line)}\n" for line in old), "ascii")
    queue = Queue(runs)
    entry = queue.start(queue.add(run_file(tmp_path, "a")).id)
    eventually(lambda: entry.process is not None and entry.process.is_alive is False)
    queue.settle()
    assert queue.entry(entry.id).state == "failed"


def test_a_damaged_queue_is_told_and_kept(runs: Path) -> None:
    (runs / ".queue").mkdir(parents=True)
    file = runs / ".queue" / "queue.json"
    for text in ("{", "[]", '{"entries": [{}], "paused": []}'):
        file.write_text(text, "utf-8")
        with pytest.raises(OnewanError, match=r"queue.json: is no queue .* move it away"):
            Queue(runs).entries()
        assert file.read_text("utf-8") == text


# --------------------------------------------------------------------------------- kill -9

KILLED = """
import os, signal, sys
from pathlib import Path
from onewan.runs import processes, queue

moment, runs, key = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
command = [sys.executable, "-c", sys.argv[4]]
processes.trainer_command = lambda arguments: command
writes = []

class Killed(queue.Queue):
    def _write(self, content):
        if moment == f"before write {len(writes)}":
            os.kill(os.getpid(), signal.SIGKILL)
        super()._write(content)
        if moment == f"after write {len(writes)}":
            os.kill(os.getpid(), signal.SIGKILL)
        writes.append(content)

Killed(runs).start(key)
"""


@pytest.mark.skipif(IS_WINDOWS, reason="SIGKILL")
@pytest.mark.parametrize(
    ("moment", "is_started"),
    [
        ("before write 0", False),
        ("after write 0", False),
        ("before write 1", True),
        ("after write 1", True),
    ],
)
def test_a_kill_of_the_program_at_any_moment_of_a_start_loses_and_repeats_nothing(
    tmp_path: Path, runs: Path, moment: str, is_started: bool
) -> None:
    queue = Queue(runs)
    entry = queue.add(run_file(tmp_path, "a"))
    command = [sys.executable, "-c", KILLED, moment, str(runs), entry.id, SLEEP]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    again = Queue(runs)
    again.settle()
    (left,) = again.entries()
    alive = marked(entry.id)
    assert len(alive) == is_started
    assert left.state == ("started" if is_started else "waiting")
    if is_started:
        trainer = ProcessId.of(alive[0].pid)
        assert left.process == trainer
        force_stop(trainer)


@pytest.mark.skipif(IS_WINDOWS, reason="SIGKILL")
def test_a_trainer_that_failed_while_its_starter_was_dead_is_not_started_again(
    tmp_path: Path, runs: Path
) -> None:
    queue = Queue(runs)
    entry = queue.add(run_file(tmp_path, "a"))
    failing = "print('no clips', flush=True); raise SystemExit(1)"
    command = [sys.executable, "-c", KILLED, "before write 1", str(runs), entry.id, failing]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    eventually(lambda: not marked(entry.id))
    queue.settle()
    assert queue.entry(entry.id).state == "failed"
    assert queue.output_of(queue.entry(entry.id)) == "no clips\n"
