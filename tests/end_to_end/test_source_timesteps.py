"""Sources with timesteps of their own: which expert trains which clips, and at which timesteps."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.runs import RunFile, outcome, recorder

from onewan.cli.plan import plan_of
from onewan.config.schema import ResolvedRun
from onewan.data.buckets import expected_buckets
from onewan.data.probes import MediaProbes
from onewan.data.run_clips import clips_of_run
from onewan.doctor.environment import Environment
from onewan.doctor.examination import examine
from onewan.doctor.torch_facts import Torch
from onewan.errors import CheckpointError, ConfigError
from onewan.media.write import write_video
from onewan.train.run import Run
from onewan.train.setup import WanModelSetup
from onewan.train.trainer import WanTrainer

MACHINE = Environment(
    onewan="0.1.0",
    python="3.12.0",
    system="Linux",
    processor="8 CPU cores",
    memory=64 * 10**9,
    disk_free=10**12,
    torch=Torch(version="2.9.0", build="CPU only"),
    cards=(),
    driver="",
    packages={},
    optional={},
    extras={},
    variables={},
)
SMALL = "wan_config.max_frames=5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of short clips: three of `style`, two of `motion`, one of `both`, a broken one."""
    root = tmp_path_factory.mktemp("sources")
    draw = np.random.default_rng(5)
    sizes = {"motion": (96, 48), "style": (64, 64), "both": (64, 64)}
    for name, count in (("style", 3), ("motion", 2), ("both", 1)):
        (root / name).mkdir()
        for number in range(count):
            width, height = sizes[name]
            pixels = draw.integers(0, 255, (6, height, width, 3), np.uint8)
            write_video(root / name / f"{name}{number}.mp4", pixels, fps=16)
            (root / name / f"{name}{number}.txt").write_text(f"{name} {number}", encoding="utf-8")
    (root / "broken").mkdir()
    (root / "broken" / "broken.mp4").write_bytes(b"no video")
    (root / "broken" / "broken.txt").write_text("broken", encoding="utf-8")
    return root


@pytest.fixture
def sources_run(run_file: RunFile, folder: Path, tmp_path: Path) -> RunFile:
    """`sources_run("style: low", "motion: high", ..., settings=[...])`: a run on these folders."""

    def build(*sources: str, settings: list[str], name: str = "run") -> ResolvedRun:
        listed = [source.partition(": ") for source in sources]
        written = ", ".join(
            f"{{path: '{(folder / path).as_posix()}'{own and f', timesteps: {own}'}}}"
            for path, _, own in listed
        )
        cache = f"video_data.cache_dir={(tmp_path / 'cache').as_posix()}"
        all_of_them = [f"video_data.sources=[{written}]", SMALL, cache, *settings]
        return run_file("t2v-a14b", *all_of_them, name=name)

    return build


def names_by_expert(run: Run) -> dict[str, Counter[str]]:
    """How often each expert has each clip in the steps of the run."""
    found: dict[str, Counter[str]] = {name: Counter() for name in run.state.experts}
    for step in run.loader.steps(0, run.config.train.steps, run.schedule.expert_at):
        found[step.expert].update(name for batch in step.batches for name in batch.names)
    return found


STYLE, MOTION = ["style0.mp4", "style1.mp4", "style2.mp4"], ["motion0.mp4", "motion1.mp4"]


@pytest.mark.parametrize("stratified", ["true", "false"])
def test_style_of_the_low_expert_and_motion_of_the_high_one_resume_bit_for_bit(
    sources_run: RunFile, stratified: str
) -> None:
    settings = [
        "train={steps: 8, batch_size: 2, switch_expert_every: 1, save_every: 3}",
        f"train.timesteps.stratified={stratified}",
    ]
    own = ("style: low", "motion: high", "both: [0.5, 0.95]")
    events: list[dict[str, Any]] = []
    whole = sources_run(*own, settings=settings, name="whole")
    WanTrainer(whole, listen=recorder(events)).fit()
    ranges = {"low": (0.0, 0.875), "high": (0.875, 1.0)}
    steps = [event for event in events if event["event"] == "step"]
    assert len(steps) == 8
    for event in steps:
        lowest, highest = ranges[event["expert"]]
        assert all(lowest <= t < highest for t in event["t"])
    overview = next(event for event in events if event["event"] == "overview")
    assert (overview["clips"], overview["expert_clips"]) == (6, {"high": 3, "low": 4})
    assert overview["seen"] == {"high": 4 / 2, "low": 4 / 2}  # two batches each
    run = WanModelSetup(whole).build()
    for step in run.loader.steps(0, 8, run.schedule.expert_at):
        for batch in step.batches:
            noised = run.objective.add_noise(batch, step, run.state.experts[step.expert].expert)
            for name, t in zip(batch.names, noised.t_host, strict=True):
                assert name in {"low": STYLE, "high": MOTION}[step.expert] or (
                    name == "both0.mp4" and 0.5 <= t <= 0.95
                )

    for index, count in enumerate((5, 8)):
        part = sources_run(*own, settings=[*settings, f"train.steps={count}"], name="resumed")
        WanTrainer(part, resume=bool(index)).fit()
    (tensors, steps), (again, steps_again) = outcome(whole), outcome(part)
    assert steps == steps_again
    assert [name for name in tensors if not torch.equal(tensors[name], again[name])] == []


