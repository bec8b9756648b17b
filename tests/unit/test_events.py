"""Events: their form in the file, their delivery to sinks, and sinks that fail."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import logging
import math
import os
import shutil
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from onewan.config.changes import CHANGEABLE
from onewan.media.write import write_video
from onewan.runs import events
from onewan.runs.event_file import (
    EventFile,
    EventTail,
    HeartbeatThread,
    follow,
    last_event,
    read_events,
)
from onewan.runs.events import (
    Encoding,
    Event,
    Note,
    ProgressEvent,
    Sampled,
    Saved,
    StepDone,
    Validated,
    Warned,
)
from onewan.runs.log import FileSink, ListenerSink, ProgressThrottle, RunLog, TextSink, text_log
from onewan.train.tensorboard import TensorBoardSink

POLL = 0.01
EVENT_CLASSES = [
    item
    for item in vars(events).values()
    if isinstance(item, type) and issubclass(item, Event) and item not in (Event, ProgressEvent)
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Odd(Event):
    """An event of the tests, with any value."""

    kind: ClassVar[str] = "odd"
    value: object = None


def step(number: int, loss: float = 0.5) -> StepDone:
    return StepDone(
        step=number, expert="high", loss=loss, grad_norm=1.0, lr=1e-4, t=(0.9,), seconds=0.1
    )


def kinds(path: Path) -> list[str]:
    return [event["event"] for event in read_events(path)]


# ------------------------------------------------------------------------------------- event file


def test_an_event_is_one_line_with_its_name_and_time_first(tmp_path: Path) -> None:
    path = tmp_path / "new" / "events.jsonl"
    with EventFile(path) as file:
        file.write(Saved(step=1, state=tmp_path))
        assert len(path.read_text().splitlines()) == 1  # before the file is closed
    event = json.loads(path.read_text())
    assert list(event) == ["event", "time", "step", "state"]
    assert event["event"] == "saved"
    stamp = event["time"]
    assert stamp.endswith("Z")
    assert len(stamp) == len("2026-08-24T12:00:00.000Z")


def test_every_line_is_valid_json(tmp_path: Path) -> None:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    path = tmp_path / "events.jsonl"
    with EventFile(path) as file:
        value = {
            "loss": math.nan,
            "norms": (1.5, math.inf, [-math.inf]),
            "file": tmp_path / "\N{SNOWMAN}\n\udcff",
            "nested": {"a": {1: None}},
            "flag": True,
        }
        file.write(Odd(value=value))
    (line,) = path.read_bytes().splitlines()
    event = json.loads(line, parse_constant=no_constant)["value"]
    assert event["loss"] is None
    assert event["norms"] == [1.5, None, [None]]
    assert event["file"] == str(tmp_path / "\N{SNOWMAN}\n\udcff")
    assert event["nested"] == {"a": {"1": None}}
    assert event["flag"] is True


def test_numpy_scalars_are_written_as_numbers(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    path = tmp_path / "events.jsonl"
    with EventFile(path) as file:
        file.write(Odd(value=[np.int64(3), np.float32(0.5), np.float32("nan")]))
    (event,) = read_events(path)
    assert event["value"] == [3, 0.5, None]


def test_a_value_without_a_json_form_is_refused_and_leaves_no_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventFile(path) as file, pytest.raises(TypeError, match="'value': object can't be"):
        file.write(Odd(value=object()))
    assert path.read_bytes() == b""


def test_every_event_has_its_own_kind_and_no_field_that_the_file_adds() -> None:
    assert len(EVENT_CLASSES) > 15
    assert len({cls.kind for cls in EVENT_CLASSES}) == len(EVENT_CLASSES)
    for cls in EVENT_CLASSES:
        assert {field.name for field in dataclasses.fields(cls)}.isdisjoint({"event", "time"})


def test_step_events_have_the_promised_fields(tmp_path: Path) -> None:
    with EventFile(tmp_path / "events.jsonl") as file:
        file.write(step(3))
    (event,) = read_events(tmp_path / "events.jsonl")
    assert {"event", "time", "step", "expert", "loss", "lr", "seconds"} <= event.keys()
    for name in (
        "memory_allocated",
        "memory_peak",
        "step_memory_peak",
        "bytes_to_device",
        "tokens_per_second",
        "tflops",
        "mfu",
    ):
        assert event[name] is None


def test_started_identifies_the_process_and_the_schema(tmp_path: Path) -> None:
    with EventFile(tmp_path / "events.jsonl") as file:
        file.write(events.Started(run=tmp_path, steps=7))
    (event,) = read_events(tmp_path / "events.jsonl")
    assert (event["pid"], event["hostname"]) == (os.getpid(), socket.gethostname())
    assert event["schema_version"] == events.SCHEMA_VERSION
    assert event["heartbeat_seconds"] == events.HEARTBEAT_SECONDS


def test_a_line_truncated_by_a_crash_is_not_joined_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "start"}\n{"event": "st')
    assert [e["event"] for e in read_events(path)] == ["start"]
    for event in (Note(text="a"), Warned(text="b")):
        with EventFile(path) as file:
            file.write(event)
    assert [e["event"] for e in read_events(path)] == ["start", "note", "warning"]
    assert len(path.read_bytes().splitlines()) == 4  # one newline was added, not two


def test_damaged_lines_are_named_and_skipped(tmp_path: Path) -> None:
    path, damaged = tmp_path / "events.jsonl", list[int]()
    path.write_bytes(b'{"event": "a"}\n\xff\x00\n\n[1]\n{"event": "b"}\n{"event": "c"')
    assert [e["event"] for e in read_events(path, damaged.append)] == ["a", "b"]
    assert damaged == [2, 4]  # an empty line ends one that was truncated; the last is not complete


def test_an_incomplete_last_line_is_not_read_yet(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert list(read_events(path)) == []
    path.write_bytes(b'{"event": "a"}\n{"event": "b"}')
    assert [e["event"] for e in read_events(path)] == ["a"]


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventFile(path) as file:

        def write(worker: int) -> None:
            for number in range(200):
                file.write(Odd(value=[worker, number, "x" * 500]))

        threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = list(read_events(path))
    assert len(path.read_bytes().splitlines()) == len(found) == 800
    for worker in range(4):
        assert [e["value"][1] for e in found if e["value"][0] == worker] == list(range(200))


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
        path.write_bytes(b'{"event": "again"}\n')  # shorter: a new run
        _wait_for(seen, ["a", "b", "again"])
    finally:
        stop.set()
        thread.join(10)
    assert not thread.is_alive()


def test_a_tail_gives_each_event_once_and_numbers_damaged_lines(tmp_path: Path) -> None:
    path, damaged = tmp_path / "events.jsonl", list[int]()
    tail = EventTail(path, damaged.append)
    assert [*tail.read()] == []
    path.write_bytes(b'{"event": "a"}\n{"event": "b"}\n{"eve')
    assert next(tail.read()) == {"event": "a"}  # a reader may stop in between
    assert [*tail.read()] == [{"event": "b"}]
    with path.open("ab") as file:
        file.write(b'\n{"event": "c"}\n')  # a crash had cut the line off
    assert [*tail.read()] == [{"event": "c"}] and damaged == [3]
    assert [*tail.read()] == []


@pytest.mark.parametrize("again", [b'{"event": "x"}\n', b'{"event": "x", "why": "longer"}\n' * 9])
def test_a_tail_starts_anew_with_a_file_that_was_replaced(tmp_path: Path, again: bytes) -> None:
    path, restarts = tmp_path / "events.jsonl", list[int]()
    tail = EventTail(path, on_restart=lambda: restarts.append(1))
    path.write_bytes(b'{"event": "a"}\n{"event": "b"}\n')
    assert len([*tail.read()]) == 2
    path.write_bytes(again)
    assert next(tail.read())["event"] == "x" and len(restarts) == 1
    path.unlink()
    assert [*tail.read()] == [] and len(restarts) == 2
    assert [*tail.read()] == [] and len(restarts) == 2


def test_follow_yields_everything_written_before_the_stop(tmp_path: Path) -> None:
    path, stop = tmp_path / "events.jsonl", threading.Event()
    with EventFile(path) as file:
        for number in range(3):
            file.write(step(number))
    stop.set()
    assert len(list(follow(path, stop, poll=POLL))) == 3


def test_the_last_event_is_found_from_the_end_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert last_event(path) is None
    with EventFile(path) as file:
        for number in range(1000):
            file.write(step(number))
    with path.open("ab") as raw:
        raw.write(b'{"event": "trunc')
    found = last_event(path)
    assert found is not None and found["step"] == 999
    with EventFile(path) as file:
        file.write(Odd(value="x" * 200_000))  # longer than the part that is read first
    found = last_event(path)
    assert found is not None and found["event"] == "odd"


def test_heartbeats_are_written_only_without_other_events(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventFile(path) as file, HeartbeatThread(file, seconds=0.3):
        for number in range(20):
            file.write(step(number))
            time.sleep(0.02)
        busy = kinds(path).count("heartbeat")
        deadline = time.monotonic() + 10
        while kinds(path).count("heartbeat") < busy + 2 and time.monotonic() < deadline:
            time.sleep(POLL)
    found = [event for event in read_events(path) if event["event"] == "heartbeat"]
    assert busy <= 1 and len(found) >= busy + 2  # one, if the machine paused the loop above
    assert (found[-1]["pid"], found[-1]["hostname"]) == (os.getpid(), socket.gethostname())


# ------------------------------------------------------------------------------------------- sinks


def test_a_listener_that_raises_is_reported_once_and_dropped(tmp_path: Path) -> None:
    received: list[Event] = []
    calls: list[Event] = []

    def broken(event: Event) -> None:
        calls.append(event)
        raise RuntimeError("no terminal")

    file = EventFile(tmp_path / "events.jsonl")
    log = RunLog(ListenerSink(broken), FileSink(file), ListenerSink(received.append))
    for number in range(3):
        log.emit(step(number))
    log.close()
    assert len(calls) == 1
    warnings = [event.text for event in received if isinstance(event, Warned)]
    assert len(warnings) == 1 and "no terminal" in warnings[0]
    assert [event.step for event in received if isinstance(event, StepDone)] == [0, 1, 2]
    assert kinds(tmp_path / "events.jsonl") == ["step", "warning", "step", "step"]


def test_a_deleted_tensorboard_folder_is_reported_once_and_training_continues(
    tmp_path: Path,
) -> None:
    before = set(threading.enumerate())
    received: list[Event] = []
    log = RunLog(TensorBoardSink(tmp_path / "tensorboard", 0), ListenerSink(received.append))
    log.emit(step(0))
    shutil.rmtree(tmp_path / "tensorboard")
    for number in range(1, 100):
        log.emit(step(number))
    log.close()
    warnings = [event.text for event in received if isinstance(event, Warned)]
    assert len(warnings) == 1 and warnings[0].startswith("TensorBoard: failed")
    assert [event.step for event in received if isinstance(event, StepDone)] == list(range(100))
    assert not (tmp_path / "tensorboard").exists()
    assert set(threading.enumerate()) <= before


def test_tensorboard_reads_the_curves_and_a_resumed_run_replaces_repeated_steps(
    tmp_path: Path,
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed, steps in ((0, range(1, 6)), (3, range(4, 8))):
        log = RunLog(TensorBoardSink(tmp_path, resumed))
        for number in steps:
            log.emit(step(number))
        log.emit(Saved(step=steps[-1], state=tmp_path))
        # What is written can be read at once, while the run goes on.
        curves = EventAccumulator(str(tmp_path)).Reload()
        assert curves.Scalars("loss/high")[-1].step == steps[-1]
        log.close()
    assert len(list(tmp_path.iterdir())) == 2
    assert [scalar.step for scalar in curves.Scalars("loss/high")] == list(range(1, 8))
    assert curves.Scalars("lr/high")[0].value == pytest.approx(step(1).lr)
    (histogram,) = curves.Histograms("t/high")
    assert histogram.step == 7 and histogram.histogram_value.num == 4 * len(step(1).t)


def test_tensorboard_has_frames_of_samples_and_validation_against_the_base(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # Four seconds, from black to white, so that the order of the frames is visible.
    levels = np.linspace(0, 255, 33).round().astype(np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (33, 320, 480, 3))
    video = tmp_path / "samples" / "000002" / "1.mp4"
    video.parent.mkdir(parents=True)
    write_video(video, np.ascontiguousarray(frames), fps=8)
    image = tmp_path / "samples" / "000002" / "2.mp4"
    write_video(image, np.ascontiguousarray(frames[:1]), fps=8)
    log = RunLog(TensorBoardSink(tmp_path / "tensorboard", 0))
    log.emit(step(2))
    for file in (video, image):
        log.emit(Sampled(step=2, file=file, prompt="a fox"))
    log.emit(Validated(step=2, expert="low", loss=0.9, ema=0.8, base=1.0, held_out=True))
    log.emit(Validated(step=2, expert="high", loss=0.9, ema=None, base=None, held_out=True))
    log.close()
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert curves.Tags()["images"] == ["samples/1", "samples/2"]
    (shown,) = curves.Images("samples/1")
    assert (shown.step, shown.width, shown.height) == (2, 4 * 384, 256)
    pixels = np.asarray(Image.open(io.BytesIO(shown.encoded_image_string)).convert("RGB"))
    parts = [part.mean() for part in np.split(pixels, 4, axis=1)]
    assert parts == pytest.approx([0, 85, 170, 255], abs=6)
    (still,) = curves.Images("samples/2")
    assert (still.width, still.height) == (384, 256)
    assert curves.Scalars("seconds/high")[0].value == pytest.approx(step(2).seconds)
    percent = "validation_percent_against_base"
    assert curves.Scalars(f"{percent}/low")[0].value == pytest.approx(-10)
    assert f"{percent}/high" not in curves.Tags()["scalars"]


def test_a_tensorboard_folder_that_can_not_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file, not a folder", encoding="utf-8")
    received: list[Event] = []
    log = RunLog(TensorBoardSink(tmp_path / "tensorboard", 0), ListenerSink(received.append))
    log.emit(step(1))
    log.emit(step(2))
    log.close()
    assert [event.kind for event in received] == ["step", "warning", "step"]


def test_a_deleted_event_file_is_reported_and_created_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    received: list[Event] = []
    log = RunLog(FileSink(EventFile(folder / "events.jsonl")), ListenerSink(received.append))
    log.emit(step(1))
    shutil.rmtree(folder)
    log.emit(step(2))
    log.emit(step(3))
    log.close()
    first, second = (event.text for event in received if isinstance(event, Warned))
    assert "deleted or replaced" in first and "1 event is missing" in second
    assert [e.step for e in received if isinstance(e, StepDone)] == [1, 2, 3]
    assert kinds(folder / "events.jsonl") == ["warning", "warning", "step"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_reported_once_and_events_are_written_again_when_there_is_room(
    tmp_path: Path,
) -> None:
    path = tmp_path / "events.jsonl"
    path.symlink_to("/dev/full")
    received: list[Event] = []
    log = RunLog(FileSink(EventFile(path)), ListenerSink(received.append))
    for number in range(3):
        log.emit(step(number))
    (full,) = (event.text for event in received if isinstance(event, Warned))
    assert os.strerror(errno.ENOSPC) in full
    path.unlink()  # there is room again
    log.emit(step(3))
    log.close()
    assert kinds(path) == ["step", "warning"]
    last = received[-1]
    # Three steps, and the warning about the first of them.
    assert isinstance(last, Warned) and "4 events are missing" in last.text


def test_a_failing_sink_is_also_reported_in_the_text_log(tmp_path: Path) -> None:
    def broken(event: Event) -> None:
        raise RuntimeError(f"no terminal for {event.kind}")

    with text_log(tmp_path / "log.txt"):
        RunLog(ListenerSink(broken), TextSink()).emit(step(1))
    assert "no terminal for step" in (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert not logging.getLogger("onewan").handlers


def test_the_text_log_is_created_again_and_one_that_can_not_be_written_says_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    logger = logging.getLogger("onewan")
    with text_log(folder / "log.txt"):
        (folder / "log.txt").unlink()
        logger.warning("first")
        assert "first" in (folder / "log.txt").read_text(encoding="utf-8")
        shutil.rmtree(folder)
        logger.warning("second")
        folder.mkdir()
        logger.warning("third")
        assert "third" in (folder / "log.txt").read_text(encoding="utf-8")
    if Path("/dev/full").exists():
        with text_log(Path("/dev/full")):
            logger.warning("the disk is full")
    assert capfd.readouterr() == ("", "")


def test_a_warning_is_given_once_for_the_files_of_many_steps() -> None:
    received: list[Event] = []
    log = RunLog(ListenerSink(received.append))
    for number in (100, 200):
        log.warn_once("2 weights are not expressible", prefix=f"{number}.safetensors: ")
    assert [e.text for e in received if isinstance(e, Warned)] == [
        "100.safetensors: 2 weights are not expressible"
    ]


def test_ten_thousand_clips_are_few_lines_in_the_file_and_all_reach_the_listener(
    tmp_path: Path,
) -> None:
    path = tmp_path / "events.jsonl"
    received: list[Event] = []
    log = RunLog(FileSink(EventFile(path)), ListenerSink(received.append))
    for done in range(1, 10_001):
        log.emit(Encoding(what="encoding clips", done=done, total=10_000))
    log.close()
    assert len(received) == 10_000
    found = list(read_events(path))
    assert 2 <= len(found) < 100
    assert (found[0]["done"], found[-1]["done"]) == (1, 10_000)


def test_throttled_progress_has_the_first_the_last_and_one_every_few_seconds() -> None:
    now = 0.0
    throttle = ProgressThrottle(seconds=5, clock=lambda: now)
    passed: list[tuple[str, int]] = []
    for activity in ("captions", "clips"):
        for done in range(1, 13):
            now += 2
            if throttle.lets_pass(Encoding(what=activity, done=done, total=12)):
                passed.append((activity, done))
    expected = [1, 4, 7, 10, 12]
    assert passed == [(what, done) for what in ("captions", "clips") for done in expected]


def test_the_documentation_lists_the_settings_that_can_change() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "run-folder.md").read_text("utf-8")
    settings = text.partition("\n## Settings that change in a run\n")[2].partition("\n## ")[0]
    rows = [row.split(" | ") for row in settings.splitlines() if row.startswith("| `")]
    assert {name.strip("| `"): what.strip(" |") for name, what in rows} == CHANGEABLE


def test_the_documentation_lists_every_event_with_its_fields() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "run-folder.md").read_text("utf-8")
    events = text.partition("\n## Events\n")[2]
    rows = [row.split("|") for row in events.splitlines() if row.startswith("| `")]
    documented = {
        kind.strip(" `"): {name.strip() for name in row[2].split(",")}
        for row in rows
        for kind in row[1].split(",")
    }
    assert documented == {
        cls.kind: {field.name for field in dataclasses.fields(cls)} for cls in EVENT_CLASSES
    }
