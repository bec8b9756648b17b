"""Runs whose previews are sampled with distilled LoRAs: the run itself is as without them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.distilled import write_distilled
from support.runs import METHODS, RunFile, layout_of, outcome, recorder

import onewan.sample.generate
from onewan.config.load import load_run
from onewan.config.schema import ResolvedRun
from onewan.demo.tiny_model import write_tiny_model
from onewan.errors import CheckpointError, ConfigError, Interrupted
from onewan.media import probe, write_video
from onewan.memory.plan import read_stored_model
from onewan.runs.event_file import read_events
from onewan.runs.events import Event, Sampling
from onewan.train.run import full_sample_requests, sample_requests
from onewan.train.setup import WanModelSetup
from onewan.train.trainer import WanTrainer

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
EACH_STEP = ["train.steps=4", "train.save_every=1", "train.switch_expert_every=1"]


def previews(
    workshop: Path, folder: Path, variant: str = "t2v-a14b", *, form: str = "differences"
) -> list[str]:
    """Settings of samples with distilled LoRAs at every step."""
    files = write_distilled(workshop / variant, folder / "distilled", form=form)
    side = 128 if variant == "ti2v-5b" else 64
    image = f", image: {workshop / 'clips' / 'still_square.png'}" if variant == "i2v-a14b" else ""
    size = {"width": side, "height": side, "frames": 5, "every": 1, "at_start": "true"}
    return [
        f"sample.prompts=[{{prompt: a <shape>{image}}}]",
        *(f"sample.{name}={value}" for name, value in size.items()),
        *(f"sample.distilled.{name}={path}" for name, path in files.items()),
    ]


PIXELS: dict[Path, np.ndarray] = {}


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the frames that are written: the encoder does not give the same bits for the same
    frames each time, so videos are compared before it."""
    PIXELS.clear()

    def record(path: Path, frames: np.ndarray, fps: float) -> None:
        write_video(path, frames, fps)
        PIXELS[path] = frames.astype(int)

    monkeypatch.setattr(onewan.sample.generate, "write_video", record)


def assert_the_same_run(one: ResolvedRun, other: ResolvedRun) -> None:
    """The same draws, losses, weights, averages and optimizer states, bit for bit."""
    (tensors, steps), (others, other_steps) = outcome(one), outcome(other)
    assert {step[0]: step for step in steps} == {step[0]: step for step in other_steps}
    assert tensors.keys() == others.keys() and tensors
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []


def sampled(config: ResolvedRun) -> list[tuple[int, str, bool]]:
    """(step, name of the file, whether distilled LoRAs were used) of each sample, by the events."""
    return [
        (e["step"], Path(e["file"]).name, e["distilled"])
        for e in read_events(layout_of(config).events)
        if e["event"] == "sampled"
    ]


