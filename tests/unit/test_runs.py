"""The run folder: its names, its events, and requests to a running trainer."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from pathlib import Path, PurePosixPath

import pytest

from onewan.errors import OnewanError
from onewan.runs.control import StopSignals, clear, pending, request, take
from onewan.runs.events import EventLog, follow, read_events
from onewan.runs.layout import RunLayout

POLL = 0.01


# ---------------------------------------------------------------------------------------- layout


def test_names_in_a_run_folder(tmp_path: Path) -> None:
    run = RunLayout(tmp_path / "fox")
    names = {
        run.run_file: "run.yaml",
        run.resolved: "resolved.yaml",
        run.events: "events.jsonl",
        run.log: "log.txt",
        run.tensorboard: "tensorboard",
        run.state(500): "state/000500",
        run.state(1_234_567): "state/1234567",
        run.weights(500): "weights/000500.safetensors",
        run.weights(500, "_high_noise"): "weights/000500_high_noise.safetensors",
        run.weights(500, "_low_noise", "comfyui"): "weights/000500_low_noise_comfyui.safetensors",
        run.weights(500, "", "diffusers", ext=""): "weights/000500_diffusers",
        run.samples(0): "samples/000000",
        run.control_dir: "control",
    }
    for path, name in names.items():
        assert PurePosixPath(path.relative_to(run.root).as_posix()) == PurePosixPath(name)


def test_create_makes_the_folders_and_keeps_what_is_there(tmp_path: Path) -> None:
    run = RunLayout(tmp_path / "runs" / "fox")
    run.create()
    run.state(3).mkdir()
    run.create()
    assert run.state(3).is_dir()
    assert all(f.is_dir() for f in (run.weights_dir, run.samples_dir, run.control_dir))


def test_saved_steps_are_the_finished_ones_in_order(tmp_path: Path) -> None:
    run = RunLayout(tmp_path)
    assert run.saved_steps() == []
    run.create()
    for name in ("001000", "000500", "1000000", "000700.tmp-1", ".000800", "500", "0000900"):
        (run.states_dir / name).mkdir()
    (run.states_dir / "000600").write_text("a file is no state")
    assert run.saved_steps() == [500, 1000, 1_000_000]


# ---------------------------------------------------------------------------------------- events


def test_an_event_is_one_line_with_its_name_and_time_first(tmp_path: Path) -> None:
    path = tmp_path / "new" / "events.jsonl"
    with EventLog(path) as log:
        log.write("step", step=1, loss=0.25, expert="high")
        assert len(path.read_text().splitlines()) == 1  # before the log is closed
    event = json.loads(path.read_text())
    assert list(event) == ["event", "time", "step", "loss", "expert"]
    stamp = event["time"]
    assert stamp.endswith("Z")
    assert len(stamp) == len("2026-08-24T12:00:00.000Z")


def test_every_line_is_valid_json(tmp_path: Path) -> None:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.write(
            "odd",
            loss=math.nan,
            norms=(1.5, math.inf, [-math.inf]),
            file=tmp_path / "\N{SNOWMAN}\n\udcff",
            nested={"a": {1: None}},
            flag=True,
        )
    (line,) = path.read_bytes().splitlines()
    event = json.loads(line, parse_constant=no_constant)
    assert event["loss"] is None
    assert event["norms"] == [1.5, None, [None]]
    assert event["file"] == str(tmp_path / "\N{SNOWMAN}\n\udcff")
    assert event["nested"] == {"a": {"1": None}}
    assert event["flag"] is True


def test_numpy_numbers_are_numbers(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.write("step", step=np.int64(3), loss=np.float32(0.5), bad=np.float32("nan"))
    (event,) = read_events(path)
    assert (event["step"], event["loss"], event["bad"]) == (3, 0.5, None)


def test_what_is_no_json_is_refused_and_leaves_no_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        with pytest.raises(TypeError, match="'thing': object has no form in JSON"):
            log.write("step", thing=object())
        with pytest.raises(TypeError, match="'time' is given by the log"):
            log.write("step", time=3)
    assert path.read_bytes() == b""


def test_a_line_cut_by_a_crash_is_not_glued_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "start"}\n{"event": "st')
    assert [e["event"] for e in read_events(path)] == ["start"]
    for name in ("resume", "step"):
        with EventLog(path) as log:
            log.write(name)
    assert [e["event"] for e in read_events(path)] == ["start", "resume", "step"]
    assert len(path.read_bytes().splitlines()) == 4  # one newline was put in, not two


def test_an_unfinished_last_line_is_left_for_later(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert list(read_events(path)) == []
    path.write_bytes(b'{"event": "a"}\n{"event": "b"}')
    assert [e["event"] for e in read_events(path)] == ["a"]


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:

        def write(worker: int) -> None:
            for number in range(200):
                log.write("step", worker=worker, number=number, text="x" * 500)

        threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    events = list(read_events(path))
    assert len(path.read_bytes().splitlines()) == len(events) == 800
    for worker in range(4):
        assert [e["number"] for e in events if e["worker"] == worker] == list(range(200))


def _collect(path: Path, stop: threading.Event) -> tuple[threading.Thread, list[str]]:
    seen: list[str] = []

    def read() -> None:
        for event in follow(path, stop, poll=POLL):
            seen.append(event["event"])  # noqa: PERF401  (seen as they come)

    thread = threading.Thread(target=read)
    thread.start()
    return thread, seen


def _wait_for(seen: list[str], names: list[str]) -> None:
    deadline = time.monotonic() + 10
    while seen != names and time.monotonic() < deadline:
        time.sleep(POLL)
    assert seen == names


def test_follow_waits_for_the_file_and_yields_events_as_they_come(tmp_path: Path) -> None:
    path, stop = tmp_path / "events.jsonl", threading.Event()
    thread, seen = _collect(path, stop)
    try:
        with path.open("ab", buffering=0) as file:
            file.write(b'{"event": "a"}\n{"event":')
            _wait_for(seen, ["a"])
            file.write(b' "b"}\n')
            _wait_for(seen, ["a", "b"])
        path.write_bytes(b'{"event": "again"}\n')  # shorter: the run was started anew
        _wait_for(seen, ["a", "b", "again"])
    finally:
        stop.set()
        thread.join(10)
    assert not thread.is_alive()


def test_follow_yields_all_that_was_written_before_the_stop(tmp_path: Path) -> None:
    path, stop = tmp_path / "events.jsonl", threading.Event()
    with EventLog(path) as log:
        for _ in range(3):
            log.write("step")
    stop.set()
    assert len(list(follow(path, stop, poll=POLL))) == 3


# --------------------------------------------------------------------------------------- control


def test_a_request_is_pending_until_it_is_taken(tmp_path: Path) -> None:
    run = RunLayout(tmp_path / "fox")
    run.create()
    run.resolved.touch()
    assert not pending(run, "save")
    request(run, "save")
    request(run, "save")
    assert pending(run, "save")
    assert not pending(run, "stop")
    clear(run, "save")
    clear(run, "save")
    assert not pending(run, "save")
    request(run, "save")
    assert take(run, "save")
    assert not take(run, "save")


def test_a_request_to_a_folder_that_is_not_a_run_is_refused_and_creates_nothing(
    tmp_path: Path,
) -> None:
    run = RunLayout(tmp_path / "fix")
    with pytest.raises(OnewanError, match="fix: does not exist; give a run's folder"):
        request(run, "stop")
    assert not run.root.exists()
    run.root.mkdir()
    with pytest.raises(OnewanError, match="fix: is not the folder of a run"):
        request(run, "stop")
    assert list(run.root.iterdir()) == []


def _send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert not stop.requested
        _send(number)
        assert stop.requested
    assert signal.getsignal(number) is before


def test_a_second_interrupt_is_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopSignals() as stop:
        _send(signal.SIGTERM)
        _send(signal.SIGINT)  # the first of its kind
        assert stop.requested
        _send(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_leaves_the_handlers_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    inside: list[object] = []

    def enter() -> None:
        with StopSignals() as stop:
            inside.extend((signal.getsignal(signal.SIGINT), stop.requested))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert inside == [before, False]
