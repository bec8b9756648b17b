"""The progress display without a terminal: which lines a user reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onewan.cli import progress, progress_lines
from onewan.cli.progress import Progress
from onewan.runs.events import (
    AttentionChosen,
    BestWeights,
    DataReady,
    Encoding,
    Event,
    Exported,
    Finished,
    MemoryPlanned,
    Overview,
    Saved,
    StepDone,
    Validated,
)


def lines_of(capsys: pytest.CaptureFixture[str], *shown: Event) -> list[str]:
    display = Progress(terminal=False)
    for event in shown:
        display.listen(event)
    display.close()
    return capsys.readouterr().out.splitlines()


def exported(folder: Path, *names: str) -> list[Event]:
    return [Exported(step=100, expert="high", file=folder / name) for name in names]


def test_paths_are_relative_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "fox"
    assert lines_of(
        capsys,
        Saved(step=100, state=run / "state" / "000100"),
        *exported(run / "weights", "fox_000100.safetensors"),
        Finished(step=100, run=run),
    ) == [
        f"step 100: state saved: {Path('runs/fox/state/000100')}",
        f"step 100: weights exported: {Path('runs/fox/weights/fox_000100.safetensors')}",
        f"done: 100 steps; all results are in {Path('runs/fox')}",
    ]


@pytest.mark.parametrize("ends", [True, False])
def test_the_exported_files_of_a_step_share_a_line(
    ends: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if no event follows them."""
    monkeypatch.chdir(tmp_path)
    names = [f"000100_{e}_noise_{f}.safetensors" for e in ("high", "low") for f in ("a", "b")]
    after = [Finished(step=100, run=tmp_path / "fox")] if ends else []
    first, *_ = lines_of(capsys, *exported(tmp_path / "weights", *names), *after)
    assert first == f"step 100: weights exported: {Path('weights/000100_')}* (4 files)"


def test_the_best_weights_have_a_line_when_they_are_written_and_one_at_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "weights"
    best = folder / "fox_best_high_noise.safetensors"
    assert lines_of(
        capsys,
        *exported(folder, "fox_000100_high_noise.safetensors"),
        Exported(step=100, expert="high", file=best, best_loss=0.25),
        BestWeights(expert="high", file=best, step=100, loss=0.25, base=0.5, held_out=True),
    ) == [
        f"step 100: best weights so far: {Path('weights/fox_best_high_noise.safetensors')}",
        f"step 100: weights exported: {Path('weights/fox_000100_high_noise.safetensors')}",
        f"best by validation on held-out clips: {Path('weights/fox_best_high_noise.safetensors')}, "
        "of step 100, loss 0.2500 (-50.0 % against the base model)",
    ]


def test_a_short_activity_has_one_line_and_a_long_one_a_line_every_few_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [Encoding(what="encoding clips", done=n, total=5) for n in range(1, 6)]
    assert lines_of(capsys, *items) == ["encoding clips 5/5"]
    monkeypatch.setattr(progress, "_PLAIN_SECONDS", 0.0)
    assert lines_of(capsys, *items) == [f"encoding clips {n}/5" for n in range(1, 6)]


def test_a_steps_share_of_the_devices_rate_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    (shown,) = lines_of(
        capsys,
        StepDone(
            step=0,
            expert="low",
            loss=1.0,
            grad_norm=1.0,
            lr=1e-4,
            t=(0.5,),
            seconds=2.0,
            tflops=412.4,
            mfu=0.534,
        ),
    )
    assert "mean loss low 1.0000, 412 TFLOP/s (53 % of the device's), 2.00 s/step" in shown


def test_losses_are_shown_as_running_means_and_against_the_base(
    capsys: pytest.CaptureFixture[str],
) -> None:
    step = {"grad_norm": 1.0, "lr": 1e-4, "t": (0.5,), "seconds": 2.0}
    shown = lines_of(
        capsys,
        StepDone(step=1, expert="high", loss=1.0, **step),
        StepDone(step=0, expert="high", loss=2.0, **step),  # 0 of 0 steps, so that it is shown
        Validated(step=2, expert="high", loss=0.9, ema=None, base=1.0, held_out=True),
    )
    assert shown == [
        "training 0/0 high expert, mean loss high 1.1000, 2.00 s/step, 0:00 left",
        "step 2: validation on held-out clips, high expert: loss 0.9000 (-10.0 % against the "
        "base model)",
    ]


def test_the_attention_backend_is_shown_where_it_was_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    times = {"cudnn": 17.254, "flash": 29.1, "efficient": 101.0}
    unusable = {"overrideable": "PyTorch has no such kernel for cuda"}
    shown = lines_of(
        capsys,
        AttentionChosen(backend="cudnn", milliseconds=times, unusable=unusable),
        AttentionChosen(backend="flash", milliseconds={}, unusable={}),
    )
    assert shown == ["attention: cudnn (cudnn 17.3 ms, flash 29.1 ms, efficient 101 ms)"]