def video(config: ResolvedRun, step: int, name: str = "0-distilled.mp4") -> np.ndarray:
    """Frames of a sample that was written, as integers that can be subtracted."""
    path = layout_of(config).samples(step) / name
    assert probe(path).shown_size == PIXELS[path].shape[2:0:-1]
    return PIXELS[path]


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal but for rounding, which depends on where weights begin in memory."""
    return np.abs(one - other).max() <= 1


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_each_method_is_the_one_without_previews(
    run_file: RunFile, workshop: Path, tmp_path: Path, method: str
) -> None:
    """A few notes are all that a user reads about the files."""
    source = "named clips" if method == "embedding" else "clips"
    settings = [
        *METHODS[method],
        *EACH_STEP,
        f"video_data.sources=[{{path: {workshop / source}}}]",
        "train.ema={decay: 0.9}",
        "validation.clips=2",
    ]
    plain = run_file("t2v-a14b", *settings, name="plain")
    WanTrainer(plain).fit()
    shown = previews(workshop, tmp_path)
    watched = run_file("t2v-a14b", *settings, *shown, name="watched")
    events: list[dict[str, Any]] = []
    WanTrainer(watched, listen=recorder(events)).fit()
    assert_the_same_run(plain, watched)
    assert sampled(watched) == [(step, "0-distilled.mp4", True) for step in range(5)]
    # What was trained shows: an embedding changes one level in a hundred pixels of the tiny model.
    assert np.abs(video(watched, 4) - video(watched, 0)).mean() > 0.005
    warnings = [e["text"] for e in events if e["event"] == "warning"]
    for expert in ("high", "low"):
        about = [w for w in warnings if f"{expert}_noise_model.safetensors" in w]
        assert len(about) == 2, warnings
        assert ["8 of 74 keys are skipped" in about[0], "has no alpha" in about[1]] == [True, True]


@pytest.mark.parametrize(("variant", "experts"), [("i2v-a14b", "high"), ("ti2v-5b", "both")])
def test_each_variant_has_previews(
    run_file: RunFile, workshop: Path, tmp_path: Path, variant: str, experts: str
) -> None:
    """Of A14B with both experts, if only one is trained."""
    settings = [*EACH_STEP, f"model.experts={experts}"]
    plain = run_file(variant, *settings, name="plain")
    WanTrainer(plain).fit()
    shown = previews(workshop, tmp_path, variant, form="alpha")
    watched = run_file(variant, *settings, *shown, name="watched")
    WanTrainer(watched).fit()
    assert_the_same_run(plain, watched)
    assert sampled(watched) == [(step, "0-distilled.mp4", True) for step in range(5)]


@pytest.mark.parametrize("weights", ["as_stored", "fp8"])
def test_streamed_and_packed_blocks_give_the_same_previews(
    run_file: RunFile, workshop: Path, tmp_path: Path, weights: str
) -> None:
    settings = [*EACH_STEP, f"memory.weights={weights}"]
    plain = run_file("t2v-a14b", *settings, name="plain")
    WanTrainer(plain).fit()
    shown = previews(workshop, tmp_path)
    resident = run_file("t2v-a14b", *settings, *shown, name="resident")
    streamed = run_file("t2v-a14b", *settings, *shown, "memory.resident_blocks=0", name="streamed")
    for config in (resident, streamed):
        WanTrainer(config).fit()
        assert_the_same_run(plain, config)
    for step in range(5):
        assert alike(video(resident, step), video(streamed, step))


@pytest.mark.parametrize("method", ["lora", "fine_tune"])
def test_previews_on_the_device_are_the_cpus(
    run_file: RunFile, workshop: Path, tmp_path: Path, sim: torch.device, method: str
) -> None:
    del sim
    settings = [*METHODS[method], *EACH_STEP, "train.steps=2", "memory.resident_blocks=1"]
    plain = run_file("t2v-a14b", *settings, "model.device=sim", name="plain")
    WanTrainer(plain).fit()
    settings += previews(workshop, tmp_path)
    here = run_file("t2v-a14b", *settings, name="here")
    there = run_file("t2v-a14b", *settings, "model.device=sim", name="there")
    for config in (here, there):
        WanTrainer(config).fit()
    assert_the_same_run(plain, there)
    for step in range(3):
        assert alike(video(here, step), video(there, step))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize("method", ["lora", "lokr", "fine_tune"])
def test_a_stop_within_a_preview_changes_nothing(
    run_file: RunFile, workshop: Path, tmp_path: Path, method: str
) -> None:
    settings = [*METHODS[method], *EACH_STEP, "memory.resident_blocks=0"]
    plain = run_file("t2v-a14b", *settings, name="plain")
    WanTrainer(plain).fit()
    config = run_file("t2v-a14b", *settings, *previews(workshop, tmp_path), name="stopped")

    def stop(event: Event) -> None:
        if isinstance(event, Sampling) and (event.step, event.done) == (2, 3):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        WanTrainer(config, listen=stop).fit()
    assert [step for step, *_ in sampled(config)] == [0, 1]
    WanTrainer(config, resume=True).fit()
    assert [step for step, *_ in sampled(config)] == [0, 1, 2, 3, 4]
    assert_the_same_run(plain, config)


def test_full_samples_come_besides(run_file: RunFile, workshop: Path, tmp_path: Path) -> None:
    settings = [*EACH_STEP, *previews(workshop, tmp_path), "sample.steps=2"]
    config = run_file("t2v-a14b", *settings, "sample.distilled.full_every=2", name="both")
    WanTrainer(config).fit()
    distilled = [(step, "0-distilled.mp4", True) for step in range(5)]
    full = [(step, "0.mp4", False) for step in (0, 2, 4)]
    assert sorted(sampled(config)) == sorted(distilled + full)
    assert np.abs(video(config, 4) - video(config, 4, "0.mp4")).mean() > 1
    without = [s for s in settings if "distilled" not in s]
    plain = run_file("t2v-a14b", *without, name="full")
    WanTrainer(plain).fit()
    for step in (0, 2, 4):
        assert np.array_equal(video(plain, step, "0.mp4"), video(config, step, "0.mp4"))


def test_files_are_checked_before_anything_is_encoded(
    run_file: RunFile, workshop: Path, tmp_path: Path
) -> None:
    shown = previews(workshop, tmp_path)
    with pytest.raises(ConfigError) as error:
        run_file("ti2v-5b", *shown, "sample.width=128", "sample.height=128")
    assert "sample.distilled.high: ti2v-5b has no such expert; give single" in str(error.value)
    assert "sample.distilled.single: is required, got nothing" in str(error.value)
    with pytest.raises(ConfigError) as error:
        run_file("t2v-a14b", *shown, f"sample.distilled.low={tmp_path / 'nothing.safetensors'}")
    assert "sample.distilled.low: there is no file" in str(error.value)
    swapped = run_file(
        "t2v-a14b",
        *shown,
        f"sample.distilled.low={tmp_path}/distilled/high_noise_model.safetensors",
    )
    with pytest.raises(CheckpointError, match="named as that of the high one; swap the two"):
        WanTrainer(swapped).fit()
    wide = write_tiny_model(tmp_path / "wide", "t2v-a14b", width=64, layers=2)
    low = write_distilled(wide, tmp_path / "wide distilled")["low"]
    wrong = run_file("t2v-a14b", *shown, f"sample.distilled.low={low}", name="wrong")
    with pytest.raises(CheckpointError, match="does not fit the model in 20 of 20 layers"):
        WanTrainer(wrong).fit()
    assert not layout_of(swapped).root.exists() and not layout_of(wrong).root.exists()


def test_the_documented_run_file_can_be_started(workshop: Path, tmp_path: Path) -> None:
    """The example of docs/training.md, as far as a run is checked before anything is encoded."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    section = page.partition("### Previews in four steps")[2]
    example = section.partition("```yaml\n")[2].partition("```")[0]
    write_distilled(workshop / "t2v-a14b", tmp_path / "loras")
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {{path: {(workshop / 't2v-a14b').as_posix()}, variant: t2v-a14b}}\n"
        f"video_data: {{sources: {(workshop / 'clips').as_posix()}}}\n{example}",
        encoding="utf-8",
    )
    config = load_run(file)
    WanModelSetup(config).check()
    (request,), (full,) = sample_requests(config), full_sample_requests(config)
    assert (request.steps, request.guidance, request.shift) == (4, (1.0, 1.0), 5.0)
    assert (full.steps, full.guidance, full.shift) == (25, (4.0, 3.0), 12.0)
    assert config.sample.every == config.train.save_every


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_counts_the_bytes_of_the_loras(
    run_file: RunFile, workshop: Path, tmp_path: Path, dtype: str
) -> None:
    config = run_file("t2v-a14b", *previews(workshop, tmp_path), f"model.dtype={dtype}")
    overlays = WanModelSetup(config).build().distilled
    counted = {name: overlay.nbytes for name, overlay in overlays.items()}
    assert read_stored_model(config).distilled == counted
