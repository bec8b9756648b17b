"""A run whose disk, folders or terminal fail while it goes on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.runs import RunFile, layout_of, recorder, write_run_file

from onewan.config.schema import ResolvedRun
from onewan.errors import CheckpointError
from onewan.runs.control import request
from onewan.runs.event_file import read_events
from onewan.runs.events import Event, StepDone
from onewan.runs.layout import RunLayout
from onewan.train import saving
from onewan.train.trainer import WanTrainer


def train(
    config: ResolvedRun, acts: dict[int, Callable[[RunLayout], None]], *, resume: bool = False
) -> list[dict[str, Any]]:
    """Train, and after step n call what `acts` has for n; returns the events."""
    events: list[dict[str, Any]] = []

    def listen(event: Event) -> None:
        recorder(events)(event)
        if isinstance(event, StepDone) and event.step in acts:
            acts[event.step](layout_of(config))

    trainer = WanTrainer(config, listen=listen, resume=resume)
    with contextlib.suppress(CheckpointError):
        trainer.fit()
    return events


def texts(events: list[dict[str, Any]], kind: str = "warning") -> list[str]:
    return [e["text"] for e in events if e["event"] == kind]


@contextlib.contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Writing fails at this size, with an error of the system, as it does on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_state_that_can_not_be_saved_is_reported_and_tried_again(
    run_file: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(saving, "_RETRY_FACTOR", 0.0)
    config = run_file("ti2v-5b", "train.steps=6", "train.save_every=2", "train.keep_last=9")
    layout = layout_of(config)
    full = contextlib.ExitStack()
    room: list[list[Path]] = []

    def make_room(layout: RunLayout) -> None:
        full.close()
        room.append(sorted(layout.states_dir.iterdir()))

    with full:
        events = train(
            config,
            # From step 4 on; the events are larger than a state may be, and are written before.
            {3: lambda _: full.enter_context(files_limited_to(20_000)), 5: make_room},
        )
    assert [e["step"] for e in events if e["event"] == "saved"] == [2, 5, 6]
    warnings = texts(events)
    (failed,) = [text for text in warnings if "state can't be saved" in text]
    assert str(layout.state(4)) in failed and "the newest saved state is that of step 2" in failed
    assert room == [[layout.state(2)]]  # a failed save keeps no space
    assert any(text.startswith("the weights of step 4 can't be exported") for text in warnings)
    assert events[-1]["event"] == "finished"


def test_a_last_state_that_can_not_be_saved_is_an_error_that_names_the_one_before(
    run_file: RunFile,
) -> None:
    config = run_file("ti2v-5b", "train.steps=4", "train.save_every=2")
    layout = layout_of(config)
    with contextlib.ExitStack() as full:
        events = train(config, {3: lambda _: full.enter_context(files_limited_to(20_000))})
    (failed,) = [e["error"] for e in events if e["event"] == "failed"]
    assert str(layout.state(4)) in failed and "newest saved state is that of step 2" in failed
    assert layout.saved_steps() == [2]
    assert train(config, {}, resume=True)[-1]["event"] == "finished"


def block(path: Path) -> None:
    """Put a file where a folder is due."""
    shutil.rmtree(path)
    path.write_text("in the way")


def test_weights_that_can_not_be_exported_are_exported_on_resume(run_file: RunFile) -> None:
    config = run_file("ti2v-5b", "train.steps=4", "train.save_every=2")
    layout = layout_of(config)
    events = train(config, {1: lambda layout: block(layout.weights_dir)})
    assert len([t for t in texts(events) if "can't be exported" in t]) == 2
    assert layout.saved_steps() == [2, 4]
    (failed,) = [e["error"] for e in events if e["event"] == "failed"]
    assert "training is complete and its state is saved" in failed and "--resume" in failed
    layout.weights_dir.unlink()
    events = train(config, {}, resume=True)
    assert [e["step"] for e in events if e["event"] == "exported"] == [4]
    assert events[-1]["event"] == "finished"


def test_folders_that_are_deleted_or_replaced_do_not_end_the_run(run_file: RunFile) -> None:
    small = {"prompts": "[a]", "frames": 5, "width": 64, "height": 64, "steps": 1, "every": 4}
    config = run_file(
        "ti2v-5b",
        *("train.steps=6", "train.save_every=3", "logging.tensorboard=true"),
        *(f"sample.{key}={value}" for key, value in small.items()),
    )

    def damage(layout: RunLayout) -> None:
        for folder in (layout.control_dir, layout.samples_dir, layout.tensorboard):
            block(folder)
        for folder in (layout.states_dir, layout.weights_dir):
            shutil.rmtree(folder)
        layout.log.unlink()

    events = train(config, {2: damage, 4: lambda layout: layout.samples_dir.unlink()})
    layout = layout_of(config)
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert layout.saved_steps() == [3, 6] and list(layout.exported()) == [3, 6]
    warnings = texts(events)
    assert [text for text in warnings if text.startswith("TensorBoard: failed")]
    assert len(warnings) == 1 and (layout.samples(6) / "0.mp4").is_file()
    assert events[-1]["event"] == "finished"


def test_a_validation_whose_clips_can_not_be_read_does_not_end_the_run(
    run_file: RunFile, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    config = run_file(
        "ti2v-5b",
        *("train.steps=2", "validation={clips: 1, every: 2}"),
        f"video_data.cache_dir={cache}",
    )
    events = train(config, {2: lambda _: shutil.rmtree(cache)})
    assert [text for text in texts(events) if text.startswith("validation failed (")]
    assert layout_of(config).saved_steps() == [2] and events[-1]["event"] == "finished"


def test_the_folder_of_a_running_trainer_may_be_renamed(run_file: RunFile) -> None:
    config = run_file("ti2v-5b", "train.steps=4", "train.save_every=2")
    layout = layout_of(config)
    moved = layout.root.with_name("moved")
    events = train(
        config,
        {1: lambda layout: os.rename(layout.root, moved), 3: lambda again: request(again, "save")},
    )
    (warning,) = [text for text in texts(events) if "deleted or renamed" in text]
    assert str(layout.root) in warning
    # What is written from then on is a complete run, which can be watched, stopped and resumed.
    assert layout.saved_steps() == [3, 4] and layout.run_file.is_file()
    assert [e["step"] for e in read_events(layout.events) if e["event"] == "step"] == [2, 3, 4]
    assert events[-1]["event"] == "finished"


# ------------------------------------------------------------------------------------ the terminal

UNIX = pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")


def train_in_terminal(slave: str, arguments: list[str], ignores_hangup: bool) -> None:
    """The command line in the terminal `slave`, as the session that it belongs to."""
    import fcntl
    import termios

    from onewan.cli import main

    os.setsid()
    handle = os.open(slave, os.O_RDWR)
    fcntl.ioctl(handle, termios.TIOCSCTTY, 0)
    for number in (0, 1, 2):
        os.dup2(handle, number)
    os.close(handle)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    # Not as the tests were started, which may be under `nohup` themselves.
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignores_hangup else signal.SIG_DFL)
    sys.exit(main(arguments))


@UNIX
@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_is_closed_saves_and_stops_the_run_unless_nohup_was_given(
    workshop: Path, tmp_path: Path, nohup: bool
) -> None:
    import pty

    steps = 12 if nohup else 100_000
    overrides = [f"train.steps={steps}", "logging.tensorboard=true"]
    config = write_run_file(workshop, tmp_path, "ti2v-5b", *overrides)
    layout = layout_of(config)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["onewan.train.trainer"])
    master, slave = pty.openpty()
    arguments = ["train", str(tmp_path / "run.yaml"), f"output.dir={tmp_path / 'runs'}", *overrides]
    process = context.Process(target=train_in_terminal, args=(os.ttyname(slave), arguments, nohup))
    process.start()
    try:
        deadline = time.monotonic() + 120
        while not any(e["event"] == "step" for e in read_events(layout.events)):
            assert process.is_alive(), os.read(master, 1 << 16)
            assert time.monotonic() < deadline
            time.sleep(0.01)
        # A terminal that is closed hangs up: its session gets SIGHUP, and writing to it fails.
        os.close(slave)
        os.close(master)
        process.join(120)
    finally:
        process.kill()
    *_, last = read_events(layout.events)
    if nohup:
        assert process.exitcode == 0 and last["event"] == "finished"
        assert layout.saved_steps() == [steps]
        return
    assert process.exitcode == 130 and last["event"] == "stopped"
    assert layout.saved_steps() == [last["step"]] and 0 < last["step"] < steps
    weights = load_file(layout.state(last["step"]) / "single.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    assert "Traceback" not in layout.log.read_text(encoding="utf-8")
