"""Each clip of a data set, decoded as the trainer decodes it: its content, its pixels, previews."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from PIL import Image

from onewan.data.clip import Clip
from onewan.data.decode import decode
from onewan.doctor.pixels import PixelFacts, look_at_pixels
from onewan.errors import DataError, one_line
from onewan.files import file_digest
from onewan.media.contact_sheet import preview_indices
from onewan.media.write import video_bytes

_BOX = 288
"""Longest side of the small frames, pixels."""
_JPEG_QUALITY = 82

Advance = Callable[[int, int], None]
"""Called with the number of clips that are done, and of all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """Small pictures of a clip as it is trained, after crop and resampling."""

    size: tuple[int, int]
    """(width, height), pixels."""
    frames: tuple[bytes, ...]
    """First, middle and last frame, JPEG; an image is one."""
    video: bytes | None
    """All frames at the speed at which the model sees them, mp4; None for an image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectedClip:
    """A clip and what was found in its file."""

    clip: Clip
    digest: str
    """Of the file's content, see `onewan.files.file_digest`; empty if it can't be read."""
    pixels: PixelFacts | None
    """None if it can't be decoded."""
    error: DataError | None = None
    """Why it can't be decoded."""
    preview: Preview | None = None
    """Only of those that are wanted."""


def inspect_clips(
    clips: Sequence[Clip], previewed: Sequence[bool], fps: float, advance: Advance
) -> Iterator[InspectedClip]:
    """All `clips`, in their order, each decoded completely, several at a time.

    Those for which `previewed` is true get a preview; `fps` is the rate at which the model sees
    frames, whatever their rate in the file is.
    """
    # Decoders release Python's lock, so that threads use all cores.
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        results = pool.map(partial(_inspect, fps=fps), clips, previewed)
        for number, result in enumerate(results, start=1):
            advance(number, len(clips))
            yield result


def _inspect(clip: Clip, is_previewed: bool, *, fps: float) -> InspectedClip:
    try:
        digest = file_digest(clip.path)
        # The trainer's own way from a file to frames, at a size that takes less time.
        frames = decode(replace(clip, size=small_size(clip.size))).frames
    except OSError as error:
        reason = one_line(f"{clip.path}: can't be read ({error.strerror}); check the file")
        return InspectedClip(clip=clip, digest="", pixels=None, error=DataError(reason))
    except DataError as error:
        return InspectedClip(clip=clip, digest="", pixels=None, error=error)
    return InspectedClip(
        clip=clip,
        digest=digest,
        pixels=look_at_pixels(frames),
        preview=_preview(clip, frames, fps) if is_previewed else None,
    )


def small_size(size: tuple[int, int]) -> tuple[int, int]:
    """The size at which frames of this (width, height) are looked at; both sides are even, as
    videos need them."""
    scale = min(1.0, _BOX / max(size))
    width, height = (max(2, 2 * round(side * scale / 2)) for side in size)
    return width, height


def _preview(clip: Clip, frames: np.ndarray, fps: float) -> Preview:
    stills = [_jpeg(frames[index]) for index in preview_indices(len(frames))]
    video = video_bytes(frames, fps) if clip.kind == "video" and len(frames) > 1 else None
    return Preview(size=small_size(clip.size), frames=tuple(stills), video=video)


def _jpeg(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=_JPEG_QUALITY)
    return file.getvalue()
