"""Parts of a step's clips on several processes give the step of one process, but for the order in
which gradients are added: masks, kept predictions, prior clips and leftover batches included."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.equal_runs import (
    Trainer,
    assert_close,
    assert_equal,
    distance,
    events,
    failure_with_a_damaged_clip,
    first_gradients,
    first_gradients_in_small_messages,
    notes,
)
from support.runs import METHODS, PLACEHOLDER, RunFile, layout_of
from support.torchrun import together

pytestmark = pytest.mark.long

OPTIMIZER = "optimizer.lr=0.002"
BATCHES = {
    "whole batches": ["train.batch_size=1", "train.accumulation=4"],
    "parts of a batch": ["train.batch_size=4"],
    "both, and leftover batches": ["train.batch_size=3", "train.accumulation=2"],
}
"""How the clips of a step are divided among two or four processes."""


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("variant", ["t2v-a14b", "ti2v-5b"])
def test_gradients_are_those_of_one_process(
    run_file: RunFile, tmp_path: Path, footage: list[str], variant: str, batches: str
) -> None:
    settings = [*footage, *BATCHES[batches], "parallel.experts=together"]
    run_file(variant, *settings)
    one = first_gradients(tmp_path / "run.yaml", settings)
    assert len(one) > 10
    for processes in (2, 4):
        all_equal, *others = together(
            processes, first_gradients_in_small_messages, tmp_path / "run.yaml", settings
        )
        for other in others:
            assert all(torch.equal(all_equal[name], other[name]) for name in one)
        assert all_equal.keys() == one.keys()
        for names in ({"loss"}, one.keys() - {"loss"}):
            whole, summed = (
                torch.cat([of[name].flatten() for name in sorted(names)]) for of in (one, all_equal)
            )
            assert distance(whole, summed) < 1e-6


@pytest.mark.parametrize("batches", BATCHES)
def test_fifty_steps_are_those_of_one_process(
    run_file: RunFile, tmp_path: Path, footage: list[str], batches: str
) -> None:
    settings = [
        *footage,
        *BATCHES[batches],
        OPTIMIZER,
        "train.steps=50",
        "train.ema={decay: 0.9}",
        "train.max_grad_norm=0.005",
        "train.save_every=25",
        "validation={clips: 3, every: 10}",
    ]
    trainer = Trainer(run_file=run_file, folder=tmp_path, variant="ti2v-5b", settings=settings)
    one = trainer.train("one")
    norms = [norm for *_, norm, _, _, _ in events(one, "step")]
    assert min(norms) > 0.005, "every step is clipped"
    for processes in (2, 4):
        assert_close(one, trainer.train(f"{processes}", processes), 1e-5)


SHARED = {
    "schedule-free": ["optimizer={name: adamw_schedule_free, lr: 0.01}"],
    "prodigy": ["optimizer={name: prodigy}"],
    "muon": ["optimizer={name: muon, lr: 0.001}"],
    "8 bits": ["optimizer={name: adamw_low_bit, lr: 0.001}"],
    "dropout": ["method.dropout=0.3"],
    "embedding": METHODS["embedding"],
    "embedding and adapters": [PLACEHOLDER],
    "weights with Kahan sums": [
        "method={kind: fine_tune, weights: kahan}",
        "model.dtype=bfloat16",
        "parallel.weights=replicated",
    ],
    "no cache": ["video_data.cache=false"],
}


@pytest.mark.parametrize("case", SHARED)
def test_two_processes_with_a_batch_each_have_the_bits_of_one(
    run_file: RunFile, tmp_path: Path, workshop: Path, case: str
) -> None:
    """A sum of two gradients has the same bits in either order. Placeholders are in some captions
    only, so that a process may have no gradient of theirs."""
    settings = [
        "wan_config.max_frames=5",
        "train.steps=4",
        "train.save_every=2",
        "train.accumulation=2",
        "validation={clips: 3, every: 2}",
        *SHARED[case],
    ]
    if "embedding" in case:
        folder = tmp_path / "some named"
        shutil.copytree(workshop / "clips", folder)
        for name in ("red_square", "still_square"):
            (folder / f"{name}.txt").write_text("a <shape>", encoding="utf-8")
        settings.append(f"video_data.sources=[{{path: {folder.as_posix()}}}]")
    variant = "t2v-a14b" if case == "embedding and adapters" else "ti2v-5b"
    trainer = Trainer(run_file=run_file, folder=tmp_path, variant=variant, settings=settings)
    one, two = trainer.train("one"), trainer.train("two", 2)
    assert "2 processes, each with a part of every step's clips" in notes(two)
    assert_equal(one, two)


def test_a_loss_that_is_not_finite_ends_all_and_the_clip_is_named_where_it_is(
    run_file: RunFile, tmp_path: Path
) -> None:
    settings = ["train.accumulation=2", "train.save_every=1", f"output.dir={tmp_path.as_posix()}"]
    config = run_file("ti2v-5b", *settings)
    first, second = together(2, failure_with_a_damaged_clip, tmp_path / "run.yaml", settings, 1)
    assert first.startswith("step 2 (single expert): the loss is not finite with clips of rank 1,")
    assert second.startswith("step 2 (single expert): the loss is not finite with ")
    assert ". Look at that clip" in second
    assert layout_of(config).saved_steps() == [1]
