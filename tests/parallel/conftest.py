"""A tiny model of each variant and a few drawn clips, made once, run files on them, and settings
under which clips have all that a loss may depend on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.runs import CLASS_WORD
from support.workshop import run_file, workshop

from onewan.media import VIDEO_SUFFIXES, probe

__all__ = ["run_file", "workshop"]


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
