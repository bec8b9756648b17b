"""Masks: which file beside a clip is its mask, and what it says about each place of the latents.

A mask is a picture or a video NAME.mask.ext beside NAME.ext. White counts in the loss, black does
not, and what is transparent shows white. It goes through the crop and the scaling of its clip, and
is then averaged over the pixels and frames that one place of the latents stands for. Hides the
pairing by name and the arithmetic; knows nothing of the cache and nothing of torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onewan.errors import DataError
from onewan.media import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Fit,
    MediaInfo,
    extension,
    probe,
    read_frames,
)

MASK_VERSION = 1
"""Raised when the numbers of `latent_mask` change: masks in the cache then don't count."""

_MARK = ".mask"

_PICTURES = sorted(IMAGE_SUFFIXES)

# A mask drawn over an export of the clip is off by a pixel or so in its sides, never by more.
_ASPECT_TOLERANCE = 0.01

# WebM rounds times to 1 ms, so two spans, each between two frames, differ by up to 2 ms; in s.
_ROUNDING = 0.0025

# Luma of BT.601 in thousandths, as Pillow turns colours grey. Whole numbers, so that a sum has no
# order and white is exactly 1.
_LUMA = np.array([299, 587, 114], np.int32)
_WHITE = 255 * 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """The mask of one clip."""

    path: Path
    start: float
    """Time in the mask's own clock that goes with the clip's first frame, s; 0 for a picture."""

    @property
    def still(self) -> bool:
        """Whether one picture stands for all frames."""
        return extension(self.path) in IMAGE_SUFFIXES


def is_mask(path: Path) -> bool:
    """Whether the file's name says that it is a mask: NAME.mask.ext, where txt is a caption."""
    return path.stem.lower().endswith(_MARK) and extension(path) != "txt"


def masked_by(path: Path) -> Path:
    """The clips of a mask, as a path without extension: NAME of NAME.mask.ext."""
    return path.with_name(path.stem[: -len(_MARK)])


def mask_for(
    clip: MediaInfo, times: Sequence[float], files: Sequence[Path], formats: Sequence[str]
) -> Mask | None:
    """The mask of a clip that is taken at `times` (s); `files` are those that could be it.

    Reads headers only. DataError, which names the clip, if its mask can't be used: to train
    without it would teach what it hides.
    """
    if not files:
        return None
    names = ", ".join(path.name for path in files)
    if len(files) > 1:
        raise DataError(f"{clip.path}: has {len(files)} masks ({names}); keep one")
    path, kind = files[0], extension(files[0])
    if kind not in VIDEO_SUFFIXES | IMAGE_SUFFIXES | set(formats):
        raise DataError(
            f"{clip.path}: its mask {path.name} is neither a picture ({', '.join(_PICTURES)}) nor "
            "a video; save it as one of them"
        )
    if kind not in IMAGE_SUFFIXES and kind not in formats:
        raise DataError(
            f"{clip.path}: {kind} of its mask {path.name} is not among "
            f"video_data.supported_formats ({', '.join(formats)}); add {kind} there to use it"
        )
    try:
        info = probe(path)
    except DataError as error:
        raise of_mask(error, clip.path, path) from error
    if abs(_aspect(info) / _aspect(clip) - 1) > _ASPECT_TOLERANCE:
        # As shown: a picture of a clip's stored pixels is off where those are not square.
        have, wanted = ("{}x{}".format(*each.shown_size) for each in (info, clip))
        raise DataError(
            f"{clip.path}: its mask {path.name} has another shape (shown {have}, the clip "
            f"{wanted}); make it {wanted}, or of the same shape"
        )
    if info.kind == "image":
        return Mask(path=path, start=0.0)
    # By the time since each file's first frame: containers start their clocks differently.
    start = times[0] - clip.start + info.start
    needed = start + (times[-1] - times[0])
    if needed > info.last + info.frame_interval / 2 + _ROUNDING:
        raise DataError(
            f"{clip.path}: its mask {path.name} is too short (its last frame is at "
            f"{info.last - info.start:.2f} s, the clip's at {needed - info.start:.2f} s); make it "
            "as long as the clip"
        )
    return Mask(path=path, start=start)


def of_mask(error: DataError, clip: Path, mask: Path) -> DataError:
    """An error that names a mask, as one that names its clip."""
    return DataError(f"{clip}: its mask {mask.name} {str(error).removeprefix(f'{mask}: ')}")


def latent_mask(
    mask: Mask, *, fps: float, frames: int, size: tuple[int, int], spatial: int, temporal: int
) -> np.ndarray:
    """How much each place of a clip's latents counts: float32 [1, F, h, w] from 0 to 1.

    `frames` (4n+1) at `fps` and `size` (width, height) are the clip's; `spatial` and `temporal` the
    compression of the VAE. Latent frame 0 stands for pixel frame 0, and latent frame k for the
    pixel frames 4k-3 to 4k. Raises DataError, which names the mask, if it is damaged.
    """
    width, height = size
    pictures = list(_light(mask, fps, frames, Fit(width, height)))
    h, w = height // spatial, width // spatial
    # Whole numbers until the last division: the mean of white is white.
    light = np.empty((len(pictures), h, w), np.int64)
    for place, picture in zip(light, pictures, strict=True):
        places = picture.reshape(h, spatial, w, spatial)
        places.sum(axis=(1, 3), dtype=np.int64, out=place)
    white = _WHITE * spatial**2
    first = light[:1] / white
    count = (frames - 1) // temporal
    if mask.still:
        rest = np.repeat(first, count, axis=0)
    else:
        rest = light[1:].reshape(count, temporal, h, w).sum(axis=1) / (white * temporal)
    return np.concatenate([first, rest])[None].astype(np.float32)


def pixel_mask(mask: Mask, *, fps: float, frames: int, fit: Fit) -> np.ndarray:
    """How much each pixel of a clip's frames counts: float32 [1, frames, H, W] from 0 to 1.

    For those who turn and shift masks with their clips before they become latent. DataError as
    `latent_mask` has it.
    """
    pictures = [picture.astype(np.float32) / _WHITE for picture in _light(mask, fps, frames, fit)]
    return np.stack(pictures * (frames // len(pictures)))[None]


def _light(mask: Mask, fps: float, frames: int, fit: Fit) -> Iterator[np.ndarray]:
    """Luma in thousandths, [H, W], of each frame of a mask; of the one of a still."""
    times = [mask.start + k / fps for k in range(1 if mask.still else frames)]
    for picture in read_frames(mask.path, times, fit):
        yield picture @ _LUMA


def _aspect(info: MediaInfo) -> float:
    return info.width * info.pixel_aspect / info.height
