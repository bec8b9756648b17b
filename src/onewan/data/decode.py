"""Clip -> `VideoSample`: the pixels that the VAE encodes, and a caption; and clip -> loss mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onewan.data.ahead import usable_cores
from onewan.data.clip import Clip
from onewan.data.masks import Mask, as_mask_error, latent_mask
from onewan.errors import DataError
from onewan.media import Fit, read_frames
from onewan.variants import Variant


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VideoSample:
    """A decoded clip."""

    frames: np.ndarray
    """uint8 RGB [F, H, W, 3]."""
    prompt: str
    """One of the clip's captions."""
    frame_count: int
    """F, 4n+1."""
    fps: float
    resolution: tuple[int, int]
    """(width, height)."""
    duration: float
    """How long the frames last when played, F / fps, s."""


def decode(clip: Clip, caption_index: int = 0, *, threads: int = 0) -> VideoSample:
    """The frames of `clip` at its training size, with one of its captions.

    `threads` is how many the decoder uses, 0 one for each core; it makes no difference to pixels.
    Raises DataError if the file is damaged within the clip.
    """
    return VideoSample(
        frames=frames_at(clip, clip.times(), threads=threads),
        prompt=clip.captions[caption_index],
        frame_count=clip.frames,
        fps=clip.fps,
        resolution=clip.size,
        duration=clip.frames / clip.fps,
    )


def frames_at(clip: Clip, times: Sequence[float], *, threads: int = 0) -> np.ndarray:
    """The frames of `clip` nearest to some of its `times`, as it is trained: uint8 [F, H, W, 3].

    `threads` as for `decode`. Raises DataError if the file is damaged there.
    """
    variation = clip.variation
    fit = Fit(*clip.size) if variation is None else variation.fit(clip.size)
    frames = read_frames(
        clip.path, times, fit, clip.background, fields=clip.fields, threads=threads
    )
    return frames if variation is None else variation.applied(frames, clip.size)


def decoded_bytes(clip: Clip) -> int:
    """Memory that the frames of `clip` take, as uint8 RGB."""
    return clip.frames * clip.size[0] * clip.size[1] * 3


def decoder_threads(workers: int) -> int:
    """The number of threads of each decoder where `workers` decode at the same time; 0 is FFmpeg's
    own choice."""
    return max(1, usable_cores() // workers) if workers > 1 else 0


def decode_mask(clip: Clip, mask: Mask, variant: Variant) -> np.ndarray:
    """The loss mask of `clip` per latent cell of `variant`'s VAE: float32 [1, F, h, w].

    Raises DataError, which names the clip, if the mask is damaged.
    """
    try:
        return latent_mask(
            mask,
            fps=clip.fps,
            frames=clip.frames,
            size=clip.size,
            variation=clip.variation,
            spatial=variant.spatial_compression,
            temporal=variant.temporal_compression,
        )
    except DataError as error:
        raise as_mask_error(error, clip.path, mask.path) from error
