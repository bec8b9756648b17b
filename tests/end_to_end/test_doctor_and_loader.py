"""What `onewan doctor` says will be taken of files is what the data loader yields."""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from support.runs import RunFile
from test_doctor import BAD, ENVIRONMENT, mixed, write_clip  # noqa: F401  (mixed is a fixture)

from onewan.config.clips import WanTrainConfig
from onewan.config.schema import ResolvedRun
from onewan.data.dataset import Dataset
from onewan.data.decode import decode
from onewan.data.encode import encode_frames, no_progress
from onewan.data.loader import Batch, WanDataLoader
from onewan.doctor.examination import Examination, examine
from onewan.doctor.inspection import small_size
from onewan.media import Fit, read_frames
from onewan.model.conditioning import conditioning_of
from onewan.model.load import WanModelLoader
from onewan.train.setup import WanModelSetup

pytestmark = pytest.mark.long

STRATEGIES = get_args(WanTrainConfig.model_fields["frame_sample_strategy"].annotation)
FEWER_CLIPS = {
    "random": ["wan_config.clips_per_video=2"],
    "sliding": ["wan_config.stride=2"],
    "uniform": ["wan_config.clips_per_video=2"],
    "all": ["video_data.target_fps=4"],
    "chunks": ["video_data.target_fps=4"],
}
"""Settings with which strategies that make many clips make a few of each file."""
OTHERS: Mapping[str, Sequence[str]] = {
    "several lengths": ["wan_config.clip_lengths=[5, 9, 17]"],
    "chunks of several lengths": [
        "wan_config.clip_lengths=[5, 33]",
        "wan_config.frame_sample_strategy=chunks",
        "video_data.target_fps=8",
    ],
    "a short duration": ["video_data.max_duration=0.3"],
    "never across a cut": [
        "wan_config.avoid_cuts=true",
        "wan_config.frame_sample_strategy=keyframe",
        "wan_config.clips_per_video=3",
    ],
    **{
        f"slow files: {choice}": [f"video_data.slow_video={choice}", "video_data.target_fps=24"]
        for choice in ("repeat", "keep_rate", "skip")
    },
    "two sizes": ["video_data.resolution=[64x64, 128x48]"],
    "masks": ["video_data.masks=true"],
    "own settings of a source": [
        "video_data.sources=[{path: FOLDER, target_fps: 12, max_frames: 5, speed: 2}]"
    ],
    "deinterlaced": ["video_data.sources=[{path: FOLDER, interlaced: bottom_first}]"],
    "augmented": [
        "video_data.sources=[{path: FOLDER, augment: {flip: 1, crop: 0.3, brightness: 0.3}}]"
    ],
    "augmented random spans with masks": [
        "video_data.sources=[{path: FOLDER, augment: {flip: 0.5, hue: 0.1, variants: 2}}]",
        "wan_config.frame_sample_strategy=random",
        "wan_config.clips_per_video=2",
        "video_data.masks=true",
    ],
    "repeats and prefix": [
        "video_data.sources=[{path: FOLDER, repeats: 2, caption_prefix: A film of, "
        "trigger_word: ohwx}]"
    ],
}
"""Settings that change what is taken, besides the strategy; FOLDER is that of the clips."""
FEW = (
    *("good/cyclist_waits.avi", "good/rabbit_portrait.png", "odd/long_gop_with_cuts.mp4"),
    *("odd/variable_frame_rate.mkv", "odd/rotated_90.mp4", "odd/animated.gif", "odd/one_frame.mp4"),
    *("bad/corrupt_middle.mp4", "bad/empty.mp4"),
)


