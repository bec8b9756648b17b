"""A run for a subprocess, in a module that the subprocess can import."""

from __future__ import annotations

import time
from pathlib import Path

from onewan.config.load import load_run
from onewan.train.trainer import WanTrainer


def train_slowly(run_yaml: Path, overrides: list[str]) -> None:
    """Train so slowly that the process can be killed between any two steps."""
    WanTrainer(load_run(run_yaml, overrides), listen=lambda _event: time.sleep(0.01)).fit()
