"""Weights that are sharded over processes (FSDP2) train as those of one process: gradients, losses,
states and exported files are the same, but for the order in which gradients are added."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.equal_runs import (
    Trainer,
    assert_close,
    distance,
    events,
    first_gradients,
    notes,
    settings_of,
    vectors,
)
from support.runs import CLASS_WORD, METHODS, RunFile, layout_of
from support.tiny_models import TinyModels
from support.torchrun import together, train

from onewan.train.state_export import export_state
from onewan.variants import VariantName

pytestmark = pytest.mark.long

FLOAT32 = "method={kind: fine_tune, weights: float32}"
KAHAN = ["method={kind: fine_tune, weights: kahan}", "model.dtype=bfloat16"]
SHORT = "wan_config.max_frames=5"
SHARDED = "the weights of blocks are sharded"
BATCHES = {
    "whole batches": ["train.batch_size=1", "train.accumulation=4"],
    "unequal numbers of batches": ["train.batch_size=2", "train.accumulation=3"],
    "parts of a batch": ["train.batch_size=4"],
}
"""Of the second, processes have one batch or two, and leftover ones of the five clips."""


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("variant", ["t2v-a14b", "ti2v-5b"])
def test_gradients_are_those_of_one_process(
    run_file: RunFile, tmp_path: Path, variant: VariantName, batches: str
) -> None:
    settings = [SHORT, FLOAT32, "parallel.experts=together", *BATCHES[batches]]
    run_file(variant, *settings)
    one = first_gradients(tmp_path / "run.yaml", settings)
    for processes in (2, 4):
        first, *others = together(processes, first_gradients, tmp_path / "run.yaml", settings)
        assert first.keys() == one.keys() and len(one) > 40
        assert all(torch.equal(first[name], other[name]) for other in others for name in one)
        whole, summed = (torch.cat([of[n].flatten() for n in sorted(one)]) for of in (one, first))
        assert distance(whole, summed) < 1e-6


def test_many_steps_are_those_of_one_process(run_file: RunFile, tmp_path: Path) -> None:
    settings = [
        *(SHORT, FLOAT32, *BATCHES["unequal numbers of batches"]),
        "optimizer.lr=0.001",
        "train.steps=30",
        "train.save_every=15",
        "train.keep_best=true",
        "train.ema={decay: 0.9}",
        "train.max_grad_norm=0.1",
        "validation={clips: 3, every: 10}",
    ]
    trainer = Trainer(run_file=run_file, folder=tmp_path, variant="ti2v-5b", settings=settings)
    one = trainer.train("one")
    assert min(norm for *_, norm, _, _, _ in events(one, "step")) > 0.1, "every step is clipped"
    for processes in (2, 4):
        several = trainer.train(f"{processes}", processes)
        assert any(note.endswith(SHARDED) for note in notes(several))
        assert_close(one, several, 1e-5)


def test_both_experts_at_a_time_with_sample_videos(
    run_file: RunFile, tmp_path: Path, workshop: Path
) -> None:
    """Each of four processes samples with its shards of both experts, of which it trains one. What
    is exported of a state is what the run has exported."""
    settings = [
        *settings_of("fine_tune", workshop),
        *(FLOAT32, "train.steps=4", "train.accumulation=2", "train.max_grad_norm=1"),
        "sample={prompts: [a red square, a ball], every: 4, frames: 5, width: 64, height: 64}",
        "sample.steps=2",
    ]
    trainer = Trainer(run_file=run_file, folder=tmp_path, variant="t2v-a14b", settings=settings)
    one, four = trainer.train("one"), trainer.train("four", 4)
    assert any("both experts" in note and note.endswith(SHARDED) for note in notes(four))
    assert_close(one, four, 1e-5)
    videos = [sorted(layout_of(each).samples(4).glob("*.mp4")) for each in (one, four)]
    assert [v.name for v in videos[0]] == [v.name for v in videos[1]] == ["0.mp4", "1.mp4"]
    (tmp_path / "exported").mkdir()
    exported = export_state(four, layout_of(four), 4, tmp_path / "exported", format_in_name=False)
    for file in exported:
        file.write(file.path)
        written = load_file(layout_of(four).weights_dir / file.path.name)
        again = load_file(file.path)
        assert written.keys() == again.keys()
        assert all(torch.equal(written[name], again[name]) for name in written)
    assert len(list((tmp_path / "exported").iterdir())) == 4  # two experts and their averages


def test_the_base_of_adapters_is_sharded_if_that_is_wanted(
    run_file: RunFile, tmp_path: Path, workshop: Path
) -> None:
    """Prior clips and kept predictions are passes of the base model, which only some processes
    have in a step; adapters themselves are on every process. DoRA's files need the base's norms."""
    settings = [
        SHORT,
        "parallel={experts: together, weights: sharded}",
        "method={kind: dora, rank: 8}",
        f"video_data.sources=[{{path: {(workshop / 'clips').as_posix()}}},"
        f" {{path: {(workshop / 'named clips').as_posix()}, target: base}}]",
        *(*CLASS_WORD, "train.preservation_weight=3"),
        *BATCHES["unequal numbers of batches"],
        # Adam would give steps of full size to weights whose gradients are rounding error.
        *("optimizer={name: sgd, lr: 0.5}", "train.steps=6", "train.switch_expert_every=1"),
        "validation={clips: 3, every: 3}",
    ]
    trainer = Trainer(run_file=run_file, folder=tmp_path, variant="t2v-a14b", settings=settings)
    one = trainer.train("one")
    for processes in (2, 4):
        assert_close(one, trainer.train(f"{processes}", processes), 1e-5)


def test_embeddings_beside_a_sharded_base_are_saved(
    run_file: RunFile, tmp_path: Path, workshop: Path
) -> None:
    settings = [
        *(SHORT, "parallel.weights=sharded", *METHODS["embedding"], "train.accumulation=2"),
        f"video_data.sources=[{{path: {(workshop / 'named clips').as_posix()}}}]",
        *("train.steps=4", "train.save_every=2"),
    ]
    trainer = Trainer(run_file=run_file, folder=tmp_path, variant="ti2v-5b", settings=settings)
    one = trainer.train("one")
    trainer.train("two", 2, stop_after=2)
    two = trainer.train("two", 2, resume=True)
    assert "4/embeddings" in vectors(two)
    assert_close(one, two, 1e-5)


CHOICES = {
    "Kahan sums": KAHAN,
    "some layers, in float32": [
        "method={kind: fine_tune, weights: float32, modules: [self_attention, biases]}",
        "model.dtype=bfloat16",
    ],
    **{
        name: [FLOAT32, f"optimizer.name={name}"] for name in ("adamw_schedule_free", "lion", "sgd")
    },
}


@pytest.mark.parametrize("choice", CHOICES)
def test_two_processes_with_a_batch_each_have_the_bits_of_one(
    run_file: RunFile, tmp_path: Path, choice: str
) -> None:
    """Every optimizer that computes each value by itself, Kahan sums of bfloat16 weights, and
    blocks of which some layers are trained, in another dtype."""
    settings = [
        *(SHORT, *CHOICES[choice], "optimizer.lr=0.001", "train.accumulation=2", "train.steps=4"),
        *("train.max_grad_norm=null", "train.ema={decay: 0.9}", "validation={clips: 2, every: 2}"),
    ]
    trainer = Trainer(run_file=run_file, folder=tmp_path, variant="ti2v-5b", settings=settings)
    one, two = trainer.train("one"), trainer.train("two", 2)
    assert [(loss, t) for _, _, loss, *_, t in events(one, "step")] == [
        (loss, t) for _, _, loss, *_, t in events(two, "step")
    ]
    assert events(one, "validation") == events(two, "validation")
    first, second = vectors(one), vectors(two)
    assert first.keys() == second.keys() and len(first) > 2
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_stochastic_rounding_draws_for_each_shard(run_file: RunFile, tmp_path: Path) -> None:
    """Other draws than in one process, but for what is not sharded: the same expected weights."""
    settings = [
        *(SHORT, "method={kind: fine_tune, weights: stochastic}", "model.dtype=bfloat16"),
        *("optimizer.lr=0.001", "train.accumulation=2", "train.steps=4"),
    ]
    trainer = Trainer(run_file=run_file, folder=tmp_path, variant="ti2v-5b", settings=settings)
    one, two = (vectors(trainer.train(name, int(name))) for name in "12")
    (weights, *_) = [name for name in one if name.endswith("/single")]
    far = distance(one[weights], two[weights])
    assert 0 < far < 2**-8, "a bfloat16 has eight bits"
    # Two shards with the same draws would be rounded alike.
    again = vectors(trainer.train("again", 2))
    assert all(torch.equal(two[name], again[name]) for name in two)


COUNTS = (1, 2, 4)


def test_any_number_of_processes_continues_what_another_has_saved(
    run_file: RunFile, tmp_path: Path
) -> None:
    settings = [
        *(SHORT, FLOAT32, "train.accumulation=4", "train.steps=4"),
        *("train.save_every=2", "train.keep_last=1"),
        *("train.ema={decay: 0.9}", "optimizer.lr=0.001", "train.max_grad_norm=0.1"),
    ]
    trainer = Trainer(run_file=run_file, folder=tmp_path, variant="ti2v-5b", settings=settings)
    whole = trainer.train("whole")
    for before in COUNTS:
        stopped = layout_of(trainer.train(f"from {before}", before, stop_after=2))
        assert (stopped.state(2) / "single.shards").is_dir() == (before > 1)
        for after in COUNTS:
            name = f"{before} to {after}"
            shutil.copytree(tmp_path / f"from {before}", tmp_path / name)
            assert_close(whole, trainer.train(name, after, resume=True), 1e-5)


def train_on_two_machines(*arguments: Any) -> None:
    """`train` in a process of which there are two on each machine, by what torchrun says."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    train(*arguments)


