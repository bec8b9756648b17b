"""Trainers as processes: they outlive who started them, and a forced stop ends all of them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from support.interrupted import locking

from onewan.cli import main
from onewan.errors import OnewanError
from onewan.locks import ProcessId, holder_is_alive, holder_of
from onewan.runs import processes
from onewan.runs.layout import RunLayout
from onewan.runs.processes import force_stop, force_stop_run, marked, start

FAMILY = """
import os, subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
members = [os.getpid()]
members.append(subprocess.Popen(sleep).pid)
members.append(subprocess.Popen(sleep, start_new_session=True).pid)
if os.name != "nt" and os.fork() == 0:  # whose parent ends, so that it is nobody's child
    members = [subprocess.Popen(sleep, start_new_session=True).pid]
    print(*members, flush=True)
    os._exit(0)
print(*members, flush=True)
time.sleep(60)
"""
"""A process, its child, one that has left the group, and one that has left the family too."""


def eventually(true: Callable[[], bool], seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not become true"
        time.sleep(0.01)


def family(mark: str) -> list[int]:
    """The numbers of the processes of `FAMILY`, the trainer's place first."""
    process = subprocess.Popen(
        [sys.executable, "-c", FAMILY],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {processes.MARK: mark},
        start_new_session=True,
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(1 if os.name == "nt" else 2)]
    numbers = [int(number) for line in lines for number in line.split()]
    numbers.remove(process.pid)
    return [process.pid, *numbers]


def alive(number: int) -> bool:
    return bool(ProcessId.of(number).is_alive)


def test_a_forced_stop_ends_children_in_and_outside_of_the_group() -> None:
    numbers, others = family("one"), family("two")
    assert len(numbers) == (3 if os.name == "nt" else 4)
    assert {p.pid for p in marked("one")} == set(numbers)
    force_stop(ProcessId.of(numbers[0]))
    eventually(lambda: not any(map(alive, numbers)))
    assert all(map(alive, others))
    force_stop(ProcessId.of(others[0]))
    eventually(lambda: not any(map(alive, others)))


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_forced_stop_ends_a_process_that_ignores_signals_or_is_suspended() -> None:
    script = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print('ready', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGSTOP)
        force_stop(ProcessId.of(process.pid))
        assert not alive(process.pid)


@pytest.mark.skipif(os.name == "nt", reason="process groups of POSIX")
def test_the_script_that_runs_a_trainer_in_its_group_goes_on() -> None:
    script = (
        "import subprocess, sys; sleep = [sys.executable, '-c', 'import time; time.sleep(60)'];"
        "trainer = subprocess.Popen(sleep); print(trainer.pid, flush=True); trainer.wait();"
        "print('went on', flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        force_stop(ProcessId.of(int(process.stdout.readline())))
        assert process.stdout.readline().strip() == "went on"


def test_a_number_that_another_process_has_by_now_is_not_ended(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with locking(lock) as process:
        holder = holder_of(lock)
        assert holder is not None and holder.process == ProcessId.of(process.pid)
        facts = json.loads(lock.with_name(".lock.json").read_text("utf-8"))
        facts["started"] -= 100
        lock.with_name(".lock.json").write_text(json.dumps(facts), "utf-8")
        assert holder_is_alive(lock) is False
        force_stop(dataclasses.replace(holder.process, started=facts["started"]))
        with pytest.raises(OnewanError, match="is not running"):
            force_stop_run(RunLayout(tmp_path))
        assert process.poll() is None


@pytest.mark.parametrize("field", ["host", "machine"])
def test_a_trainer_on_another_host_or_in_another_container_is_not_ended(
    tmp_path: Path, field: str
) -> None:
    lock = tmp_path / ".lock"
    with locking(lock) as process:
        facts = json.loads(lock.with_name(".lock.json").read_text("utf-8"))
        lock.with_name(".lock.json").write_text(json.dumps(facts | {field: "elsewhere"}), "utf-8")
        with pytest.raises(OnewanError, match="can't be reached from here; run there: onewan stop"):
            force_stop_run(RunLayout(tmp_path))
        assert process.poll() is None


def test_a_zombie_is_not_alive(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with locking(lock) as process:
        assert holder_is_alive(lock) is True
        process.kill()
        # Not waited for, so that it stays in the table of processes.
        eventually(lambda: holder_is_alive(lock) is False)


def test_stop_force_ends_a_run_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    layout = RunLayout(Path("runs/fox"))
    layout.create()
    with locking(layout.lock) as process:
        assert main(["stop", "--force", "fox"]) == 0
        assert not alive(process.pid)
    assert "its process was ended" in capsys.readouterr().out
    assert main(["stop", "--force", "fox"]) == 1
    assert "is not running" in capsys.readouterr().err


START = """
import os, sys
from pathlib import Path
from onewan.runs.processes import start
number = start(["nothing.yaml"], Path(sys.argv[1]), "mark").number
print(number, os.getsid(number), flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(os.name == "nt", reason="sessions of POSIX")
def test_a_trainer_has_its_own_session_and_outlives_who_started_it(tmp_path: Path) -> None:
    output = tmp_path / "new" / "output.txt"
    done = subprocess.run(
        [sys.executable, "-c", START, str(output)], stdout=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    number, session = map(int, done.stdout.split())
    assert session == number
    # What it says before there is a folder of the run is in the file all the same.
    eventually(lambda: "there is no such file" in output.read_text("utf-8"), 30)


def test_a_trainer_that_has_ended_leaves_no_zombie(tmp_path: Path) -> None:
    process = start([str(tmp_path / "nothing.yaml")], tmp_path / "output.txt", "mark")
    eventually(lambda: not psutil.pid_exists(process.number), 30)
    assert "nothing.yaml" in (tmp_path / "output.txt").read_text("utf-8")
