"""Parts of a step's clips on several processes give the step of one process, but for the order in
which gradients are added: masks, kept predictions, prior clips and leftover batches included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.equal_runs import (
    Trainer,
    assert_close,
    distance,
    events,
    first_gradients,
)
from support.runs import CLASS_WORD, RunFile
from support.torchrun import together

from onewan.media import VIDEO_SUFFIXES, probe

pytestmark = pytest.mark.long

OPTIMIZER = "optimizer.lr=0.002"
BATCHES = {
    "whole batches": ["train.batch_size=1", "train.accumulation=4"],
    "parts of a batch": ["train.batch_size=4"],
    "both, and leftover batches": ["train.batch_size=3", "train.accumulation=2"],
}
"""How the clips of a step are divided among two or four processes."""


@pytest.fixture(scope="module")
def footage(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Sources of clips, some with masks, some with a class word, some of them prior clips."""
    folder = tmp_path_factory.mktemp("masked")
    for file in (workshop / "clips").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
        if file.suffix[1:] in VIDEO_SUFFIXES and "red" not in file.name:
            size = probe(file)
            ramp = np.tile(np.linspace(0, 255, size.width, dtype=np.uint8), (size.height, 1))
            Image.fromarray(ramp).save(folder / f"{file.stem}.mask.png")
    prior = workshop / "named clips"
    return [
        f"video_data.sources=[{{path: {folder.as_posix()}, loss_weight: 2.5}},"
        f" {{path: {prior.as_posix()}, target: base}}]",
        *CLASS_WORD,
        "wan_config.max_frames=5",
        "video_data.masks=true",
        "train.loss.unmasked_weight=0.2",
        "train.preservation_weight=3",
        "train.caption_dropout=0.2",
        "train.noise_offset=0.1",
        "train.input_perturbation=0.1",
        "train.timesteps.stratified=true",
    ]


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
        all_equal, *others = together(processes, first_gradients, tmp_path / "run.yaml", settings)
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
