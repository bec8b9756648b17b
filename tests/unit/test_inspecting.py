"""`onewan inspect` of runs, of videos and of headers with many entries."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from onewan.cli import main
from onewan.config.load import dump_run, load_run
from onewan.media import write_video
from onewan.runs.event_file import EventFile
from onewan.runs.events import Finished, StepDone, Validated
from onewan.runs.layout import RunLayout


def test_a_run_is_told_in_a_few_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "fox.yaml").write_text("model: {path: m, variant: t2v-a14b}\n", encoding="utf-8")
    layout = RunLayout(tmp_path / "fox")
    layout.create()
    config = load_run(tmp_path / "fox.yaml", ["train.steps=30", f"output.dir={tmp_path}"])
    layout.resolved.write_text(dump_run(config), encoding="utf-8")
    assert main(["inspect", str(layout.root)]) == 0
    out = capsys.readouterr().out
    assert "0 of 30 (not started)" in out and f"onewan train {layout.root}\n" in out
    for step in ("000030", "best"):
        for expert in ("high", "low"):
            (layout.weights_dir / f"fox_{step}_{expert}_noise.safetensors").touch()
    layout.state(30).mkdir()
    with EventFile(layout.events) as file:
        for step in range(1, 31):
            file.write(
                StepDone(
                    step=step,
                    expert="high" if step % 2 else "low",
                    loss=float(step),
                    grad_norm=1.0,
                    lr=0.1,
                    t=[0.5],
                    seconds=1.0,
                )
            )
        validated = Validated(step=30, expert="low", loss=0.75, ema=None, base=1.0, held_out=True)
        file.write(validated)
        file.write(Finished(step=30, run=layout.root))
    assert main(["inspect", str(layout.root)]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 7
    for text in (
        "a run of Wan 2.2 T2V-A14B, lora",
        "30 of 30 (finished, 20",
        "high 20.0000, low 21.0000 (mean of 10 steps)",
        "low 0.7500 (step 30, -25.0 % against the base model)",
        "newest: fox_000030_high_noise.safetensors, fox_000030_low_noise.safetensors; best: fox_b",
        f"onewan train {layout.root} --resume train.steps=60",
        f"onewan sample {layout.root}",
    ):
        assert text in out
    assert main(["inspect", str(layout.root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "run"


def test_a_video_is_told_by_its_size_and_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "v.webm"
    write_video(path, np.zeros((9, 32, 64, 3), np.uint8), 24)
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "a video (vp9)" in out and "64x32" in out and "9 frames, 24 fps, 0.3" in out
    path.write_bytes(b"no video")
    assert main(["inspect", str(path)]) == 1
    assert "v.webm" in capsys.readouterr().err


def test_five_entries_of_a_header_are_shown_or_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "diffusion_model.blocks.0.self_attn.q.lora"
    tensors = {f"{name}_A.weight": torch.ones(2, 64), f"{name}_B.weight": torch.ones(64, 2)}
    metadata = {f"modelspec.{n}": "x" for n in "abc"} | {f"onewan.{n}": "x" for n in "abcd"}
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    for options, shown in (([], 5), (["--all"], 7)):
        assert main(["inspect", str(tmp_path / "x.safetensors"), *options]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "header   " in line]
        assert sum(" = x" in line for line in lines) == shown
        assert "onewan.d" in lines[3]
    assert "--all" not in "".join(lines)
