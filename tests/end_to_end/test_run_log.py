"""What a run tells a person: on the terminal and in ``log.txt``."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.runs import RunFile, layout_of, recorder

from onewan.cli import main
from onewan.config.load import dump_run
from onewan.config.schema import ResolvedRun
from onewan.errors import CheckpointError, ConfigError
from onewan.runs.events import Event, StepDone
from onewan.train.trainer import WanTrainer

_RECORD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.*)")
_ACTIVITY = re.compile(r"(training|encoding \w+|sampling video \d+) \d+/\d+")


def run_yaml(config: ResolvedRun, folder: Path) -> str:
    path = folder / "given.yaml"
    path.write_text(dump_run(config), encoding="utf-8")
    return str(path)


def log_of(config: ResolvedRun) -> list[str]:
    """The records of ``log.txt`` without their times; each has one."""
    found: list[str] = []
    for line in layout_of(config).log.read_text(encoding="utf-8").splitlines():
        record = _RECORD.fullmatch(line)
        assert record is not None, line
        found.append(record[1])
    return found


def test_the_log_has_the_lines_of_the_terminal(
    run_file: RunFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_file("ti2v-5b", "train.steps=2", "validation={clips: 1, every: 1}")
    given = run_yaml(config, tmp_path)
    assert main(["train", given]) == 0
    assert main(["train", given, "--resume"]) == 0
    shown = capsys.readouterr().out.splitlines()
    lines = [line for line in shown if not _ACTIVITY.match(line)]
    # The page about the run is written once its log is closed.
    assert sum(line.startswith("report: ") for line in lines) == 2
    lines = [line for line in lines if not line.startswith("report: ")]
    assert log_of(config) == lines
    assert any("nothing is left to train" in line for line in lines)
    assert any("weights exported" in line for line in lines)


def test_an_error_that_the_user_can_fix_is_logged_without_a_traceback(
    run_file: RunFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_file("ti2v-5b", "train.steps=1")
    WanTrainer(config).fit()
    given = run_yaml(config, tmp_path)
    assert main(["train", given, "--resume", "optimizer.lr=0.1"]) == 1
    error = capsys.readouterr().err.splitlines()
    assert error[0].startswith("onewan: ") and "optimizer.lr: was 0.005, is 0.1" in error[1]
    assert log_of(config)[-2:] == [error[0].replace("onewan", "failed"), error[1]]


def test_a_stop_is_one_line(
    run_file: RunFile,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = run_file("ti2v-5b", "train.steps=3")
    emit = WanTrainer._after_steps

    def interrupt(self: WanTrainer, *arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        emit(self, *arguments)

    monkeypatch.setattr(WanTrainer, "_after_steps", interrupt)
    assert main(["train", run_yaml(config, tmp_path)]) == 130
    out, err = capsys.readouterr()
    assert err == ""
    assert [line for line in out.splitlines() if line.startswith("stop")] == [
        "stopped; the state of step 1 is saved; continue with --resume"
    ]
    *_, stopped, report = out.splitlines()
    assert log_of(config)[-1] == stopped and report.startswith("report: ")


@pytest.mark.parametrize(
    ("setting", "error"),
    [("method.modules=[nothing.*]", ConfigError), ("model.variant=i2v-a14b", CheckpointError)],
)
def test_a_run_that_can_not_be_started_leaves_no_folder(
    run_file: RunFile, setting: str, error: type[Exception]
) -> None:
    config = run_file("t2v-a14b", setting)
    with pytest.raises(error):
        WanTrainer(config).fit()
    assert not layout_of(config).root.exists()
    assert not layout_of(config).root.parent.exists()


def test_unknown_requests_are_named_once_and_left_alone(run_file: RunFile) -> None:
    config = run_file("ti2v-5b", "train.steps=3")
    events: list[dict[str, Any]] = []
    record = recorder(events)
    control = layout_of(config).control_dir

    def listen(event: Event) -> None:
        record(event)
        if isinstance(event, StepDone):
            (control / "preview").touch()
            (control / ".nfs0001").touch()

    WanTrainer(config, listen=listen).fit()
    assert [e["text"] for e in events if e["event"] == "warning"] == [
        f"{control / 'preview'}: is no request, so nothing is done; the names of requests are "
        "stop, save, export, sample"
    ]
    assert (control / "preview").exists()


def test_the_overview_counts_what_the_run_does(run_file: RunFile) -> None:
    per_expert = "per_expert={high: {steps: 5}, low: {steps: 1}}"
    config = run_file("t2v-a14b", "train.steps=6", "train.accumulation=2", per_expert)
    events: list[dict[str, Any]] = []
    WanTrainer(config, listen=recorder(events)).fit()
    (found,) = (e for e in events if e["event"] == "overview")
    trained = [e["expert"] for e in events if e["event"] == "step"]
    assert found["steps"] == {"high": trained.count("high"), "low": trained.count("low")}
    assert found["clips"] == 5 and found["seen"] == {"high": 2.0, "low": 0.4}
    layout = layout_of(config)
    for name, count in found["parameters"].items():
        weights = load_file(layout.state(6) / f"{name}.safetensors")
        assert count == sum(tensor.numel() for tensor in weights.values())
    tensors = [t for path in layout.weights_dir.iterdir() for t in load_file(path).values()]
    assert found["disk"]["exported weights"] >= sum(t.nbytes for t in tensors if t.ndim)
    assert found["weights"] == layout.weights_dir and found["samples"] is None