@pytest.fixture(scope="module")
def few(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with some of the clips, two of which have a mask."""
    folder = tmp_path_factory.mktemp("doctor_and_loader") / "few"
    folder.mkdir()
    for name in FEW:
        shutil.copy(clips / name, folder)
        shutil.copy((clips / name).with_suffix(".txt"), folder)
    for name, size in (("cyclist_waits", (640, 272)), ("rabbit_portrait", (960, 540))):
        mask = Image.new("L", size, 255)
        mask.paste(0, (0, 0, size[0] // 2, size[1]))
        mask.save(folder / f"{name}.mask.png")
    return folder


def settings(folder: Path, *more: str) -> list[str]:
    has_lengths = any("clip_lengths" in each for each in more)
    return [
        f"video_data.sources=[{{path: {folder.as_posix()}}}]",
        f"video_data.cache_dir={(folder.parent / 'cache').as_posix()}",
        "video_data.min_resolution=[1, 1]",
        f"wan_config.max_frames={'null' if has_lengths else 9}",
        "model.device=cpu",
        "validation.share=0.2",
        *(each.replace("FOLDER", folder.as_posix()) for each in more),
    ]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_for_every_strategy(run_file: RunFile, mixed: Path, strategy: str) -> None:  # noqa: F811
    chosen = [f"wan_config.frame_sample_strategy={strategy}", *FEWER_CLIPS.get(strategy, [])]
    found = compare(run_file("t2v-a14b", *settings(mixed, *chosen)))
    assert {problem.path.name for problem in found.report.problems} == BAD.keys()


@pytest.mark.parametrize("case", OTHERS)
def test_for_other_settings(run_file: RunFile, few: Path, case: str) -> None:
    found = compare(run_file("t2v-a14b", *settings(few, *OTHERS[case])))
    refused = {problem.path.name for problem in found.report.problems}
    slow = {"variable_frame_rate.mkv", "animated.gif"} if case == "slow files: skip" else set()
    assert {"corrupt_middle.mp4", "empty.mp4"} | (slow & refused) == refused
    assert bool(slow) == bool(slow & refused)


def test_for_images_to_video(run_file: RunFile, few: Path) -> None:
    compare(run_file("i2v-a14b", *settings(few)))


def compare(config: ResolvedRun) -> Examination:
    """Fails unless doctor says of each clip what the loader yields of it; returns what it said."""
    found = examine(config, lambda: ENVIRONMENT, previews=True, advance=lambda *_: None)
    said = {clip["name"]: clip for clip in found.as_data()["clips"]}
    data = WanModelSetup(config).dataset([], no_progress)
    assert said.keys() == {clip.name for clip in (*data.clips, *data.validation_clips)}
    assert {name for name, clip in said.items() if clip["held_out"]} == {
        clip.name for clip in data.validation_clips
    }
    assert {(p.path, p.reason) for p in found.report.problems} == {
        (p.path, p.reason) for p in data.report.problems
    }
    assert {(w.path, w.text) for w in data.report.warnings} <= {
        (w.path, w.text) for w in found.report.warnings
    }
    previews = {item.clip.name: item.preview for item in found.clips}
    clips = {clip.name: clip for clip in (*data.clips, *data.validation_clips)}
    assert config.model.path is not None
    model = WanModelLoader().load(config.model.path, dtype=torch.float32, device="cpu")
    yielded = passes(config, data)
    assert yielded.keys() == said.keys()
    for name, (batch, index) in yielded.items():
        one, clip = said[name], clips[name]
        # Read and encoded here, from what is said alone.
        times = [one["start"] + k / one["fps"] for k in range(one["frames"])]
        assert times[-1] == one["end"]
        fit = Fit(one["width"], one["height"])
        if clip.variation is None:
            frames = read_frames(clip.path, times, fit, fields=one["fields"])
        else:  # which is drawn, and shown on the page
            frames = decode(clip).frames
        latents = encode_frames(model, frames, "float32", with_condition=False)["latents"]
        assert torch.equal(batch.latents[index], latents), name
        assert batch.captions[index] in one["captions"]
        # Ones where another clip of the batch has a mask.
        is_masked = batch.mask is not None and bool((batch.mask[index] != 1).any())
        assert is_masked == (one["mask"] is not None)
        preview = previews[name]
        assert preview is not None and preview.size == small_size(clip.size)
        if one["mask"] is None:  # which is shown in red
            for shown, frame in zip((0, -1), (frames[0], frames[-1]), strict=True):
                picture = Image.open(io.BytesIO(preview.frames[shown]))
                trained = Image.fromarray(frame)
                assert np.abs(coarse(picture) - coarse(trained)).mean() < 2.5, name
    return found


def passes(config: ResolvedRun, data: Dataset) -> dict[str, tuple[Batch, int]]:
    """A batch, and the index in it, of each clip that the loader yields: in as many passes as there
    are alternatives of a clip, and of those that are validated on."""
    loader = WanDataLoader(
        {"high": data.clips},
        data.source,
        conditioning_of(config.model.facts()),
        batch_size=2,
        accumulation=1,
        seed=config.train.seed,
    )
    steps = loader.batches_per_epoch["high"] * max(clip.takes for clip in data.clips)
    batches = [
        batch
        for step in loader.steps(0, steps, lambda number: ("high", number))
        for batch in step.batches
    ]
    batches += loader.validation_batches(data.validation_clips, len(data.validation_clips))
    return {name: (batch, index) for batch in batches for index, name in enumerate(batch.names)}


def coarse(picture: Image.Image) -> np.ndarray:
    """The picture in 16x10 cells, in which JPEG's losses do not show."""
    return np.asarray(picture.resize((16, 10), Image.Resampling.BOX), np.float32)
