"""What a run's curves show: the values of each event, by name, for TensorBoard and for W&B."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from onewan.media.probe import probe
from onewan.media.read import read_frames
from onewan.media.still import Fit
from onewan.runs.events import Event, StepDone, Validated

_STRIP_FRAMES = 4
"""Frames of a sample video that are shown beside each other."""
_STRIP_HEIGHT = 256
"""Their height in pixels, at most."""


def curve_values(event: Event) -> dict[str, float]:
    """The values of `event` by the name of their curve, such as "loss/high"; empty for events that
    no curve shows."""
    if isinstance(event, StepDone):
        values = {
            "loss": event.loss,
            "preservation_loss": event.preservation_loss,
            "grad_norm": event.grad_norm,
            "lr": event.lr,
            "embeddings_lr": event.embeddings_lr,
            "seconds": event.seconds,
            "tokens_per_second": event.tokens_per_second,
            "tflops": event.tflops,
            "mfu": event.mfu,
            "step_memory_peak": event.step_memory_peak,
            "bytes_to_device": event.bytes_to_device,
        }
    elif isinstance(event, Validated):
        change = None if event.base is None else 100 * (event.loss / event.base - 1)
        values = {
            "validation_loss": event.loss,
            "validation_ema": event.ema,
            "validation_base": event.base,
            # As on the terminal: -10 is a loss 10 % below that of the base model.
            "validation_percent_against_base": change,
        }
    else:
        return {}
    return {f"{name}/{event.expert}": v for name, v in values.items() if v is not None}


def frame_strip(video: Path) -> np.ndarray:
    """A few frames of `video` from its first to its last, side by side: uint8 [H, W, 3].

    DataError if it can't be read.
    """
    info = probe(video)
    times = np.linspace(info.start, info.last, _STRIP_FRAMES if info.last > info.start else 1)
    shown_width, shown_height = info.shown_size
    height = min(_STRIP_HEIGHT, shown_height)
    width = max(1, round(shown_width * height / shown_height))
    return np.concatenate(list(read_frames(video, times.tolist(), Fit(width, height))), axis=1)
