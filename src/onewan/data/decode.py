"""Clip -> `VideoSample`: the pixels that the VAE encodes, and a caption; clip -> loss mask,
condition image and control video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onewan.data.ahead import usable_cores
from onewan.data.clip import Clip
from onewan.data.companions import Companion, as_companion_error
from onewan.data.masks import latent_mask
from onewan.errors import DataError
from onewan.media import Fit, read_frames
from onewan.media.contact_sheet import preview_indices
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
        clip.path,
        times,
        fit,
        clip.background,
        within=clip.bounds,
        fields=clip.fields,
        threads=threads,
    )
    return frames if variation is None else variation.applied(frames, clip.size)


def condition_image(clip: Clip) -> np.ndarray:
    """The condition image of `clip` at its training size: uint8 RGB [H, W, 3].

    Raises DataError, which names the clip, if its file is damaged.
    """
    if (image := clip.conditions.image) is not None:
        return _companion_frames("condition", clip, image, [image.start])[0]
    return frames_at(clip, [clip.times()[clip.conditions.frame]])[0]


def start_image(clip: Clip) -> np.ndarray:
    """The image that samples of `clip` start from, as `condition_image`."""
    if clip.conditions.as_reference:
        return frames_at(clip, clip.times()[:1])[0]
    return condition_image(clip)


def control_frames(clip: Clip, control: Companion, indices: Sequence[int]) -> np.ndarray:
    """Frames of the control video of `clip`, by the indices of the clip's own frames at the same
    instants: uint8 RGB [F, H, W, 3].

    They are cropped and mirrored like the clip's. Their colors, which stand for depths or limbs,
    are never changed. Raises DataError, which names the clip, if the file is damaged.
    """
    times = [control.start + index / clip.fps for index in indices]
    return _companion_frames("control", clip, control, times)


def condition_frames(clip: Clip) -> list[np.ndarray]:
    """What a person should see of the conditions of `clip`: its condition image, unless that is its
    first frame, and the frames of its control video at `preview_indices`; uint8 RGB [H, W, 3]."""
    frames = list[np.ndarray]()
    if clip.conditions.has_own_image:
        frames.append(condition_image(clip))
    if (control := clip.conditions.control) is not None:
        frames += list(control_frames(clip, control, preview_indices(clip.frames)))
    return frames


def check_conditions(clip: Clip) -> None:
    """DataError, which names the clip, if its condition image or its control video is damaged."""
    if clip.conditions.image is not None:
        condition_image(clip)
    if (control := clip.conditions.control) is not None:
        control_frames(clip, control, range(clip.frames))


def _companion_frames(
    role: Literal["condition", "control"], clip: Clip, companion: Companion, times: Sequence[float]
) -> np.ndarray:
    variation = clip.variation
    fit = Fit(*clip.size) if variation is None else variation.fit(clip.size)
    try:
        frames = read_frames(companion.path, times, fit, companion.background)
    except DataError as error:
        raise as_companion_error(role, error, clip.path, companion.path) from error
    if variation is None:
        return frames
    if role == "control":
        return np.ascontiguousarray(variation.shaped(frames, clip.size))
    return variation.applied(frames, clip.size)


def decoded_bytes(clip: Clip) -> int:
    """Memory that the frames of `clip` take, as uint8 RGB."""
    return clip.frames * clip.size[0] * clip.size[1] * 3


def decoder_threads(workers: int) -> int:
    """The number of threads of each decoder where `workers` decode at the same time; 0 is FFmpeg's
    own choice."""
    return max(1, usable_cores() // workers) if workers > 1 else 0


def decode_mask(clip: Clip, mask: Companion, variant: Variant) -> np.ndarray:
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
        raise as_companion_error("mask", error, clip.path, mask.path) from error