def test_each_machine_has_all_shards_if_that_is_wanted(run_file: RunFile, tmp_path: Path) -> None:
    """HSDP: two machines of two processes."""
    settings = [
        *(SHORT, FLOAT32, "parallel.weights=sharded_per_machine", "optimizer.lr=0.001"),
        *(*BATCHES["unequal numbers of batches"], "train.steps=4", "train.max_grad_norm=0.1"),
    ]
    trainer = Trainer(run_file=run_file, folder=tmp_path, variant="ti2v-5b", settings=settings)
    one = trainer.train("one")
    overrides = [*settings, f"output.dir={(tmp_path / 'four').as_posix()}"]
    four = run_file("ti2v-5b", *overrides)
    together(4, train_on_two_machines, tmp_path / "run.yaml", overrides)
    assert any(note.endswith(f"{SHARDED} within each machine") for note in notes(four))
    assert_close(one, four, 1e-5)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_tokens_and_weights(
    run_file: RunFile, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, processes: int
) -> None:
    """FSDP2 and Ulysses: two or four processes, two for each clip."""
    model = TinyModels(tmp_path_factory.mktemp("heads"), width=64, layers=2)("ti2v-5b")
    settings = [
        f"model.path={model.as_posix()}",
        *(SHORT, FLOAT32, "train.accumulation=3", "train.steps=6", "optimizer.lr=0.001"),
        *("train.max_grad_norm=0.1", "validation={clips: 3, every: 3}"),
    ]
    trainer = Trainer(run_file=run_file, folder=tmp_path, variant="ti2v-5b", settings=settings)
    one = trainer.train("one")
    several = trainer.train("several", processes, "parallel.sequence_parallel=2")
    (said,) = [note for note in notes(several) if note.endswith(SHARDED)]
    assert "2 of them share the tokens of a clip" in said
    assert_close(one, several, 1e-5)
