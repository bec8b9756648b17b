"""Tiny models in the diffusers layout, one per variant and session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_models import TinyModels


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Returns the folder of a tiny model of a variant."""
    # The latents' mean and deviation are measured on these pixels: with the default of 0 and 1 a
    # wrong normalization of latents would go unnoticed.
    pixels = torch.rand(1, 3, 5, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    folder = tmp_path_factory.mktemp("models")
    return TinyModels(folder, width=64, layers=3, pixels_BCFHW=pixels)


@pytest.fixture(scope="session")
def t2v(shared: Path) -> Path:
    """The official T2V-A14B of the golden files."""
    return shared / "golden" / "t2v-A14B"
