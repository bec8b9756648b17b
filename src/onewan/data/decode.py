"""One decoded clip: what goes from the media files to the VAE and the text encoder.

Hides nothing but the call of `onewan.media`; never resamples time and never keeps a file open.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onewan.data.index import Clip
from onewan.media import Fit, read_frames


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VideoSample:
    """A clip's pixels and one of its captions."""

    frames: np.ndarray
    """uint8 RGB [F, H, W, 3]."""
    prompt: str
    frame_count: int
    """F, 4n+1."""
    fps: float
    resolution: tuple[int, int]
    """(width, height)."""
    duration: float
    """Seconds that the frames last when played: F / fps."""


def decode(clip: Clip, caption_index: int = 0) -> VideoSample:
    """The frames of `clip` at its size, with one of its captions.

    Raises `DataError` when the file is damaged within the clip.
    """
    width, height = clip.size
    return VideoSample(
        frames=read_frames(clip.path, clip.times(), Fit(width, height)),
        prompt=clip.captions[caption_index],
        frame_count=clip.frames,
        fps=clip.fps,
        resolution=clip.size,
        duration=clip.frames / clip.fps,
    )
