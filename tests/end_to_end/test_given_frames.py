"""Runs whose samples are given the first frame, the last, both or none: whole runs on the CPU,
streamed, resumed and on the simulated accelerator, and what the cache holds for them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.runs import (
    RunFile,
    assert_the_same_six_steps,
    layout_of,
    outcome,
    stopped_and_resumed,
)

from onewan.config.schema import ResolvedRun
from onewan.data.clip import Clip
from onewan.data.dataset import Dataset, needed
from onewan.data.encode import no_progress
from onewan.formats.lora_files import read_adapter
from onewan.media import probe
from onewan.model.sources import locate
from onewan.runs.event_file import read_events
from onewan.train.memory import plan_run
from onewan.train.setup import WanModelSetup
from onewan.train.trainer import WanTrainer

SHARES = "train.condition_shares={first: 0.25, both: 0.25, last: 0.25, none: 0.25}"
STREAMED = [
    "memory.resident_blocks=0",
    "memory.offload_inputs=true",
    "memory.keep_attention=host",
]


@pytest.mark.parametrize(
    ("variant", "method"),
    [("i2v-a14b", "lora"), ("ti2v-5b", "lora"), ("i2v-a14b", "fine_tune"), ("ti2v-5b", "dora")],
)
@pytest.mark.long
def test_a_run_with_last_frames_goes_through_everything(
    run_file: RunFile, workshop: Path, variant: str, method: str, sim: torch.device
) -> None:
    """It trains, validates, samples between two images, resumes, streams and runs on a device,
    each with the same bits; its files load; the plan is that of a run without last frames."""
    image = (workshop / "clips" / "still_square.png").as_posix()
    side = 128 if variant == "ti2v-5b" else 64
    chosen = [
        SHARES,
        f"method={{kind: {method}}}",
        "train.batch_size=2",
        "train.accumulation=2",
        "validation={clips: 1, every: 3}",
        "sample.every=3",
        f"sample.prompts=[{{prompt: a, image: {image}, last_image: {image}}}]",
        *(f"sample.{k}={v}" for k, v in {"width": side, "height": side, "frames": 9}.items()),
        "sample.steps=2",
    ]
    plain = run_file(variant, *chosen, name="plain")
    WanTrainer(plain).fit()
    layout = layout_of(plain)
    assert probe(layout.samples(6) / "0.mp4").frames_at(plain.sample.fps) == 9
    assert [e for e in read_events(layout.events) if e["event"] == "validation"]
    if method != "fine_tune":
        files = list(layout.weights_dir.glob("*.safetensors"))
        assert files and all(read_adapter(file).modules for file in files)
    streamed = run_file(variant, *chosen, *STREAMED, name="streamed")
    stopped_and_resumed(streamed)
    assert_the_same_six_steps(plain, streamed)
    there = run_file(variant, *chosen, f"model.device={sim.type}", name="there")
    WanTrainer(there).fit()
    (_, steps), (_, steps_there) = outcome(plain), outcome(there)
    assert [step[5] for step in steps] == [step[5] for step in steps_there]
    losses, losses_there = (np.array([step[2] for step in each]) for each in (steps, steps_there))
    assert np.allclose(losses, losses_there, rtol=1e-4)
    # Another run: the shares take part in training, not only in the cache.
    first = run_file(variant, *chosen, "train.condition_shares={first: 1}", name="first")
    WanTrainer(first).fit()
    assert [step[2] for step in outcome(first)[1]] != list(losses)
    clips = WanModelSetup(plain).dataset([], no_progress).clips
    plans = [plan for run in (plain, first) if (plan := plan_run(run, sim, clips))]
    # But for the disk: see the last test of this file.
    one, two = (str(replace(plan, disk={})) for plan in plans)
    assert one == two


# --- The cache -----------------------------------------------------------------------------------


def prepared(config: ResolvedRun, *, verify: bool = False) -> tuple[Dataset, dict[str, int]]:
    """The data set, and the number of items of each activity that its progress reported."""
    totals: dict[str, int] = {}
    data = WanModelSetup(config).dataset(
        [], lambda what, _done, total: totals.__setitem__(what, total), verify=verify
    )
    return data, totals


@pytest.fixture
def own(workshop: Path, tmp_path: Path) -> list[str]:
    """Settings of a run on a copy of the clips, which the test may change, with its own cache."""
    shutil.copytree(workshop / "clips", tmp_path / "clips")
    return [
        f"video_data.sources=[{{path: {(tmp_path / 'clips').as_posix()}}}]",
        f"video_data.cache_dir={(tmp_path / 'cache').as_posix()}",
    ]


def named(data: Dataset, name: str) -> Clip:
    return next(clip for clip in data.clips if clip.name == name)


def test_a_run_encodes_only_the_parts_that_its_shares_need(
    run_file: RunFile, own: list[str]
) -> None:
    first, totals = prepared(run_file("i2v-a14b", *own))
    assert totals == {"encoding captions": 6, "encoding clips": 5}
    clips = len(first.clips)
    videos = sum(clip.frames > 1 for clip in first.clips)
    shapes = len({(clip.frames, clip.size) for clip in first.clips})
    assert (clips, videos) == (5, 4)

    def encoded(shares: str, variant: str = "i2v-a14b") -> int:
        data, totals = prepared(run_file(variant, *own, f"train.condition_shares={shares}"))
        assert data.digest == first.digest and set(totals) <= {"encoding conditions"}
        return totals.get("encoding conditions", 0)

    assert encoded("{first: 0.5, both: 0.5}") == videos
    assert encoded("{both: 1}") == 0
    # An image is its own first and last frame, so `none` alone needs the empty condition of it.
    assert encoded("{last: 1}") == videos + shapes - 1
    assert encoded("{first: 0.4, none: 0.6}") == 1
    everything, _ = prepared(run_file("i2v-a14b", *own, SHARES))
    entry = everything.source.video(named(everything, "red_square.mp4"), "both")
    assert entry.keys() == {"latents", "condition", "end_of_both"}
    assert entry["end_of_both"].shape == (16, 1, *entry["latents"].shape[2:])


def test_conditions_are_the_same_with_and_without_a_cache(
    run_file: RunFile, own: list[str]
) -> None:
    for variant in ("i2v-a14b", "ti2v-5b"):
        cached, _ = prepared(run_file(variant, *own, SHARES))
        online, _ = prepared(run_file(variant, *own, SHARES, "video_data.cache=false"))
        for given in ("first", "both", "last", "none"):
            clip = named(cached, "red_square.mp4")
            a, b = cached.source.video(clip, given), online.source.video(clip, given)
            assert b.keys() <= a.keys() and all(torch.equal(a[name], b[name]) for name in b)


def test_a_condition_image_is_encoded_by_itself(
    run_file: RunFile, own: list[str], tmp_path: Path
) -> None:
    config = run_file("i2v-a14b", *own)
    before, _ = prepared(config)
    image = tmp_path / "clips" / "red_square.condition.png"
    Image.new("RGB", (40, 40), (0, 200, 0)).save(image)
    data, totals = prepared(config)
    # Its latents have a new entry once: one without the condition of the first frame.
    assert totals == {"encoding clips": 1, "encoding conditions": 1}
    assert data.digest != before.digest and len(data.clips) == len(before.clips)
    clip = named(data, "red_square.mp4")
    entry = data.source.video(clip, "first")
    own_frame = before.source.video(named(before, "red_square.mp4"), "first")
    assert torch.equal(entry["latents"], own_frame["latents"])
    assert not torch.equal(entry["condition"], own_frame["condition"])

    Image.new("RGB", (40, 40), (0, 0, 200)).save(image)
    changed, totals = prepared(config)
    assert totals == {"encoding conditions": 1} and changed.digest != data.digest
    # A clip whose condition can't be read is left out, and named with it.
    image.write_bytes(image.read_bytes()[:70])
    broken, _ = prepared(config)
    (problem,) = broken.report.problems
    assert problem.path.name == "red_square.mp4"
    assert "its condition image red_square.condition.png" in problem.reason
    image.unlink()
    assert prepared(config)[0].digest == before.digest


def test_a_random_frame_is_the_condition_of_its_clips(
    run_file: RunFile, own: list[str], tmp_path: Path
) -> None:
    source = f"{{path: {(tmp_path / 'clips').as_posix()}, condition: random_frame}}"
    config = run_file("i2v-a14b", *own, f"video_data.sources=[{source}]")
    data, totals = prepared(config)
    moved = [clip for clip in data.clips if clip.conditions.frame]
    assert 1 <= len(moved) <= 4 and totals["encoding conditions"] == len(moved)
    assert prepared(config)[1] == {}
    sheet = next((tmp_path / "cache").glob("contact_sheet_*.jpg"))
    preview = data.source.preview(moved[0])  # pyright: ignore[reportAttributeAccessIssue]
    assert preview.conditions.shape == (1, *preview.frames.shape[1:]) and sheet.exists()


def test_what_a_run_needs_of_a_cache_has_its_conditions(run_file: RunFile, own: list[str]) -> None:
    config = run_file("i2v-a14b", *own, SHARES)
    prepared(config)
    found = needed(config, locate(config.model.sources()).paths)
    folder = Path(config.video_data.cache_dir) / "condition"
    stored = {file.stem for file in folder.rglob("*.safetensors")}
    assert stored == {key for kind, key in found.entries if kind == "condition"} and stored


@pytest.mark.parametrize("variant", ["i2v-a14b", "ti2v-5b"])
@pytest.mark.parametrize("shares", ["{first: 0.5, both: 0.5}", "{last: 1}", "{none: 1}"])
def test_the_plan_counts_the_conditions_in_the_cache(
    run_file: RunFile, own: list[str], sim: torch.device, variant: str, shares: str
) -> None:
    config = run_file(variant, *own, f"train.condition_shares={shares}")
    data, _ = prepared(config)
    plan = plan_run(config, sim, data.clips)
    assert plan is not None
    stored = sum(
        tensor.nbytes
        for kind in ("video", "condition")
        for file in (Path(config.video_data.cache_dir) / kind).rglob("*.safetensors")
        for tensor in load_file(file).values()
    )
    assert plan.disk["cache of encoded clips"] == stored
