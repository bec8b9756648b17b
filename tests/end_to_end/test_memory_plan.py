"""What a run on a device does by its memory plan: events, the trial, batches that share loads."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import simulated_gpu
import torch
from support.runs import RunFile, layout_of, outcome
from support.tiny_models import TinyModels

from onewan.cli import main
from onewan.config.schema import ResolvedRun
from onewan.data.encode import no_progress
from onewan.errors import MemoryPlanError
from onewan.model import vae
from onewan.model.load import WanModelLoader
from onewan.model.wan import WanModel
from onewan.parallel.ranks import Alone
from onewan.runs.event_file import read_events
from onewan.sample.generate import SampleRequest, WanModelSampler
from onewan.sample.streaming import sampling_residency
from onewan.train.memory import RunMemory, plan_run
from onewan.train.setup import WanModelSetup
from onewan.train.trainer import WanTrainer

STREAMED = [
    "model.device=sim",
    "model.experts=high",
    "wan_config.max_frames=5",
    "train.steps=2",
    "train.accumulation=2",
    "memory.resident_blocks=0",
    "validation.clips=0",
]


def overrides_of(config: ResolvedRun) -> list[str]:
    own = [f"output.dir={config.output.dir}", f"model.path={config.model.path}"]
    return [*own, *STREAMED, f"memory.ram={config.memory.ram}"]


def events_of(config: ResolvedRun, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_events(layout_of(config).events) if e["event"] == kind]


@pytest.fixture
def streamed(run_file: RunFile, sim: torch.device, tmp_path: Path) -> RunFile:
    """Runs of a model with more blocks than the ring holds."""
    del sim
    model = TinyModels(tmp_path / "models", width=64, layers=4)("t2v-a14b")

    def make(name: str, *overrides: str) -> ResolvedRun:
        return run_file("t2v-a14b", f"model.path={model}", *STREAMED, *overrides, name=name)

    return make


def test_the_plan_the_trial_and_the_copied_bytes_are_in_the_events(streamed: RunFile) -> None:
    config = streamed("run")
    WanTrainer(config).fit()
    (plan,) = events_of(config, "plan")
    assert plan["plan"]["fits"] is True
    assert plan["device_peak"] == plan["plan"]["device_peak"] > 0
    (trial,) = events_of(config, "memory")
    assert trial["measured"] > 0 and trial["planned"] == plan["plan"]["phases"][-1]["device_bytes"]
    for step in events_of(config, "step"):
        assert step["bytes_to_device"] > 0
        assert step["bytes_to_host"] == 0


def test_the_trial_changes_no_result(streamed: RunFile, monkeypatch: pytest.MonkeyPatch) -> None:
    with_trial = streamed("with", "method.dropout=0.1")
    without = streamed("without", "method.dropout=0.1")
    WanTrainer(with_trial).fit()
    monkeypatch.setattr("onewan.train.trainer.try_largest_batch", lambda _: None)
    WanTrainer(without).fit()
    (tensors, steps), (others, other_steps) = outcome(with_trial), outcome(without)
    assert events_of(with_trial, "memory") and not events_of(without, "memory")
    assert steps == other_steps
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_small_batches_of_a_step_share_the_loads_of_a_block(
    streamed: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, apart = streamed("together"), streamed("apart")
    # As if the plan had a bucket of four clips' size besides the clips' own.
    cells = RunMemory._planned_cells
    monkeypatch.setattr(RunMemory, "_planned_cells", lambda self, bucket: 4 * cells(self, bucket))
    WanTrainer(together).fit()
    monkeypatch.setattr(RunMemory, "_planned_cells", cells)
    WanTrainer(apart).fit()
    (tensors, steps), (others, other_steps) = outcome(together), outcome(apart)
    assert steps == other_steps
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    shared, single = (events_of(c, "step")[-1]["bytes_to_device"] for c in (together, apart))
    assert shared == single / 2  # half of the forward and backward passes over the blocks


def test_clips_that_do_not_fit_are_encoded_in_strips_and_have_the_same_latents(
    streamed: RunFile, sim: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = list[int]()
    whole = vae.moments_in_strips

    def counted(*arguments: Any) -> torch.Tensor:
        used.append(arguments[2])
        return whole(*arguments)

    monkeypatch.setattr(vae, "moments_in_strips", counted)
    large = ("video_data.resolution=[384x128]", "sample={prompts: [], every: 0}")
    as_a_whole = streamed("whole", *large, f"video_data.cache_dir={tmp_path / 'whole'}")
    clips = WanModelSetup(as_a_whole).dataset([], no_progress)
    assert not used
    need = plan_run(as_a_whole, sim, clips.clips)
    assert need is not None
    (phase,) = (p for p in need.other_phases if p.phase == "encoding clips")
    # A device that has 80 % of what the clips need, and the driver's part.
    vram = (0.8 * phase.device_bytes + need.machine.context) / 0.95
    limit = f"memory.vram={vram / 1e6:.3f}MB"
    in_strips = streamed("strips", *large, limit, f"video_data.cache_dir={tmp_path / 'strips'}")
    parts = WanModelSetup(in_strips).dataset([], no_progress)
    assert used and min(used) > 1
    for clip in clips.clips:
        one, other = (data.source.video(clip, "none")["latents"] for data in (clips, parts))
        assert float((one - other).norm() / one.norm()) < 1e-5


def test_a_run_that_does_not_fit_is_refused_before_anything_is_encoded(
    streamed: RunFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = streamed("tiny", "memory.ram=1MB")
    assert main(["train", str(tmp_path / "tiny.yaml"), *overrides_of(config)]) != 0
    said = capsys.readouterr().err
    assert "memory: this run does not fit" in said and "of host memory" in said
    assert not events_of(config, "encoding") and not events_of(config, "data")


def test_processes_on_one_machine_share_the_memory_that_the_run_may_use(
    streamed: RunFile, sim: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = streamed("tiny", "memory.ram=32GB")
    clips = WanModelSetup(config).dataset([], no_progress).clips
    alone = plan_run(config, sim, clips)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    one_of_four = plan_run(config, sim, clips)
    assert alone is not None and one_of_four is not None
    budgets = [plan.machine.host_budget for plan in (alone, one_of_four)]
    assert budgets[0] == pytest.approx(4 * budgets[1], rel=1e-6)
    assert alone.machine.device_budget == pytest.approx(one_of_four.machine.device_budget, rel=0.1)
    need = alone.host_peak.host_bytes
    enough_for_one = streamed("small", f"memory.ram={2 * need / 1e6:.3f}MB")
    with pytest.raises(MemoryPlanError, match="does not fit") as refused:
        plan_run(enough_for_one, sim, clips)
    assert "each of 4 processes may use of its" in "".join(refused.value.details)


def test_a_run_is_planned_with_what_each_of_its_processes_has(
    streamed: RunFile, sim: torch.device
) -> None:
    class OneOfFour(Alone):
        count = 4

    fine_tuned = ("method={kind: fine_tune}", "train.accumulation=4", "parallel.experts=together")
    config = streamed("tiny", *fine_tuned, "sample.prompts=[]")
    clips = WanModelSetup(config).dataset([], no_progress).clips
    alone, shards = plan_run(config, sim, clips), plan_run(config, sim, clips, ranks=OneOfFour())
    assert alone is not None and shards is not None
    assert (alone.sharing.shards, shards.sharing.shards) == (1, 4)
    assert "shards of the blocks" in shards.worst.training.device
    tokens = ("train.accumulation=1", "parallel.sequence_parallel=4", "parallel.weights=replicated")
    shared = plan_run(streamed("tiny", *fine_tuned, *tokens), sim, clips, ranks=OneOfFour())
    assert shared is not None and (shared.sharing.shards, shared.sharing.sequence) == (1, 4)


def test_a_model_that_does_not_fit_is_sampled_from_streamed_blocks(
    sim: torch.device, tmp_path: Path
) -> None:
    path = TinyModels(tmp_path / "models", width=128, layers=6)("t2v-a14b")
    request = SampleRequest(
        prompt="a red square",
        negative_prompt="",
        image=None,
        width=64,
        height=64,
        frames=5,
        steps=4,
        guidance=(3.0, 3.0),
        shift=5.0,
        seed=1,
        fps=16.0,
    )
    expected = WanModelSampler(WanModelLoader().load(path), device="cpu").sample(request)
    model = WanModelLoader().load(path)
    assert model.transformer is not None
    expert = sum(p.nbytes for p in model.transformer.parameters())
    gpu = torch.get_device_module("sim")

    def video(model: WanModel) -> tuple[Any, int]:
        """The frames, and what is on the device between two denoising steps."""
        allocated: list[int] = []
        residency = sampling_residency(model, sim)
        frames = WanModelSampler(model, residency=residency).sample(
            request, on_step=lambda *_: allocated.append(gpu.memory_allocated())
        )
        return frames, max(allocated)

    gc.collect()  # what earlier tests left on the device
    start = gpu.memory_allocated()
    whole, on_device = video(model)
    assert on_device - start > expert
    simulated_gpu.set_capacity(start + int(1.6 * expert))
    del model
    gc.collect()
    streamed, on_device = video(WanModelLoader().load(path))
    assert on_device - start < 0.9 * expert
    for frames in (whole, streamed):
        assert abs(frames.astype(int) - expected.astype(int)).mean() < 0.1
