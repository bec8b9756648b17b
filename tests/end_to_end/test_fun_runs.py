"""Wan2.2-Fun, from clips with control videos and reference images to exports and samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.runs import (
    RunFile,
    assert_the_same_six_steps,
    layout_of,
    outcome,
    stopped_and_resumed,
)

from onewan.adapters.lora import apply_lora
from onewan.data.encode import no_progress
from onewan.data.loader import Batch
from onewan.errors import ConfigError
from onewan.formats.lora_files import read_adapter
from onewan.media import VIDEO_SUFFIXES, Fit, extension, probe, read_frames, write_video
from onewan.model.forward import NoisyLatents, predict_velocities
from onewan.model.load import WanModelLoader
from onewan.model.wan import WanModel
from onewan.train.saved_state import read_facts
from onewan.train.setup import WanModelSetup
from onewan.train.trainer import WanTrainer
from onewan.variants import Expert

VARIANTS_OF_FUN = ("fun-inp-a14b", "fun-control-a14b")
STREAMED = ["memory.resident_blocks=0", "memory.offload_inputs=true"]


@pytest.fixture(scope="module")
def controlled(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clips, with control videos beside the videos: their negatives."""
    folder = tmp_path_factory.mktemp("controlled")
    for file in sorted((workshop / "clips").iterdir()):
        (folder / file.name).write_bytes(file.read_bytes())
        if extension(file) not in VIDEO_SUFFIXES:
            continue
        info = probe(file)
        count = round((info.last - info.start) / info.frame_interval) + 1
        times = [info.start + index * info.frame_interval for index in range(count)]
        frames = read_frames(file, times, Fit(info.width, info.height))
        negative = folder / f"{file.stem}.control.mp4"
        write_video(negative, 255 - frames, 1 / info.frame_interval)
    return folder


def settings(variant: str, controlled: Path) -> list[str]:
    is_control = variant == "fun-control-a14b"
    files = {"image": controlled / "still_square.png"}
    if is_control:
        files |= {"control": min(controlled.glob("*.control.mp4")), "reference": files["image"]}
    given = "".join(f", {name}: {path.as_posix()}" for name, path in files.items())
    condition = ", condition: random_frame" if is_control else ""
    return [
        f"video_data.sources=[{{path: {controlled.as_posix()}{condition}}}]",
        f"sample.prompts=[{{prompt: a{given}}}]",
        *(f"sample.{k}={v}" for k, v in {"width": 64, "height": 64, "frames": 5}.items()),
        "sample.steps=1",
        "validation={clips: 1, every: 3}",
        "train.batch_size=2",
        "train.condition_shares={first: 0.25, both: 0.25, last: 0.25, none: 0.25}",
    ]


def prediction(model: WanModel, expert: Expert, batch: Batch, *, reference: bool) -> torch.Tensor:
    assert batch.text is not None
    inputs = NoisyLatents(
        x=batch.latents,
        t=torch.tensor([0.9]),
        text=batch.text,
        condition=batch.condition,
        reference=batch.reference if reference else None,
    )
    with torch.no_grad():
        return predict_velocities(model.expert(expert).eval(), [inputs])[0]


@pytest.mark.parametrize("variant", VARIANTS_OF_FUN)
def test_a_run_of_fun_streams_resumes_exports_and_samples(
    run_file: RunFile, controlled: Path, variant: str
) -> None:
    chosen = settings(variant, controlled)
    plain = run_file(variant, *chosen, name="plain")
    WanTrainer(plain).fit()
    layout = layout_of(plain)
    assert probe(layout.samples(6) / "0.mp4").width == 64
    streamed = run_file(variant, *chosen, *STREAMED, name="streamed")
    stopped_and_resumed(streamed)
    assert_the_same_six_steps(plain, streamed)

    run = WanModelSetup(plain).build()
    run.state.load(layout.state(6), read_facts(layout.state(6)))
    assert plain.model.path is not None
    fresh = WanModelLoader().load(plain.model.path, plain.model.variant)
    (batch,) = run.validation_batches()
    is_control = variant == "fun-control-a14b"
    assert (batch.reference is not None) == is_control and batch.condition is not None
    for name, trained in run.state.experts.items():
        path = layout.weights(6, trained.expert.file_suffix)
        apply_lora(fresh.expert(trained.expert), read_adapter(path).modules, name)
        ours, theirs, without = (
            prediction(model, trained.expert, batch, reference=reference)
            for model, reference in ((run.model, True), (fresh, True), (fresh, False))
        )
        assert float((ours - theirs).norm() / ours.norm()) < 1e-5
        assert (float((ours - without).norm() / ours.norm()) > 1e-4) == is_control


