"""A run for another process, in a module that such a process can import by itself."""

from __future__ import annotations

import time
from pathlib import Path

from onewan.config.load import load_run
from onewan.train.trainer import WanTrainer


def train_slowly(run_yaml: Path, overrides: list[str]) -> None:
    """A run that takes long enough to be killed between any two steps."""
    WanTrainer(load_run(run_yaml, overrides), listen=lambda _event: time.sleep(0.01)).fit()
