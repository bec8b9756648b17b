"""Loss masks: which file beside a clip is its mask, and its values per latent cell or pixel.

A mask is an image or a video NAME.mask.ext beside NAME.ext. White is 1 in the loss mask, black is
0, and transparent pixels are white. It is cropped and scaled like its clip, and then averaged over
the pixels and frames that one latent cell encodes. Hides the pairing by name and the arithmetic;
uses neither the cache nor torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onewan.data.augment import Variation
from onewan.data.probes import MediaProbes
from onewan.errors import DataError, one_line
from onewan.media import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Fit,
    MediaInfo,
    extension,
    read_frames,
)

MASK_VERSION = 3
"""Incremented when the values of `latent_mask` change, so that cached masks are computed again."""

_MASK_SUFFIX = ".mask"

# A mask drawn over an export of the clip differs by about a pixel per side; another crop by more.
_ASPECT_TOLERANCE = 0.01

# WebM rounds times to 1 ms, so two spans, each between two frames, differ by up to 2 ms; in s.
_TIME_ROUNDING = 0.0025

# Luma of BT.601 in thousandths, as in Pillow's conversion to grayscale. Integers, so that the sum
# does not depend on the order of its terms and white is exactly 1.
_LUMA_WEIGHTS = np.array([299, 587, 114], np.int32)
_WHITE = 255 * 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """The mask of one clip."""

    path: Path
    start: float
    """Time in the mask file's own clock at the clip's first frame, s; 0 for an image."""
    is_image: bool
    """Whether one image is the mask of all frames."""


def is_mask(path: Path) -> bool:
    """Whether the file is named as a mask: NAME.mask.ext, unless ext is txt (a caption file)."""
    return path.stem.lower().endswith(_MASK_SUFFIX) and extension(path) != "txt"


def clip_stem(mask_path: Path) -> Path:
    """Path without extension of the clips that the mask belongs to: NAME for NAME.mask.ext."""
    return mask_path.with_name(mask_path.stem[: -len(_MASK_SUFFIX)])


def find_mask(
    clip: MediaInfo,
    times: Sequence[float],
    files: Sequence[Path],
    video_formats: Sequence[str],
    probes: MediaProbes,
) -> Mask | None:
    """The mask of a clip with frames at `times` (s); `files` are the candidates by their name.

    Reads headers only. Raises DataError, which names the clip, if its mask can't be used: training
    the clip without its mask would teach what the mask hides.
    """
    if not files:
        return None
    names = ", ".join(path.name for path in files)
    if len(files) > 1:
        raise DataError(f"{clip.path}: has {len(files)} masks ({names}); keep one")
    path, kind = files[0], extension(files[0])
    if kind not in VIDEO_SUFFIXES | IMAGE_SUFFIXES | set(video_formats):
        raise DataError(
            f"{clip.path}: its mask {path.name} is neither an image "
            f"({', '.join(sorted(IMAGE_SUFFIXES))}) nor a video; save it as one of them"
        )
    if kind not in IMAGE_SUFFIXES and kind not in video_formats:
        raise DataError(
            f"{clip.path}: {kind} of its mask {path.name} is not among "
            f"video_data.supported_formats ({', '.join(video_formats)}); add {kind} there to use it"
        )
    try:
        info = probes.of(path)
    except DataError as error:
        raise as_mask_error(error, clip.path, path) from error
    if abs(_aspect_ratio(info) / _aspect_ratio(clip) - 1) > _ASPECT_TOLERANCE:
        # Sizes as shown: where pixels are not square, a mask of the stored size does not fit.
        mask_size, clip_size = ("{}x{}".format(*each.shown_size) for each in (info, clip))
        raise DataError(
            f"{clip.path}: its mask {path.name} has another aspect ratio (shown {mask_size}, the "
            f"clip {clip_size}); make it {clip_size}, or of the same aspect ratio"
        )
    if info.kind == "image":
        return Mask(path=path, start=0.0, is_image=True)
    # Relative to the first frame of each file, since containers start their clocks differently.
    start = times[0] - clip.start + info.start
    end = start + (times[-1] - times[0])
    if end > info.last + info.frame_interval / 2 + _TIME_ROUNDING:
        raise DataError(
            f"{clip.path}: its mask {path.name} is too short (its last frame is at "
            f"{info.last - info.start:.2f} s, the clip's at {end - info.start:.2f} s); make it "
            "as long as the clip"
        )
    return Mask(path=path, start=start, is_image=False)


def as_mask_error(error: DataError, clip: Path, mask: Path) -> DataError:
    """`error`, whose message begins with the path of a mask, as an error that names the clip."""
    reason = str(error).removeprefix(f"{one_line(str(mask))}: ")
    return DataError(f"{clip}: its mask {mask.name} {reason}")


def uniform_mask_note(lowest: float, highest: float) -> str | None:
    """What to say about a mask with these extreme values; None if it is neither all 0 nor all 1."""
    if highest == 0:
        return (
            "the mask is entirely black: its clip is trained as if it had no mask, or not at all "
            "if train.loss.unmasked_weight is 0"
        )
    if lowest == 1:
        return (
            "the mask is entirely white (or transparent): its clip is trained as if it had no mask"
        )
    return None


def latent_mask(
    mask: Mask,
    *,
    fps: float,
    frames: int,
    size: tuple[int, int],
    spatial: int,
    temporal: int,
    variation: Variation | None = None,
) -> np.ndarray:
    """The loss mask per latent cell of a clip: float32 [1, F, h, w] from 0 to 1.

    `frames` (4n+1) at `fps` and `size` (width, height) are the clip's; `spatial` and `temporal` are
    the compression factors of the VAE. Latent frame 0 encodes pixel frame 0, and latent frame k the
    pixel frames 4k-3 to 4k. `variation` is the clip's. Raises DataError, which names the mask, if
    the file is damaged.
    """
    width, height = size
    # The crop of the clip's own frames, so that each cell covers the pixels that it encodes.
    fit = Fit(width, height) if variation is None else variation.fit(size)
    luma_frames = list(_luma_frames(mask, fps, frames, fit))
    if variation is not None:
        luma_frames = [variation.shaped(luma[..., None], size)[..., 0] for luma in luma_frames]
    h, w = height // spatial, width // spatial
    # Integers until the last division, so that the mean of white pixels is exactly 1.
    cell_sums = np.empty((len(luma_frames), h, w), np.int64)
    for sums, luma in zip(cell_sums, luma_frames, strict=True):
        luma.reshape(h, spatial, w, spatial).sum(axis=(1, 3), dtype=np.int64, out=sums)
    white = _WHITE * spatial**2
    first = cell_sums[:1] / white
    count = (frames - 1) // temporal
    if mask.is_image:
        rest = np.repeat(first, count, axis=0)
    else:
        rest = cell_sums[1:].reshape(count, temporal, h, w).sum(axis=1) / (white * temporal)
    return np.concatenate([first, rest])[None].astype(np.float32)


def pixel_mask(mask: Mask, *, fps: float, frames: int, fit: Fit) -> np.ndarray:
    """The loss mask per pixel of a clip: float32 [1, frames, H, W] from 0 to 1.

    For trainers that augment masks together with their clips before encoding. Raises DataError,
    which names the mask, if the file is damaged.
    """
    values = [luma.astype(np.float32) / _WHITE for luma in _luma_frames(mask, fps, frames, fit)]
    return np.stack(values * (frames // len(values)))[None]


def _luma_frames(mask: Mask, fps: float, frames: int, fit: Fit) -> Iterator[np.ndarray]:
    """Luma in thousandths, int32 [H, W], of each frame of a mask video, or of its one image."""
    # An image is read once and repeated by the callers, not read for each frame.
    times = [mask.start + k / fps for k in range(1 if mask.is_image else frames)]
    for rgb in read_frames(mask.path, times, fit):
        yield rgb @ _LUMA_WEIGHTS


def _aspect_ratio(info: MediaInfo) -> float:
    return info.width * info.pixel_aspect / info.height