def test_control_videos_and_references_are_parts_of_fun_controls_clips(
    run_file: RunFile, controlled: Path
) -> None:
    """And of the digest of the data set; with and without a cache, they are the same."""
    chosen = settings("fun-control-a14b", controlled)
    config = run_file("fun-control-a14b", *chosen)
    data = WanModelSetup(config).dataset([], no_progress)
    online = WanModelSetup(run_file("fun-control-a14b", *chosen, "video_data.cache=false")).dataset(
        [], no_progress
    )
    clips = [clip for clip in data.clips if clip.kind == "video"]
    assert clips and all(c.conditions.control and c.conditions.as_reference for c in clips)
    for given in ("first", "both", "last", "none"):
        entry, again = (each.source.video(clips[0], given) for each in (data, online))
        assert again.keys() <= entry.keys() and {"control", "reference"} <= again.keys()
        assert all(torch.equal(entry[name], again[name]) for name in again)
        assert entry["control"].shape == entry["latents"].shape
        assert entry["reference"].shape == (16, 1, *entry["latents"].shape[2:])
    # The frame that a sample starts from is the clip's own, whatever its reference image is.
    own = run_file("fun-control-a14b", *chosen, "video_data.sources.0.condition=first_frame")
    without = WanModelSetup(own).dataset([], no_progress)
    clip = next(clip for clip in without.clips if clip.name == clips[0].name)
    plain = without.source.video(clip, "first")
    assert "reference" not in plain and without.digest != data.digest
    first = data.source.video(clips[0], "first")
    assert torch.equal(first["condition"], plain["condition"])
    inp = WanModelSetup(run_file("fun-inp-a14b", *settings("fun-inp-a14b", controlled)))
    assert all(c.conditions.control is None for c in inp.dataset([], no_progress).clips)


def test_a_control_video_that_is_too_short_for_samples_ends_a_run_at_once(
    run_file: RunFile, controlled: Path
) -> None:
    chosen = [*settings("fun-control-a14b", controlled), "sample.frames=401"]
    with pytest.raises(ConfigError) as caught:
        WanTrainer(run_file("fun-control-a14b", *chosen)).fit()
    (problem,) = caught.value.problems
    assert problem.startswith("sample.prompts.0.control: ") and "is too short" in problem


def test_reference_images_take_part_in_training(run_file: RunFile, controlled: Path) -> None:
    chosen = [*settings("fun-control-a14b", controlled), "train.steps=1", "sample.prompts=[]"]
    losses = list[float]()
    for condition in ("random_frame", "first_frame"):
        own = f"video_data.sources.0.condition={condition}"
        config = run_file("fun-control-a14b", *chosen, own, name=condition)
        WanTrainer(config).fit()
        ((_, _, loss, *_),) = outcome(config)[1]
        losses.append(loss)
    assert abs(losses[0] - losses[1]) > 1e-5 * losses[0]


@pytest.mark.long
@pytest.mark.parametrize("method", ["lora", "dora", "fine_tune"])
@pytest.mark.parametrize("variant", VARIANTS_OF_FUN)
def test_runs_of_fun_on_the_simulated_gpu(
    run_file: RunFile, controlled: Path, variant: str, method: str, sim: torch.device
) -> None:
    chosen = [*settings(variant, controlled), f"method={{kind: {method}}}"]
    plain = run_file(variant, *chosen, name="plain")
    WanTrainer(plain).fit()
    there = run_file(variant, *chosen, *STREAMED, f"model.device={sim.type}", name="there")
    stopped_and_resumed(there)
    losses, losses_there = ([step[2] for step in outcome(each)[1]] for each in (plain, there))
    assert np.allclose(losses, losses_there, rtol=1e-4)
    assert probe(layout_of(there).samples(6) / "0.mp4").width == 64
