"""The way of docs/start.md on a tiny model: from an empty folder to files that diffusers loads."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from pathlib import Path

import av
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image

from onewan.cli import main
from onewan.demo.clips import write_clips
from onewan.demo.tiny_model import write_tiny_model
from onewan.presets.starter import COMFYUI_FILES
from onewan.runs.event_file import read_events

SMALL = """
wan_config: {max_frames: 9}
video_data:
  sources: clips
  resolution: [64, 48]
  min_resolution: [32, 32]
method: {kind: lora, rank: 4}
train: {steps: 4000, save_every: 500, switch_expert_every: 1}
validation: {clips: 1, timesteps: 1}
sample: {width: 64, height: 48, frames: 5, steps: 2, prompts: [ohwx crosses a field]}
output: {name: mira}
"""
"""What the test changes in the file that init writes, so that steps take milliseconds."""
FOREIGN = """
max_train_steps: 2000
network_dim: 16
learning_rate: 1e-4
datasets: [{video_directory: clips, num_repeats: 2}]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of somebody who has ComfyUI's files and a few clips."""
    model = write_tiny_model(tmp_path / "model", "t2v-a14b", width=128, layers=2)
    for name, file in COMFYUI_FILES["t2v-a14b"].items():
        (source,) = (model / name).glob("*.safetensors")
        target = tmp_path / "ComfyUI" / "models" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    write_clips(tmp_path / "clips")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stop_after(step: int, run: Path) -> threading.Thread:
    """A thread that stops the run with `onewan stop`, once it has trained `step` steps."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            events = read_events(run / "events.jsonl") if (run / "events.jsonl").exists() else ()
            if any(e["event"] == "step" and e["step"] >= step for e in events):
                main(["stop", str(run)])
                return
            time.sleep(0.05)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def frames_of(video: Path) -> int:
    with av.open(str(video)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_from_an_empty_folder_to_files_that_diffusers_loads(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown() -> str:
        out, err = capsys.readouterr()
        assert err == ""
        assert str(folder) not in out  # paths are as the user types them
        return out

    # The run file, from ComfyUI's files.
    words = ["--variant", "t2v-a14b", "--purpose", "character", "--models", "ComfyUI/models"]
    assert main(["init", "mira.yaml", *words]) == 0
    assert "onewan train mira.yaml" in shown()
    written = Path("mira.yaml").read_text(encoding="utf-8")
    model = written[written.index("model:") : written.index("wan_config:")]
    # The tokenizer of the real file is inside of it.
    model = model.replace("model:\n", "model:\n  tokenizer: model/tokenizer\n")

    # Words of other trainers are answered.
    Path("mira.yaml").write_text(model + SMALL + FOREIGN, encoding="utf-8")
    assert main(["plan", "mira.yaml"]) == 1
    problems = capsys.readouterr().err
    for theirs, ours in {
        "max_train_steps": "train.steps",
        "network_dim": "method.rank",
        "learning_rate": "optimizer.lr",
        "datasets": "video_data.sources",
    }.items():
        assert re.search(rf"^  {theirs}: .*in onewan that is {re.escape(ours)}", problems, re.M)
    Path("mira.yaml").write_text(model + SMALL, encoding="utf-8")

    # What it takes, and the clips as they will be trained.
    assert main(["plan", "mira.yaml", "--vram", "24GB", "--json"]) == 0
    assert json.loads(shown())["run_time"]["total"] > 0
    assert main(["cache", "mira.yaml"]) == 0
    sheet = re.search(r"(\S+\.(?:jpg|png))$", shown(), re.M)
    assert sheet is not None
    with Image.open(sheet[1]) as image:
        assert image.width > 3 * 64

    # Train, stop, resume: the run is the one that was stopped.
    run = Path("runs", "mira")
    watcher = stop_after(4, run)
    assert main(["train", "mira.yaml"]) == 130
    watcher.join()
    assert "steps: 4,000 (high 2,000, low 2,000); 5 clips" in shown()
    stopped = max(e["step"] for e in read_events(run / "events.jsonl") if e["event"] == "step")
    end = stopped + 4
    assert main(["train", "mira.yaml", "--resume", f"train.steps={end}"]) == 0
    assert f"resumed after step {stopped}" in shown()
    steps = [e["step"] for e in read_events(run / "events.jsonl") if e["event"] == "step"]
    assert steps == list(range(1, end + 1))
    assert main(["train", "mira.yaml", "--resume", f"train.steps={end}"]) == 0
    assert "train.steps=" in shown()  # how a finished run goes on

    # Videos from the run folder.
    videos = ["--prompt", "ohwx in snow", "--out", "mira.mp4"]
    assert main(["sample", str(run), *videos]) == 0
    assert frames_of(Path("mira.mp4")) == 5
    assert main(["sample", str(run), *videos]) == 1
    assert "--force" in capsys.readouterr().err

    # The files, under their names, in another program.
    pipeline = WanPipeline.from_pretrained("model", torch_dtype=torch.float32)
    for expert, second in (("high", False), ("low", True)):
        file = run / "weights" / f"mira_{end:06d}_{expert}_noise.safetensors"
        pipeline.load_lora_weights(
            str(file), adapter_name=f"mira_{expert}", load_into_transformer_2=second
        )
        assert (run / "weights" / f"mira_best_{expert}_noise.safetensors").is_file()
    for transformer in (pipeline.transformer, pipeline.transformer_2):
        assert any(
            "lora_B" in name and p.abs().max() > 0 for name, p in transformer.named_parameters()
        )
