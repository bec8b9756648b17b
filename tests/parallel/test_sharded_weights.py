"""Weights that are sharded over processes (FSDP2) train as those of one process: gradients, losses,
states and exported files are the same, but for the order in which gradients are added."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.equal_runs import (
    Trainer,
    assert_close,
    distance,
    events,
    first_gradients,
    notes,
    settings_of,
)
from support.runs import RunFile, layout_of
from support.torchrun import together

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
    """Each of four processes samples with its shards of both experts, of which it trains one."""
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
