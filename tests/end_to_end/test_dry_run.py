"""`onewan train --dry-run`: what a start says, and all that would prevent one, without writing."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from support.runs import RunFile, layout_of, recorder

from onewan.cli import main
from onewan.config.load import dump_run
from onewan.train.dry_run import dry_run
from onewan.train.trainer import WanTrainer

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "commands.md").read_text(encoding="utf-8")


def files_in(*folders: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for folder in folders for p in folder.rglob("*")}


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("t2v-a14b", ["train.steps=2", "validation.share=0.3", "validation.clips=1"]),
        pytest.param(
            "ti2v-5b",
            ["method={kind: oft, block_size: 16}", "train={epochs: 1, save_every: 9}"],
            marks=pytest.mark.long,
        ),
    ],
)
def test_it_says_what_a_start_says_and_writes_nothing(
    variant: str, settings: list[str], run_file: RunFile, tmp_path: Path, workshop: Path
) -> None:
    config = run_file(variant, *settings)
    before = files_in(tmp_path, workshop)
    found = dry_run(config)
    assert files_in(tmp_path, workshop) == before
    assert found.problems == [] and found.notes == []
    events = list[dict[str, Any]]()
    WanTrainer(config, listen=recorder(events)).fit()
    (overview,) = (event for event in events if event["event"] == "overview")
    assert found.overview is not None
    assert {"event": "overview", **found.overview.fields()} == overview
    (data,) = (event for event in events if event["event"] == "data")
    assert found.steps == data["steps"] and found.clips is not None
    assert found.clips.lines()[:2] == data["report"][:2]


def test_without_a_model_a_card_and_a_network_it_plans_for_the_card_of_the_run_file(
    workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(workshop / "clips", tmp_path / "clips")
    run = tmp_path / "dog.yaml"
    assert main(["init", str(run), "--vram", "24GB", "--ram", "64GB"]) == 0
    capsys.readouterr()
    before = files_in(tmp_path)
    small = ["video_data.min_resolution=[16, 16]", "memory.ram=64GB"]
    assert main(["train", str(run), *small, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "Wan-AI/Wan2.2-T2V-A14B-Diffusers: what is not on this machine yet is downloaded" in out
    assert "steps: 2,000 (high 1,000, low 1,000); 5 clips, each seen 200 times by each" in out
    assert "trainable parameters: 153.4 million for each expert" in out
    assert "no problem was found" in out.splitlines()[-1]
    assert main(["train", str(run), *small, "--dry-run", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    (row,) = re.findall(r"^\| `train --dry-run` \| (.*) \|$", PAGE, re.MULTILINE)
    assert set(data) | {"seen"} == set(re.findall(r"`(\w+)`", row))
    assert data["experts"]["high"] == {"steps": 1000, "clips": 5, "seen": 200.0}
    assert 0 < data["device_peak"] < 24e9 == data["device_memory"] and data["run_seconds"] > 0
    # The layers are those of the variant.
    wrong = [*small, "method={kind: lora, modules: ['atn1.*']}", "memory.vram=2GB"]
    assert main(["train", str(run), *wrong, "--dry-run"]) == 1
    err = capsys.readouterr().err
    assert "did you mean attn1" in err and "does not fit on a device of 2.0 GB" in err
    assert files_in(tmp_path) == before


def test_all_problems_are_found_at_once(run_file: RunFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    config = run_file("t2v-a14b", "optimizer={name: prodigy}", "method.rank=64")
    layout = layout_of(config)
    (layout.weights_dir).mkdir(parents=True)
    (layout.weights_dir / "run_000005_high_noise.safetensors").touch()
    problems = "\n".join(dry_run(config).problems)
    for part in (
        "exported weights (the newest of step 5) of an earlier run",
        "needs the package prodigyopt",
        "output.dir: checkpoints and weights take",
    ):
        assert part in problems, problems


def test_it_says_where_a_run_would_be_resumed_and_which_changes_prevent_that(
    run_file: RunFile,
) -> None:
    config = run_file("ti2v-5b", "train.steps=2")
    assert dry_run(config, resume="auto").problems == []
    assert "nothing to resume" in dry_run(config, resume=True).problems[0]
    WanTrainer(config).fit()
    assert "already holds a run" in dry_run(config).problems[0]
    found = dry_run(config, resume=True)
    assert (found.resumes_after, found.problems) == (2, [])
    changed = run_file("ti2v-5b", "train.steps=4", "optimizer.lr=0.1")
    found = dry_run(changed, resume=True)
    assert found.notes == ["a change that does not affect results: train.steps: was 2, is 4"]
    assert found.problems == [
        "optimizer.lr: was 0.005, is 0.1; resuming with this change would give other results"
    ]


def test_a_device_that_is_not_here_hides_no_problem_of_the_clips(
    run_file: RunFile, tmp_path: Path
) -> None:
    config = run_file("t2v-a14b", "model.device=hpu", f"video_data.sources=[{tmp_path}]")
    problems = dry_run(config).problems
    assert problems[0].startswith(f"no clip can be used in {tmp_path}")
    assert problems[-1].startswith("model.device: 'hpu' can't be used here")


def test_json_is_for_a_dry_run_only(run_file: RunFile, tmp_path: Path) -> None:
    path = tmp_path / "given.yaml"
    path.write_text(dump_run(run_file("t2v-a14b")), encoding="utf-8")
    with pytest.raises(SystemExit) as error:
        main(["train", str(path), "--json"])
    assert error.value.code == 2
