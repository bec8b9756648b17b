"""Where runs stand, by their folders: `onewan runs`, and events read from their end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from onewan.cli import main
from onewan.config.load import dump_run, load_run
from onewan.errors import OnewanError
from onewan.runs import event_file
from onewan.runs.event_file import processes, read_backwards, read_events
from onewan.runs.layout import RunLayout
from onewan.runs.status import find_run, find_runs, read_status
from onewan.runs.status_text import kind_text

START = datetime(2026, 1, 2, 3, 0, tzinfo=timezone.utc)


def line(event: str, at: float, **fields: Any) -> str:
    stamp = (START + timedelta(seconds=at)).isoformat(timespec="milliseconds")
    return json.dumps({"event": event, "time": stamp.replace("+00:00", "Z"), **fields}) + "\n"


def started(at: float, **fields: Any) -> str:
    return line("started", at, run="runs/fox", steps=40, pid=1, hostname="elsewhere", **fields)


def step(number: int, at: float, **fields: Any) -> str:
    expert = "high" if number % 2 else "low"
    return line("step", at, **{"step": number, "expert": expert, "loss": number, **fields})


def run_folder(folder: Path, *lines: str, settings: str = "train.steps=40") -> RunLayout:
    folder.parent.mkdir(parents=True, exist_ok=True)
    run_file = folder.with_suffix(".yaml")
    run_file.write_text("model: {path: m, variant: t2v-a14b}\n", encoding="utf-8")
    layout = RunLayout(folder)
    layout.create()
    config = load_run(run_file, [settings, "train.switch_expert_every=1"])
    layout.resolved.write_text(dump_run(config), encoding="utf-8")
    layout.events.write_text("".join(lines), encoding="ascii")
    return layout


# ------------------------------------------------------------------------------ reading backwards


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 18])
def test_events_read_backwards_are_those_read_forwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    path = tmp_path / "events.jsonl"
    whole = "".join(line("note", n, text="x" * (n % 50)) for n in range(40))
    truncated = '{"event": "no\n'
    path.write_text(whole + truncated + line("saved", 41, step=1) + '{"event": "st', "ascii")
    monkeypatch.setattr(event_file, "_BLOCK_BYTES", block)
    found = list(read_backwards(path))
    assert [event for _, event in found] == list(read_events(path))[::-1]
    assert len(found) == 41
    data = path.read_bytes()
    for position, event in found:
        assert json.loads(data[position:].split(b"\n")[0]) == event
    middle = found[20][0]
    assert list(read_backwards(path, before=middle)) == found[21:]
    assert [e["event"] for _, e in read_backwards(path, '"event": "saved"')] == ["saved"]


def test_each_process_has_its_first_and_its_last_event(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(started(0) + step(1, 5) + started(100) + step(2, 107) + line("stopped", 108))
    spans = [(p.first["time"][17:19], p.last["event"]) for p in processes(path)]
    assert spans == [("00", "step"), ("40", "stopped")]


# ----------------------------------------------------------------------------------- one run


def test_a_run_that_goes_on_is_told_by_its_newest_events(tmp_path: Path) -> None:
    layout = run_folder(
        tmp_path / "fox",
        started(0, heartbeat_seconds=30.0),
        *(step(n, n) for n in range(1, 31)),
        line("validation", 30, step=30, expert="low", loss=0.75, base=1.0),
        # It was killed and resumed from step 20, so that steps 21 to 30 are those of lost work.
        started(1000, heartbeat_seconds=30.0),
        line("resumed", 1002, step=20, state="x"),
        step(21, 1003, seconds=1.0, seconds_left=99.5),
    )
    layout.state(20).mkdir()
    found = read_status(layout.root, now=START + timedelta(seconds=1010))
    assert (found.state, found.reason, found.step, found.steps) == ("running", "", 21, 40)
    assert (found.variant, found.method, found.saved_step) == ("t2v-a14b", "lora", 20)
    assert found.seconds == 33 and found.seconds_left == 99.5
    assert found.started == START and found.updated == START + timedelta(seconds=1003)
    high, low = found.experts["high"], found.experts["low"]
    assert (high.step, high.steps, low.step, low.steps) == (11, 20, 10, 20)
    assert high.loss == (21 + sum(range(5, 22, 2))) / 10  # of 21, twice, and 19 to 5
    assert low.loss == sum(range(2, 21, 2)) / 10
    assert high.validation is None
    assert low.validation is not None and low.validation.loss == 0.75
    later = read_status(layout.root, now=START + timedelta(seconds=1400))
    assert later.state == "silent" and "7 min old; its process on elsewhere" in later.reason
    assert later.seconds_left is None


@pytest.mark.parametrize(
    ("last", "state", "reason", "done"),
    [
        (line("finished", 9, step=40), "finished", "", 40),
        (line("stopped", 9, step=7), "stopped", "", 7),
        (line("failed", 9, error="no room\nsecond line"), "failed", "no room", 1),
    ],
)
def test_the_last_event_says_how_a_run_ended(
    tmp_path: Path, last: str, state: str, reason: str, done: int
) -> None:
    layout = run_folder(tmp_path / "fox", started(0), step(1, 5), last)
    found = read_status(layout.root)
    assert (found.state, found.reason, found.step) == (state, reason, done)
    assert found.seconds == 9 and not found.problems


def test_a_process_that_no_longer_exists_was_killed(tmp_path: Path) -> None:
    layout = run_folder(tmp_path / "fox", started(0), step(1, 5))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    now = START + timedelta(seconds=6)
    for pid, host, state in (
        (ended.pid, socket.gethostname(), "killed"),
        (os.getpid(), socket.gethostname(), "running"),
        (ended.pid, "elsewhere", "running"),
    ):
        holder = layout.lock.with_name(f"{layout.lock.name}.json")
        holder.write_text(json.dumps({"process": pid, "host": host, "since": "now"}))
        assert read_status(layout.root, now=now).state == state


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e308", "1" + "0" * 400, "true", '"x"'])
def test_numbers_and_times_that_can_not_be_are_not_believed(tmp_path: Path, number: str) -> None:
    damaged = step(8, 10, loss="?", seconds_left="?").replace('"?"', number)
    ancient = line("note", 12, text="").replace("2026", "0001")
    layout = run_folder(tmp_path / "runs" / "fox", started(0), step(7, 5), damaged, ancient)
    status = read_status(layout.root, now=START)
    assert status.experts["high"].loss == 7 and status.experts["low"].loss is None
    assert status.seconds_left is None and status.updated is None
    assert kind_text(status).startswith("t2v-a14b, lora; started 2026-01-0")


def test_folders_of_other_versions_and_damaged_ones_are_told_as_far_as_they_can_be_read(
    tmp_path: Path,
) -> None:
    layout = run_folder(tmp_path / "fox", started(0), step(1, 5), line("finished", 9, step=40))
    text = layout.resolved.read_text(encoding="utf-8")
    layout.resolved.write_text(f"of_the_future: 1\n{text}", encoding="utf-8")
    found = read_status(layout.root)
    assert (found.variant, found.method, found.steps) == ("t2v-a14b", "lora", 40)
    assert found.experts["high"].loss == 1 and found.experts["high"].step is None
    (problem,) = found.problems
    assert problem == "resolved.yaml: can't be read by this version (of_the_future: unknown field)"
    layout.resolved.write_bytes(b"\x00: [")
    found = read_status(layout.root)
    assert found.variant is None and found.steps == 40 and len(found.problems) == 1
    layout.resolved.unlink()
    layout.events.write_text('{"event": "step"}\n{"event": 5, "time": []}\n[]\n{"st', "ascii")
    layout.state(12).mkdir()
    found = read_status(layout.root)
    assert found.step == 12 and found.started is None
    assert found.problems == (
        "resolved.yaml: is missing",
        "events.jsonl: says of no process that it started",
    )
    layout.events.unlink()
    assert read_status(layout.root).state == "not started"


def test_a_run_of_100_000_steps_is_read_at_once(tmp_path: Path) -> None:
    fields = dict.fromkeys("abcdefghijkl", 0.123456789)
    two = step(11, 1, **fields) + step(22, 2, **fields)
    layout = run_folder(tmp_path / "fox", started(0), settings="train.steps=100000")
    with layout.events.open("a", encoding="ascii") as file:
        for n in range(1, 100_000, 2):
            file.write(two.replace("11,", f"{n},").replace("22,", f"{n + 1},"))
    assert layout.events.stat().st_size > 25_000_000
    begin = time.process_time()
    found = read_status(layout.root)
    assert time.process_time() - begin < 0.5
    assert found.step == 100_000 and found.experts["low"].loss == 99_991


# --------------------------------------------------------------------------------- the command


def test_runs_are_listed_with_the_newest_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    run_folder(runs / "old", started(0), step(1, 5), line("finished", 9, step=40))
    run_folder(
        runs / "new",
        started(50),
        step(1, 55),
        line("validation", 56, step=1, expert="high", loss=0.9, base=1.0),
        line("failed", 60, error="no room"),
    )
    (runs / "other").mkdir()
    assert main(["runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{Path('runs/new')}: failed, step 1 of 40 (high 1 of 20, low 0 of 20)"
    assert lines[1] == "  no room"
    assert lines[2].startswith("  t2v-a14b, lora; started 2026-01-0")
    assert "ran for 10 s;" in lines[2]
    assert lines[3:5] == [
        "  loss: high 1.0000",
        "  validation: high 0.9000 (step 1, -10.0 % against base)",
    ]
    assert lines[5].startswith(f"{Path('runs/old')}: finished")
    assert main(["runs", str(tmp_path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [Path(run["run"]).name for run in data["runs"]] == ["new", "old"]
    assert data["runs"][0]["experts"]["high"]["validation"]["base"] == 1.0
    assert data["unreadable"] == {}
    assert main(["runs", str(runs / "other")]) == 0
    assert capsys.readouterr().out == f"{runs / 'other'}: has no runs\n"
    assert main(["runs", str(runs / "none")]) == 1
    assert "there is no such folder" in capsys.readouterr().err


def test_a_run_is_found_by_its_folder_or_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "runs" / "fox")
    run_folder(tmp_path / "runs" / "hound")
    assert find_run(Path("fox")) == Path("runs/fox")
    assert find_run(tmp_path / "runs" / "fox") == tmp_path / "runs" / "fox"
    assert find_runs(tmp_path) == [tmp_path / "runs" / "fox", tmp_path / "runs" / "hound"]
    with pytest.raises(OnewanError, match=r"foxx: there is no such run; there are .*fox"):
        find_run(Path("foxx"))
    with pytest.raises(OnewanError, match=r"runs: is not the folder of a run; there are .*hound"):
        find_run(Path("runs"))
    monkeypatch.chdir(tmp_path / "runs" / "fox" / "state")
    with pytest.raises(OnewanError, match="give a run's folder, such as runs/NAME"):
        find_run(Path("foxx"))


def test_a_request_names_what_is_possible_with_a_run_that_has_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    layout = run_folder(tmp_path / "runs" / "fox", started(0), line("finished", 9, step=40))
    assert main(["stop", "fox"]) == 1
    assert f"onewan train {Path('runs/fox')} --again" in capsys.readouterr().err
    layout.events.write_text(started(0) + line("stopped", 9, step=3), "ascii")
    assert main(["save", "fox"]) == 1
    assert "--resume" in capsys.readouterr().err
    layout.events.unlink()
    assert main(["sample-now", "fox"]) == 1
    assert (
        f"is not running; start it with: onewan train {Path('runs/fox')}" in capsys.readouterr().err
    )
    assert list(layout.control_dir.iterdir()) == []
