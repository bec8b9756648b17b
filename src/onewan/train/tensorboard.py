"""Writes a run's events as TensorBoard curves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onewan.runs.events import Event, Saved, StepDone, Validated

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardSink:
    """Loss, gradient norm and learning rate of each expert by step, validation losses, and at each
    saved state a histogram of the timesteps that each expert trained on since the one before."""

    label = "TensorBoard"
    required = False

    def __init__(self, folder: Path, resumed_step: int) -> None:
        """Curves of an interrupted run beyond `resumed_step`, whose steps are repeated, are
        replaced by the new ones."""
        self._folder = folder
        self._purge_step = resumed_step + 1 if resumed_step else None
        self._writer: SummaryWriter | None = None
        self._timesteps: dict[str, list[float]] = {}

    def write(self, event: Event) -> None:
        if isinstance(event, StepDone):
            for name, value in (
                ("loss", event.loss),
                ("grad_norm", event.grad_norm),
                ("lr", event.lr),
            ):
                self._open().add_scalar(f"{name}/{event.expert}", value, event.step)
            self._timesteps.setdefault(event.expert, []).extend(event.t)
        elif isinstance(event, Validated):
            for name, value in (("loss", event.loss), ("ema", event.ema), ("base", event.base)):
                if value is not None:
                    tag = f"validation_{name}/{event.expert}"
                    self._open().add_scalar(tag, value, event.step)
        elif isinstance(event, Saved):
            # At saved states only: a histogram of few timesteps shows nothing.
            for expert, timesteps in self._timesteps.items():
                self._open().add_histogram(f"t/{expert}", np.array(timesteps), event.step)
            self._timesteps.clear()

    def close(self) -> None:
        # Closing flushes; without its folder the writer's thread would print a traceback.
        if self._writer is not None and self._folder.is_dir():
            self._writer.close()

    def _open(self) -> SummaryWriter:
        # Opened by the first event, so that a folder that can't be written is a failure of this
        # sink, like a later one; imported here because the import takes a second.
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step)
        elif not self._folder.is_dir():
            # The writer itself would notice it later, in its thread, which prints a traceback.
            raise FileNotFoundError(f"{self._folder} was deleted")
        return self._writer
