"""Fixtures for all tests: the shared material beside the repository, where there is some."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tiny models are faster on one thread, and tests run side by side. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with golden outputs and real clips. Skips without it; in CI that is a failure."""
    if not SHARED.is_dir():
        message = "needs ../shared (golden outputs and clips), which is not here"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return SHARED


@pytest.fixture(scope="session")
def clips(shared: Path) -> Path:
    """Real clips: good, odd and bad ones."""
    return shared / "clips"


@pytest.fixture(scope="session")
def real_checkout() -> Path:
    """The OneTrainer checkout that ``ONETRAINER`` names; tests do not change it."""
    named = os.environ.get("ONETRAINER")
    if not named:
        pytest.skip("needs a OneTrainer checkout: make test ONETRAINER=PATH")
    return Path(named).resolve()
