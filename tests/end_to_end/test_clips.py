"""A run on clips of several lengths and sizes, random spans, and images among videos."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.runs import RunFile, recorder

from onewan.config.schema import ResolvedRun
from onewan.data.buckets import expected_buckets
from onewan.data.clip import alternatives, count_clips
from onewan.media import write_video
from onewan.runs.event_file import read_events
from onewan.train.run import Run
from onewan.train.setup import WanModelSetup
from onewan.train.trainer import WanTrainer

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three videos of two shapes, one of them short, and two images."""
    folder = tmp_path_factory.mktemp("mixed")
    draw = np.random.default_rng(3)
    for name, frames, size in (("a", 40, (64, 64)), ("b", 30, (96, 48)), ("c", 6, (64, 64))):
        pixels = draw.integers(0, 255, (frames, size[1], size[0], 3), np.uint8)
        write_video(folder / f"{name}.mp4", pixels, fps=16)
    for name, red in (("d", 90), ("e", 180)):
        Image.new("RGB", (64, 64), (red, 140, 30)).save(folder / f"{name}.png")
    for name in "abcde":
        (folder / f"{name}.txt").write_text(f"clip {name}", encoding="utf-8")
    return folder


def mixed_run(run_file: RunFile, folder: Path, *overrides: str) -> ResolvedRun:
    return run_file(
        "t2v-a14b",
        f"video_data.sources=[{{path: '{folder.as_posix()}', repeats: 2}}]",
        "wan_config={clip_lengths: [5, 9], frame_sample_strategy: random, clips_per_video: 3}",
        *overrides,
    )


def test_lengths_sizes_spans_and_images_mix(run_file: RunFile, mixed: Path, tmp_path: Path) -> None:
    config = mixed_run(
        run_file,
        mixed,
        "train={epochs: 3, batch_size: 3, switch_expert_every: 1}",
        f"video_data.cache_dir={(tmp_path / 'cache').as_posix()}",
    )
    events = list[dict[str, Any]]()
    run = WanModelSetup(config).build()
    groups = alternatives(run.dataset.clips)
    # Two lengths of a and b, one of c, which is short, and the images.
    assert Counter((g[0].path.name, g[0].frames, len(g)) for g in groups) == {
        ("a.mp4", 5, 3): 1,
        ("a.mp4", 9, 3): 1,
        ("b.mp4", 5, 3): 1,
        ("b.mp4", 9, 3): 1,
        ("c.mp4", 5, 1): 1,  # its three spans would be the same
        ("d.png", 1, 1): 1,
        ("e.png", 1, 1): 1,
    }
    group_of = {clip.name: index for index, group in enumerate(groups) for clip in group}
    per_epoch = run.loader.batches_per_epoch["high"]
    # Shapes: a and c of 5 frames (4 samples), a of 9 (2), b of 5 (2), b of 9 (2), images (4).
    assert per_epoch == 2 + 1 + 1 + 1 + 2
    assert expected_buckets(config).batches_per_epoch == run.loader.batches_per_epoch
    seen, sizes = dict[str, Counter[str]](), list[int]()
    for step in run.loader.steps(0, run.config.train.steps, run.schedule.expert_at):
        (batch,) = step.batches
        assert step.global_size == len(batch) == len(set(batch.sample_indices))
        seen.setdefault(step.expert, Counter()).update(batch.names)
        sizes.append(len(batch))
    assert run.config.train.steps == 2 * 3 * per_epoch
    assert sum(sizes) == 2 * 3 * 2 * count_clips(run.dataset.clips) and min(sizes) == 1
    for counts in seen.values():
        in_groups = Counter[int]()
        for name, number in counts.items():
            in_groups[group_of[name]] += number
        assert set(in_groups.values()) == {6} and len(in_groups) == len(groups)
        # Three epochs with two samples of each: every one of the three spans comes twice.
        assert all(counts[clip.name] == 6 // clip.takes for group in groups for clip in group)

    WanTrainer(config, listen=recorder(events)).fit()
    data = next(event for event in events if event["event"] == "data")
    assert data["clips"] == count_clips(run.dataset.clips) == 7
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert len(losses) == run.config.train.steps and np.isfinite(losses).all()


def test_a_run_with_random_spans_goes_on_as_if_it_had_not_stopped(
    run_file: RunFile, mixed: Path, tmp_path: Path
) -> None:
    found = list[list[float]]()
    for name, steps in (("whole", (8,)), ("resumed", (5, 8))):
        for index, count in enumerate(steps):
            config = mixed_run(
                run_file,
                mixed,
                f"train={{steps: {count}, batch_size: 2, switch_expert_every: 1}}",
                f"video_data.cache_dir={(tmp_path / 'cache').as_posix()}",
                f"output.name={name}",
            )
            WanTrainer(config, resume=bool(index)).fit()
        events = read_events(tmp_path / "runs" / name / "events.jsonl")
        found.append([event["loss"] for event in events if event["event"] == "step"])
    assert found[0] == found[1] and len(found[0]) == 8


def test_augmentation_encodes_its_variants_and_nothing_else(
    run_file: RunFile, mixed: Path, tmp_path: Path
) -> None:
    def built(augment: str, *overrides: str) -> Run:
        source = f"{{path: '{mixed.as_posix()}'{augment}}}"
        config = run_file(
            "t2v-a14b",
            f"video_data.sources=[{source}]",
            f"video_data.cache_dir={(tmp_path / 'cache').as_posix()}",
            "train={epochs: 3, switch_expert_every: 1}",
            *overrides,
        )
        return WanModelSetup(config).build()

    plain = built("")
    assert plain.dataset.encoded == 5 + 5  # clips and captions
    augment = ", augment: {flip: 1, crop: 0.2, hue: 0.02, variants: 2}"
    run = built(augment)
    assert run.dataset.encoded == 2 * 5 and built(augment).dataset.encoded == 0
    assert built(augment.replace("0.02", "0.03")).dataset.encoded == 2 * 5
    assert run.loader.batches_per_epoch == plain.loader.batches_per_epoch == {"high": 5, "low": 5}
    seen = Counter(
        name
        for step in run.loader.steps(0, run.config.train.steps, run.schedule.expert_at)
        for batch in step.batches
        for name in batch.names
    )
    # In three epochs of two experts, each clip comes as it is once, and each variant once.
    assert len(seen) == 15 and set(seen.values()) == {2}
    assert "  with augmented variants: 5 clips" in run.dataset.report.lines()
    held_out = built(augment, "validation={clips: 2, share: 0.4}").dataset.validation_clips
    assert len(held_out) == 2 and all(clip.variation is None for clip in held_out)
