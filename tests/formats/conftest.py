"""Tiny models in the diffusers layout, one per variant and session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from onewan.demo.tiny_model import write_tiny_model
from onewan.variants import VariantName


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[VariantName], Path]:
    """The folder of a tiny model of the variant asked for."""

    @cache
    def folder(variant: VariantName) -> Path:
        # Pixels to measure the latents' mean and deviation on, lest a wrong normalisation pass.
        pixels = torch.rand(1, 3, 5, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
        target = tmp_path_factory.mktemp(variant)
        return write_tiny_model(target, variant, width=64, layers=3, pixels_BCFHW=pixels)

    return folder


@pytest.fixture(scope="session")
def t2v(shared: Path) -> Path:
    """The official T2V-A14B of the golden files."""
    return shared / "golden" / "t2v-A14B"
