"""Tiny models in the diffusers layout, one per variant and session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from onewan.demo.tiny_model import write_tiny_model
from onewan.variants import VariantName


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[VariantName], Path]:
    """The folder of a tiny model of the variant asked for."""

    @cache
    def folder(variant: VariantName) -> Path:
        return write_tiny_model(tmp_path_factory.mktemp(variant), variant, width=64, layers=3)

    return folder
