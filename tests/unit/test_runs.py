"""The run folder: its names, and requests to a running trainer."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path, PurePosixPath

import pytest

from onewan.errors import OnewanError
from onewan.runs.control import StopSignals, clear, pending, request, take
from onewan.runs.layout import RunLayout, displayed

# ---------------------------------------------------------------------------------------- layout


def test_files_in_a_run_folder_have_the_promised_names(tmp_path: Path) -> None:
    run = RunLayout(tmp_path / "fox")
    names = {
        run.run_file: "run.yaml",
        run.resolved: "resolved.yaml",
        run.events: "events.jsonl",
        run.log: "log.txt",
        run.tensorboard: "tensorboard",
        run.wandb: "wandb",
        run.state(500): "state/000500",
        run.state(1_234_567): "state/1234567",
        run.weights(500): "weights/fox_000500.safetensors",
        run.weights(500, "_high_noise"): "weights/fox_000500_high_noise.safetensors",
        run.weights(
            500, "_low_noise", "comfyui"
        ): "weights/fox_000500_low_noise_comfyui.safetensors",
        run.weights(500, "", "diffusers", ext=""): "weights/fox_000500_diffusers",
        run.weights("best", "_low_noise"): "weights/fox_best_low_noise.safetensors",
        run.samples(0): "samples/000000",
        run.control_dir: "control",
    }
    for path, name in names.items():
        assert PurePosixPath(path.relative_to(run.root).as_posix()) == PurePosixPath(name)


def test_create_makes_the_folders_and_keeps_existing_ones(tmp_path: Path) -> None:
    run = RunLayout(tmp_path / "runs" / "fox")
    run.create()
    run.state(3).mkdir()
    run.create()
    assert run.state(3).is_dir()
    assert all(f.is_dir() for f in (run.weights_dir, run.samples_dir, run.control_dir))


def test_saved_steps_are_the_complete_ones_in_order(tmp_path: Path) -> None:
    run = RunLayout(tmp_path)
    assert run.saved_steps() == []
    run.create()
    for name in ("001000", "000500", "1000000", "000700.tmp-1", ".000800", "500", "0000900"):
        (run.states_dir / name).mkdir()
    (run.states_dir / "000600").write_text("a file is not a state")
    assert run.saved_steps() == [500, 1000, 1_000_000]


@pytest.mark.parametrize("name", ["fox", "v1.2 a dog", "run_000100", "000100", "x_high_noise", "_"])
def test_exports_are_found_by_their_step_whatever_the_name_of_the_run(
    tmp_path: Path, name: str
) -> None:
    run = RunLayout(tmp_path / name)
    run.create()
    for step in (250, 1_000_000):
        # An embedding may be named by digits too.
        for suffix in ("_high_noise", "_low_noise_ema", "_000300"):
            run.weights(step, suffix).touch()
        run.weights(step, "", "diffusers", ext="").mkdir()
    run.weights("best", "_high_noise").touch()
    run.weights("best", ext="").mkdir()
    (run.weights_dir / f".tmp-0-0-0-{name}_000400.safetensors").touch()
    (run.weights_dir / "notes.txt").touch()
    found = run.exported()
    assert list(found) == [250, 1_000_000]
    assert {path.name.removeprefix(f"{name}_000250") for path in found[250]} == {
        *("_high_noise.safetensors", "_low_noise_ema.safetensors", "_000300.safetensors"),
        "_diffusers",
    }


@pytest.mark.parametrize("former", ["fox_000250", "run_000100_000250", "000250"])
def test_exports_of_before_the_run_was_renamed_are_found(tmp_path: Path, former: str) -> None:
    run = RunLayout(tmp_path / "wolf")
    run.create()
    (run.weights_dir / f"{former}_high_noise.safetensors").touch()
    (run.weights_dir / f"{former}_best_high_noise.safetensors").touch()
    assert [path.name for path in run.exported()[250]] == [f"{former}_high_noise.safetensors"]


def test_the_name_of_a_run_is_that_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunLayout(Path("runs/fox")).name == "fox"
    assert RunLayout(Path()).name == tmp_path.name


def test_paths_are_displayed_relative_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert displayed(tmp_path / "runs" / "fox") == Path("runs/fox")
    assert displayed(Path("runs/fox")) == Path("runs/fox")
    assert displayed(tmp_path.parent / "other") == tmp_path.parent / "other"


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


STOPPING = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


@pytest.mark.parametrize("number", STOPPING)
def test_the_first_signal_sets_the_request_and_handlers_are_restored(
    number: signal.Signals,
) -> None:
    started_with = signal.getsignal(number)
    if started_with is signal.SIG_IGN:  # a hangup, for tests that were started under `nohup`
        signal.signal(number, signal.SIG_DFL)
    try:
        before = signal.getsignal(number)
        with StopSignals() as stop:
            assert not stop.requested
            _send(number)
            assert stop.requested
        assert signal.getsignal(number) is before
    finally:
        signal.signal(number, started_with)


def test_a_second_ctrl_c_raises_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopSignals() as stop:
        _send(signal.SIGTERM)
        _send(signal.SIGINT)  # the first Ctrl-C only requests a stop
        assert stop.requested
        _send(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            _send(signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_no_handler_is_installed() -> None:
    before = signal.getsignal(signal.SIGINT)
    inside: list[object] = []

    def enter() -> None:
        with StopSignals() as stop:
            inside.extend((signal.getsignal(signal.SIGINT), stop.requested))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert inside == [before, False]
