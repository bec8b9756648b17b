"""The progress display without a terminal: which lines a user reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from onewan.cli import progress
from onewan.cli.progress import Progress
from onewan.runs.events import (
    AttentionChosen,
    Encoding,
    Event,
    Exported,
    Finished,
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
    assert "loss low 1.0000, 412 TFLOP/s (53 % of the device's), 2.00 s/step" in shown


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
        "training 0/0 high expert, loss high 1.1000, 2.00 s/step, 0:00 left",
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
