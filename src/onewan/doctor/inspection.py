"""Each clip of a data set, decoded as the trainer decodes it: its content, its pixels, previews."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from onewan.data.ahead import results_ahead, usable_cores
from onewan.data.clip import Clip
from onewan.data.decode import (
    check_conditions,
    condition_frames,
    decode,
    decode_mask,
    decoder_threads,
)
from onewan.data.masks import uniform_mask_note
from onewan.data.report import ClipProblem
from onewan.doctor.pixels import PixelFacts, look_at_pixels
from onewan.errors import DataError
from onewan.files import file_digest
from onewan.media import IMAGE_SUFFIXES, FieldOrder, extension, field_order
from onewan.media.contact_sheet import frames_with_mask, preview_indices
from onewan.media.write import video_bytes
from onewan.variants import Variant

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
    """First, middle and last frame, JPEG; an image is one. What a loss mask leaves out is red."""
    conditions: tuple[bytes, ...]
    """Its condition image, unless that is its first frame, and the first, middle and last frame of
    its control video, JPEG."""
    video: bytes | None
    """All frames at the speed at which the model sees them, mp4; None for an image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectedClip:
    """A clip and what was found in its file."""

    clip: Clip
    pixels: PixelFacts | None = None
    """None if it can't be decoded."""
    error: DataError | None = None
    """Why it can't be decoded, or its mask or a condition of it can't."""
    mask_note: str | None = None
    """What the user should know about its mask."""
    combs: FieldOrder | None = None
    """The order of the fields if it has the combs of interlaced video, and no flag that says so."""
    preview: Preview | None = None
    """Only of those that are wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspector:
    """Decodes clips completely, several at a time."""

    fps: float
    """The model's own rate, at which it sees the frames whatever their rate in the file is."""
    variant: Variant
    """Gives the size of the cells of a loss mask."""
    previewed: frozenset[Clip]
    """The clips of which previews are made."""
    searched: frozenset[Clip]
    """The clips that are searched for combs: one of each file."""

    def inspect(self, clips: Sequence[Clip], advance: Advance) -> Iterator[InspectedClip]:
        """All `clips`, in their order."""
        cores = usable_cores()
        inspect = partial(self._inspect, threads=decoder_threads(cores))
        with closing(results_ahead(inspect, clips, workers=cores)) as inspected:
            for number, (_, result) in enumerate(inspected, start=1):
                found = result()
                advance(number, len(clips))
                yield found

    def _inspect(self, clip: Clip, *, threads: int) -> InspectedClip:
        try:
            # The trainer's own way from a file to frames, at a size that takes less time.
            small = replace(clip, size=small_size(clip.size))
            frames = decode(small, threads=threads).frames
            check_conditions(small)
            mask = decode_mask(clip, clip.mask, self.variant)[0] if clip.mask else None
        except DataError as error:
            return InspectedClip(clip=clip, error=error)
        return InspectedClip(
            clip=clip,
            pixels=look_at_pixels(frames),
            mask_note=None if mask is None else uniform_mask_note(mask.min(), mask.max()),
            combs=self._combs(clip),
            preview=self._preview(clip, frames, mask) if clip in self.previewed else None,
        )

    def _combs(self, clip: Clip) -> FieldOrder | None:
        """See `InspectedClip.combs`."""
        is_stream = clip.kind == "video" and extension(clip.path) not in IMAGE_SUFFIXES
        if not is_stream or clip not in self.searched or clip.interlaced or clip.fields:
            return None
        with suppress(DataError):  # damage outside of the clip, which does no harm
            return field_order(clip.path, clip.start)
        return None

    def _preview(self, clip: Clip, frames: np.ndarray, mask: np.ndarray | None) -> Preview:
        small = replace(clip, size=small_size(clip.size))
        stills = [frames[index] for index in preview_indices(len(frames))]
        if mask is not None:
            temporal = self.variant.temporal_compression
            stills = frames_with_mask(stills, mask, clip.frames, temporal)
        is_video = clip.kind == "video" and len(frames) > 1
        return Preview(
            size=small_size(clip.size),
            frames=tuple(map(_jpeg, stills)),
            conditions=tuple(map(_jpeg, condition_frames(small))),
            video=video_bytes(frames, self.fps) if is_video else None,
        )


def small_size(size: tuple[int, int]) -> tuple[int, int]:
    """The size at which frames of this (width, height) are looked at; both sides are even, as
    videos need them."""
    scale = min(1.0, _BOX / max(size))
    width, height = (max(2, 2 * round(side * scale / 2)) for side in size)
    return width, height


def content_digests(paths: Iterable[Path]) -> tuple[dict[Path, str], list[ClipProblem]]:
    """The digest of each file's content (see `onewan.files.file_digest`), and the files that can't
    be read."""
    digests, problems = dict[Path, str](), list[ClipProblem]()
    once = list(dict.fromkeys(paths))
    with closing(results_ahead(file_digest, once, workers=usable_cores())) as hashed:
        for path, result in hashed:
            try:
                digests[path] = result()
            except OSError as error:  # noqa: PERF203  (each file has its own reason)
                reason = f"can't be read ({error.strerror}); check the file and its disk"
                problems.append(ClipProblem(path=path, reason=reason))
    return digests, problems


def _jpeg(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=_JPEG_QUALITY)
    return file.getvalue()
