"""The first steps of a new user: the demonstration, and the links in README.md."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from diffusers import WanPipeline

import onewan
from onewan.cli import main, parse
from onewan.runs.event_file import read_events

ROOT = Path(__file__).resolve().parents[2]


def test_the_demo_lowers_the_loss_and_its_results_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("a demo")  # a path with a space, as many users have
    assert main(["demo", "--dir", str(folder)]) == 0
    out, err = capsys.readouterr()
    # Lines of progress come every few seconds, on a slow machine more of them.
    lines = [line for line in out.splitlines() if not re.match(r"(encod|train|sampl)ing ", line)]
    assert err == "" and len(lines) <= 60  # `make demo` adds a few lines of its own
    assert str(tmp_path) not in out  # all paths are relative to the current folder
    run = folder / "runs" / "run"
    grid: dict[str, list[float]] = {}
    for event in read_events(run / "events.jsonl"):
        if event["event"] == "validation":
            grid.setdefault(event["expert"], []).append(event["loss"])
    assert all(last < 0.9 * first for first, last in grid.values())
    assert (run / "samples" / "000200" / "0.mp4").stat().st_size > 1000
    page = (run / "report.html").read_text(encoding="utf-8")
    assert f"report: {run / 'report.html'}" in out and "200 of 200" in page
    pipeline = WanPipeline.from_pretrained(folder / "model")
    for name, second in (("high", False), ("low", True)):
        file = run / "weights" / f"run_000200_{name}_noise_comfyui.safetensors"
        assert file.name in out
        pipeline.load_lora_weights(str(file), load_into_transformer_2=second)
    # The commands that it suggests next exist.
    for line in re.findall(r"^  (onewan .*?)(?:    #.*)?$", out.replace("\\\n", ""), re.MULTILINE):
        parse(shlex.split(line.partition(">")[0])[1:])
    assert main(["demo", "--dir", str(folder), "--variant", "ti2v-5b"]) == 1
    assert "another variant" in capsys.readouterr().err


def test_the_demo_is_prepared_without_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--prepare"]) == 0
    assert sorted(path.name for path in Path("demo").iterdir()) == ["clips", "model", "run.yaml"]
    capsys.readouterr()
    assert main(["plan", "demo/run.yaml", "--vram", "24GB", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["clips"] == 5 and plan["run_time"]["expert_steps"] == {"high": 100, "low": 100}
    assert main(["plan", "demo/run.yaml", "video_data.sources=[]", "--vram=24GB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["clips"] == 0


def test_files_that_the_readme_links_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links and all((ROOT / link).is_file() for link in links)


def test_public_names_are_importable() -> None:
    for name in onewan.__all__:
        assert getattr(onewan, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'WanWhatever'"):
        _ = onewan.WanWhatever