def overview(run: Path, **changes: Any) -> Overview:
    facts: dict[str, Any] = {
        "steps": {"high": 1000, "low": 1000},
        "clips": 40,
        "expert_clips": {"high": 40, "low": 40},
        "seen": {"high": 25.0, "low": 25.0},
        "parameters": {"high": 76_677_120, "low": 76_677_120},
        "disk": {"checkpoints": 7_400_000_000, "exported weights": 2_400_000_000},
        "step_seconds": 16.0,
        "run_seconds": 9.2 * 3600,
        "weights": run / "weights",
        "samples": run / "samples",
    }
    return Overview(**{**facts, **changes})


def test_the_first_lines_say_what_the_run_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "fox"
    assert lines_of(capsys, overview(run)) == [
        "steps: 2,000 (high 1,000, low 1,000); 40 clips, each seen 25 times by each expert",
        "trainable parameters: 76.7 million for each expert",
        "time: about 16 s a step and 9 h 12 min in all, by arithmetic",
        "disk, by the plan: checkpoints 7.4 GB, exported weights 2.4 GB",
        f"results: {Path('runs/fox/weights')} and {Path('runs/fox/samples')}",
    ]
    other = overview(
        run,
        steps={"high": 30, "low": 10},
        clips=1,
        expert_clips={"high": 1, "low": 1},
        seen={"high": 3.25, "low": 0.675},
        parameters={"high": 4096, "low": 8192, "embeddings": 64},
        step_seconds=None,
        run_seconds=None,
        samples=None,
    )
    assert lines_of(capsys, other) == [
        "steps: 40 (high 30, low 10); 1 clip, each seen 3.2 times by the high expert and 0.68 "
        "times by the low expert",
        "trainable parameters: 4,096 for the high expert and 8,192 for the low expert and 64 for "
        "the embeddings",
        "disk, by the plan: checkpoints 7.4 GB, exported weights 2.4 GB",
        f"results: {Path('runs/fox/weights')}",
    ]
    of_their_own = overview(run, expert_clips={"high": 8, "low": 40}, seen={"high": 125, "low": 25})
    assert lines_of(capsys, of_their_own)[0] == (
        "steps: 2,000 (high 1,000, low 1,000); 40 clips: 8 for the high expert, each seen 125 "
        "times and 40 for the low expert, each seen 25 times"
    )
    single = overview(
        run,
        steps={"single": 50},
        expert_clips={"single": 40},
        seen={"single": 1.25},
        parameters={"single": 64},
    )
    first, second, *_ = lines_of(capsys, single)
    assert first == "steps: 50; 40 clips, each seen 1.2 times"
    assert second == "trainable parameters: 64"


def test_a_steps_peak_of_device_memory_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    done = StepDone(
        step=0,
        expert="high",
        loss=1.0,
        grad_norm=1.0,
        lr=1e-4,
        t=(0.5,),
        seconds=2.0,
        step_memory_peak=21_340_000_000,
    )
    planned = MemoryPlanned(
        device_peak=21_000_000_000,
        device_memory=24_000_000_000,
        host_peak=1,
        phase="training",
        plan={},
    )
    assert "mean loss high 1.0000, 21.3 GB of device memory, 2.00" in lines_of(capsys, done)[0]
    assert "high 1.0000, 21.3 GB of 24.0 GB of device" in lines_of(capsys, planned, done)[1]


def test_the_bar_of_a_terminal_has_the_time_left_first(capsys: pytest.CaptureFixture[str]) -> None:
    display = Progress(terminal=True)
    peaks = {"device_peak": 22 * 10**9, "device_memory": 24 * 10**9, "host_peak": 0}
    display.listen(MemoryPlanned(**peaks, phase="training", plan={}))
    display.listen(DataReady(clips=1, encoded=0, report=[], steps=900))
    for step, expert, seconds in ((449, "high", 2.0), (450, "low", 5.25)):
        display.listen(
            StepDone(
                step=step,
                expert=expert,
                loss=0.5,
                grad_norm=1.0,
                lr=1e-4,
                t=(0.5,),
                seconds=seconds,
                step_memory_peak=21_300_000_000,
                seconds_left=5405.0,
            )
        )
    display._bar.refresh()  # tqdm draws at most ten times a second
    shown = capsys.readouterr().err.split("\r")[-1]
    assert "training 450/900 |█████     | 50%, 1:30:05 left | loss high 0.5000 *low 0.5000" in shown
    assert "5.25 s/step | 21.3 of 24.0 GB" in shown
    display.close()


def test_a_program_that_asks_for_it_gets_progress_as_lines_of_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(progress_lines.time, "monotonic", lambda: now)
    monkeypatch.setenv("ONEWAN_PROGRESS", "json")
    display = Progress(terminal=True)
    display.advance_bytes(1_000_000, 5_000_000)
    display.advance_bytes(2_000_000, 5_000_000)  # too soon after the line before
    now += 1
    display.advance_bytes(3_000_000, 5_000_000)
    display.advance_bytes(5_000_000, 5_000_000)  # the end is always told
    display.listen(Encoding(what="captions", done=1, total=7))
    display.line("a note")
    display.close()
    written = capsys.readouterr()
    assert written.out == "a note\n"
    found = [json.loads(line)["progress"] for line in written.err.splitlines()]
    assert [(each["activity"], each["done"], each["total"], each["unit"]) for each in found] == [
        ("writing", 1, 5, "MB"),
        ("writing", 3, 5, "MB"),
        ("writing", 5, 5, "MB"),
        ("captions", 1, 7, "item"),
    ]