def test_an_epoch_of_an_expert_has_each_of_its_own_clips_once(sources_run: RunFile) -> None:
    settings = ["train={epochs: 2, switch_expert_every: 1}"]
    config = sources_run("style: low", "motion: high", "both", settings=settings)
    run = WanModelSetup(config).build()
    both = {"both0.mp4": 2}
    assert names_by_expert(run) == {
        "low": {**dict.fromkeys(STYLE, 2), **both},
        "high": {**dict.fromkeys(MOTION, 2), **both},
    }
    assert run.loader.batches_per_epoch == {"high": 3, "low": 4}
    assert expected_buckets(config).batches_per_epoch == {"high": 3, "low": 4}
    assert run.config.train.steps == 2 * (3 + 4) == plan_of(config, 10**11, 10**11).run_time.steps
    assert run.steps_of_epochs(2) == (
        "2 epochs of 6 clips: 14 steps, 6 for the high expert, 8 for the low expert"
    )
    # Where another share is given, the sum of the steps is divided by it.
    shared = sources_run(
        "style: low", "motion: high", settings=[*settings, "train.high_expert_share=0.25"]
    )
    run = WanModelSetup(shared).build()
    assert run.config.train.steps == 2 * (2 + 3)
    assert [run.steps_before(name, 10) for name in ("high", "low")] == [3, 7]


def test_an_expert_without_usable_clips_is_an_error_before_anything_is_encoded(
    sources_run: RunFile,
) -> None:
    config = sources_run("style: low", "broken: high", settings=["video_data.cache=false"])
    with pytest.raises(ConfigError) as refusal:
        WanModelSetup(config).build()
    said = (
        "video_data.sources: has no clip for the high expert, which is trained at 0.875 to 1: "
        "video_data.sources.0 has other timesteps, video_data.sources.1 has no clip that is "
        "trained on; add a source for it, or train the low expert alone: model.experts=low"
    )
    assert list(refusal.value.problems) == [said]
    examination = examine(config, lambda: MACHINE, previews=False, advance=lambda *_: None)
    assert said in [finding.text for finding in examination.of_run if finding.severity == "problem"]


def test_clips_whose_own_density_does_not_reach_a_range_are_an_error_that_names_the_source(
    sources_run: RunFile,
) -> None:
    """The table begins at 0.44 for clips of this size, and at 0.97 for the official one."""
    timesteps = (
        "train.timesteps={distribution: table, weights: [0, 0, 0, 1], shift_by_tokens: true}"
    )
    config = sources_run("style", "motion: [0.1, 0.3]", settings=[timesteps, "model.experts=low"])
    with pytest.raises(ConfigError) as refusal:
        WanModelSetup(config).build()
    (line,) = refusal.value.problems
    assert line.startswith(
        "video_data.sources.1.timesteps: for clips of 5 frames at 80x48, such as motion0.mp4, "
    )
    assert "train.timesteps draws nothing from 0.1 to 0.3, where the low expert trains" in line
    settings = [timesteps, "model.experts=low"]
    assert WanModelSetup(sources_run("style", "motion: [0.5, 0.8]", settings=settings)).build()


def test_timesteps_are_part_of_the_data_set_and_not_of_the_cache(sources_run: RunFile) -> None:
    settings = ["train={steps: 2, switch_expert_every: 1}"]
    plain = WanModelSetup(sources_run("style", "motion", settings=settings)).build().dataset
    assert plain.encoded > 0
    digests = {plain.digest}
    for timesteps in ("low", "[0, 0.6]", "[0, 0.6], weighting: min_snr"):
        config = sources_run(f"style: {timesteps}", "motion", settings=settings)
        dataset = WanModelSetup(config).build().dataset
        assert dataset.encoded == 0
        digests.add(dataset.digest)
    assert len(digests) == 4
    # All timesteps are the same as none of its own.
    same = WanModelSetup(sources_run("style: [0, 1]", "motion", settings=settings)).build()
    assert same.dataset.digest == plain.digest

    WanTrainer(sources_run("style", "motion", settings=settings)).fit()
    other = sources_run("style: low", "motion", settings=["train={steps: 3}"])
    with pytest.raises(CheckpointError) as refusal:
        WanTrainer(other, resume=True).fit()
    assert any("spans or timesteps differ" in line for line in refusal.value.details)


def test_the_largest_batch_is_tried_by_the_expert_that_trains_it(
    sources_run: RunFile, sim: torch.device
) -> None:
    events: list[dict[str, Any]] = []
    settings = ["train={steps: 1}", f"model.device={sim}"]
    config = sources_run("style: low", "motion: high", settings=settings)
    WanTrainer(config, listen=recorder(events)).fit()
    assert [event["expert"] for event in events if event["event"] == "step"] == ["high"]
    assert [event["bucket"] for event in events if event["event"] == "memory"] == ["5x64x64"]


def test_weighting_of_a_source_reaches_its_clips(sources_run: RunFile) -> None:
    own = "[0, 0.875], weighting: {kind: spline, points: [[0, 1], [0.5, 3]]}"
    config = sources_run(f"style: {own}", "motion", settings=["train.loss.weighting=min_snr"])
    report = clips_of_run(config, MediaProbes())
    found = {clip.name: clip.timesteps for clip in report.clips}
    assert type(found["style0.mp4"].weighting).__name__ == "Spline"
    assert found["style0.mp4"].t_max == 0.875
    assert found["motion0.mp4"].weighting is None
