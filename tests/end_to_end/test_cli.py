"""The command line, as a user calls it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from support.runs import RunFile

from onewan.cli import main, parse
from onewan.config.load import dump_run
from onewan.media import probe
from onewan.runs.control import take_orders
from onewan.runs.event_file import EventFile, read_events
from onewan.runs.events import Finished, Started
from onewan.runs.layout import RunLayout


def onewan(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "onewan", *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=cwd,
        check=False,
    )


def test_help_imports_nothing_heavy() -> None:
    """So that it starts quickly."""
    code = (
        "import sys, onewan.cli\n"
        "try: onewan.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'diffusers', 'transformers', 'av', 'numpy'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "[]"
    commands = ("demo", "init", "doctor", "cache", "train", "sample")
    assert all(command in out.stdout for command in commands)


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "init",
        "schema",
        "doctor",
        "plan",
        "cache",
        "train",
        "runs",
        "sample",
        "stop",
        "save",
        "sample-now",
        "export",
        "set",
    ],
)
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: onewan {command}" in capsys.readouterr().out


def test_init_prints_a_run_file_and_schema_its_json_schema(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "--variant", "t2v-a14b"]) == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert main(["schema"]) == 0
    assert "wan_config" in json.loads(capsys.readouterr().out)["properties"]


def test_wrong_usage_exits_with_2_and_wrong_input_with_1_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train"])
    assert end.value.code == 2
    with pytest.raises(SystemExit) as end:
        main(["train", "run.yaml", "--resmue", "train.steps=3"])
    assert end.value.code == 2
    late = parse(["train", "run.yaml", "train.seed=1", "--resume", "train.steps=3"])
    assert late.resume and late.overrides == ["train.seed=1", "train.steps=3"]
    assert main(["train", str(tmp_path / "absent.yaml")]) == 1
    (tmp_path / "run.yaml").write_text("model: {path: x, variant: t2v-a14b, expert: low}\n")
    assert main(["cache", str(tmp_path / "run.yaml"), "train.stesp=5"]) == 1
    err = capsys.readouterr().err
    assert "model.expert" in err and "'experts'" in err and "train.stesp" in err
    assert "Traceback" not in err
    (tmp_path / "run.yaml").write_text("model: {path: ./gone, variant: t2v-a14b}\n")
    (tmp_path / "clips").mkdir()
    assert (
        main(["cache", str(tmp_path / "run.yaml"), f"video_data.sources=[{{path: {tmp_path}}}]"])
        == 1
    )
    assert "gone" in capsys.readouterr().err


@pytest.fixture
def saved_run(run_file: RunFile, tmp_path: Path) -> Path:
    config = run_file("t2v-a14b", "train.steps=200", f"video_data.cache_dir={tmp_path / 'cache'}")
    path = tmp_path / "saved.yaml"
    path.write_text(dump_run(config), encoding="utf-8")
    return path


@pytest.mark.parametrize("option", ["--resume", "--resume=auto"])
def test_resume_never_takes_the_run_file_as_its_value(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = {"--resume": True, "--resume=auto": "auto"}[option]
    for words in (
        [option, "run.yaml", "train.steps=3"],
        ["run.yaml", option, "train.steps=3"],
        ["run.yaml", "train.steps=3", option],
    ):
        options = parse(["train", *words])
        assert options.resume == expected
        assert (options.run, options.overrides) == (Path("run.yaml"), ["train.steps=3"])
    assert parse(["train", "run.yaml"]).resume is False
    for words in (["--resume", "auto", "run.yaml"], ["run.yaml", "--resume", "auto"]):
        with pytest.raises(SystemExit) as end:
            main(["train", *words])
        assert end.value.code == 2
        assert "write --resume=auto, with an equals sign" in capsys.readouterr().err


def test_a_run_is_trained_by_one_process_and_resumes_after_a_termination(
    saved_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "onewan", "train", str(saved_run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )
    events = tmp_path / "runs" / "run" / "events.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if events.is_file() and sum(e["event"] == "step" for e in read_events(events)) >= 3:
            break
        time.sleep(0.05)
    for second in (["train", str(saved_run)], ["train", str(tmp_path / "runs/run"), "--resume"]):
        assert main(second) == 1
        err = capsys.readouterr().err
        assert f"run: is in use by process {process.pid} on" in err and "onewan stop" in err
    process.send_signal(signal.SIGTERM if os.name != "nt" else signal.CTRL_C_EVENT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "Traceback" not in out and "--resume" in out
    stopped = next(e["step"] for e in read_events(events) if e["event"] == "stopped")
    assert 3 <= stopped < 200
    again = onewan("train", tmp_path / "runs" / "run", f"train.steps={stopped + 2}", "--resume")
    assert again.returncode == 0, again.stderr
    assert f"resumed after step {stopped}" in again.stdout
    steps = [e["step"] for e in read_events(events) if e["event"] == "step"]
    assert steps == list(range(1, stopped + 3))


def test_cache_encodes_once_and_strict_fails_on_unusable_files(
    saved_run: Path, workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for file in (workshop / "clips").glob("red_square.*"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "broken.txt").write_text("a caption", encoding="utf-8")
    arguments = ["cache", str(saved_run), f"video_data.sources=[{{path: {folder.as_posix()}}}]"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "1 clip" in out and "broken.mp4" in out and "2 entries encoded now" in out
    assert main([*arguments, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["clips"], data["encoded"], len(data["problems"])) == (1, 0, 1)
    assert {*data} == {"cache", "clips", "validation_clips", "encoded", "problems", "report"}
    assert main([*arguments, "--strict"]) == 1
    out = capsys.readouterr().out
    assert "0 entries encoded now" in out
    (folder / "red_square.mp4").unlink()
    assert main(arguments) == 1
    assert "no clip can be used" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "file"), [("stop", "stop"), ("sample-now", "sample")])
def test_a_request_is_passed_to_a_running_trainer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, file: str
) -> None:
    layout = RunLayout(tmp_path / "fox")
    layout.create()
    layout.resolved.touch()
    with EventFile(layout.events) as events:
        events.write(Started(run=layout.root, steps=9))
    assert main([command, str(layout.root)]) == 0
    assert "after the current step" in (out := capsys.readouterr().out)
    assert "its last event" not in out
    assert [path.name for path in layout.control_dir.iterdir()] == [file]


def test_orders_are_checked_by_the_run_file_and_passed_to_a_running_trainer(
    run_file: RunFile, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_file("t2v-a14b", "sample.prompts=[a]")
    layout = RunLayout(config.output.dir / "run")
    layout.create()
    layout.resolved.write_text(dump_run(config), encoding="utf-8")
    with EventFile(layout.events) as events:
        events.write(Started(run=layout.root, steps=9))
    folder = str(layout.root)
    assert main(["set", folder, "optimizer.lr=3e-4", "train.save_every=7"]) == 0
    assert "optimizer.lr = 0.0003, train.save_every = 7" in capsys.readouterr().out
    assert main(["sample-now", folder, "--prompt", "a fox", "--frames", "9"]) == 0
    (sample,) = take_orders(layout, "sample")
    assert sample == {"prompt": "a fox", "frames": 9}
    (settings,) = take_orders(layout, "settings")
    assert settings == {"optimizer.lr": 3e-4, "train.save_every": 7}
    assert main(["set", folder, f"optimizer.lr={config.optimizer.lr}"]) == 0
    assert "has these settings already" in capsys.readouterr().out
    for arguments, reason in (
        (["set", folder, "optimizer.lr=-1"], "optimizer.lr: must be more than 0, got -1"),
        (["set", folder, "train.seed=1"], "train.seed: can't change while a run trains"),
        (["set", folder, "optimizer.lr"], "write, for example, train.steps=2000"),
        (["sample-now", folder, "--prompt", "a", "--frames", "6"], "frames: must be 4n+1, got 6"),
        (["sample-now", folder, "--prompt", "a", "--image", "a.png"], "image: there is no file"),
    ):
        assert main(arguments) == 1
        assert reason in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sample-now", folder, "--seed", "3"])
    assert [*layout.control_dir.iterdir()] == []


def test_a_request_to_a_silent_trainer_reports_the_age_of_its_last_event(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = RunLayout(tmp_path / "fox")
    layout.create()
    layout.resolved.touch()
    hour_ago = datetime.now(timezone.utc) - timedelta(minutes=60)
    layout.events.write_text(f'{{"event": "step", "time": "{hour_ago.isoformat()}"}}\n')
    assert main(["save", str(layout.root)]) == 0
    assert "its last event is 1 h old" in capsys.readouterr().out


def test_a_request_to_a_finished_run_or_to_another_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = RunLayout(tmp_path / "fox")
    layout.create()
    layout.resolved.touch()
    with EventFile(layout.events) as events:
        events.write(Finished(run=layout.root, step=9))
    assert main(["stop", str(layout.root)]) == 1
    assert "fox: is not running (last event: finished" in capsys.readouterr().err
    assert main(["stop", str(tmp_path)]) == 1
    assert "is not the folder of a run" in capsys.readouterr().err
    assert list(layout.control_dir.iterdir()) == []


def test_sample_applies_loras_and_refuses_wrong_files(
    saved_run: Path, workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(saved_run), "train.steps=4", "optimizer.lr=0.1"]) == 0
    size = [
        "--width",
        "64",
        "--height",
        "64",
        "--frames",
        "5",
        "--steps",
        "2",
        "--dtype",
        "float32",
    ]
    base = ["sample", str(workshop / "t2v-a14b"), "--prompt", "a red square", *size]
    loras = sorted((tmp_path / "runs" / "run" / "weights").iterdir())
    assert main([*base, "--out", str(tmp_path / "base.mp4")]) == 0
    assert main([*base, "--out", str(tmp_path / "lora.webm"), "--lora", *map(str, loras)]) == 0
    assert "applied to the high expert" in capsys.readouterr().out
    assert probe(tmp_path / "base.mp4").codec == "h264"
    assert probe(tmp_path / "lora.webm").codec == "vp9"
    assert main([*base, "--out", str(tmp_path / "x.txt")]) == 1
    assert (
        main([*base, "--out", "x.mp4", "--lora", str(workshop / "clips" / "red_square.mp4")]) == 1
    )
    assert (
        main([*base, "--out", "x.mp4", "--image", str(workshop / "clips" / "still_square.png")])
        == 1
    )
    err = capsys.readouterr().err
    assert "Traceback" not in err and "is not a safetensors, GGUF or PyTorch file" in err
