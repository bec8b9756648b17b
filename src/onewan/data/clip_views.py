"""What a person sees of a clip: the frames that are trained, as the VAE gets them, as a video; the
same span of its file before the crop; its loss mask over it; its control video.

`ClipViews` keeps the videos in a folder of limited size. Needs no torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from onewan.data.clip import Clip
from onewan.data.contact_sheet import Preview, preview_frames
from onewan.data.decode import (
    condition_frames,
    condition_image,
    control_frames,
    decode,
    decode_mask,
    frames_at,
)
from onewan.data.file_memory import FileState
from onewan.data.keys import entry_key
from onewan.errors import DataError
from onewan.files import replacing
from onewan.media import Fit, write_video
from onewan.media.contact_sheet import preview_indices, with_mask
from onewan.variants import Variant

View = Literal["trained", "original", "mask", "control", "condition", "poster"]
"""`original` is the whole picture at the same times, `poster` the first trained frame, small."""
VIEWS: tuple[View, ...] = get_args(View)
VIEW_NAMES: Mapping[View, str] = {
    "trained": "Trained frames",
    "original": "The file, with the crop",
    "mask": "Loss mask: what is red is not trained on",
    "control": "Control video",
    "condition": "Condition image",
    "poster": "First trained frame",
}
"""What is written below each view."""
_VERSION = 1
"""Incremented when a view of the same clip is another one."""
_LONGEST_SIDE = 1280
"""Of an original, pixels."""
_POSTER_SIDE = 360
_JPEG_QUALITY = 82


def views_of(clip: Clip) -> tuple[View, ...]:
    """The views that `clip` has, but for its poster."""
    has: Mapping[View, bool] = {
        "trained": True,
        "original": True,
        "mask": clip.mask is not None,
        "control": clip.conditions.control is not None,
        "condition": clip.conditions.has_own_image,
    }
    return tuple(view for view, there in has.items() if there)


def view_frames(clip: Clip, view: View, variant: Variant) -> np.ndarray:
    """The frames of a view, uint8 RGB [F, H, W, 3]; `trained` are the pixels that the VAE gets.

    DataError if a file is damaged, or if the clip has no such view.
    """
    if view == "trained":
        return decode(clip).frames
    if view == "poster":
        return frames_at(replace(clip, size=_within(clip.size, _POSTER_SIDE)), clip.times()[:1])
    if view == "original":
        size = _within(clip.source_size, _LONGEST_SIDE)
        return decode(replace(clip, size=size, variation=None)).frames
    if view == "mask" and clip.mask is not None:
        mask = decode_mask(clip, clip.mask, variant)[0]
        frames = decode(clip).frames
        for index, frame in enumerate(frames):
            # Latent frame 0 is frame 0, latent frame k the frames up to k times the compression.
            frame[:] = with_mask(frame, mask[-(-index // variant.temporal_compression)])
        return frames
    if view == "control" and (control := clip.conditions.control) is not None:
        return control_frames(clip, control, range(clip.frames))
    if view == "condition" and clip.conditions.has_own_image:
        return condition_image(clip)[None]
    raise DataError(f"{clip.path}: has no {view}")


def crop_of(clip: Clip) -> tuple[float, float, float, float]:
    """What of the original picture is trained: left, top, width and height, as parts of its width
    or height."""
    variation = clip.variation
    fit = Fit(*clip.size) if variation is None else variation.fit(clip.size)
    cover = fit.cover(*clip.source_size)
    left, top, (width, height) = cover.left, cover.top, clip.size
    if variation is not None:
        left += round((fit.width - width) * variation.left)
        top += round((fit.height - height) * variation.top)
    across, down = cover.width, cover.height
    return left / across, top / down, width / across, height / down


def view_key(clip: Clip, view: str, variant: Variant) -> str:
    """A hash of everything that a view depends on; OSError if a file of the clip is gone."""
    # Not on the texts, so that an edited caption makes no video anew.
    plain = replace(clip, name="", item_name="", captions=("",), class_captions=())
    states = [tuple(FileState.of(path)) for path in clip.files]
    of_variant = [variant.fps, variant.temporal_compression, variant.spatial_compression]
    return entry_key(
        version=_VERSION, view=view, variant=of_variant, files=states, clip=repr(plain)
    )


def _within(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """`size` made smaller to have no longer side than that; even, as videos need it."""
    scale = min(1.0, longest / max(size))
    width, height = (max(2, 2 * round(side * scale / 2)) for side in size)
    return width, height


@dataclass(frozen=True)
class DecodedPreviews:
    """A `PreviewSource` of contact sheets that decodes clips, without the run's cache."""

    variant: Variant

    def preview_key(self, clip: Clip) -> str:
        return view_key(clip, "preview", self.variant)

    def preview(self, clip: Clip) -> Preview:
        times = clip.times()
        frames = frames_at(clip, [times[index] for index in preview_indices(clip.frames)])
        conditions = condition_frames(clip)
        mask = decode_mask(clip, clip.mask, self.variant)[0] if clip.mask else None
        return Preview(
            frames=preview_frames(frames),
            conditions=preview_frames(conditions) if conditions else None,
            mask=mask,
        )


@dataclass
class ClipViews:
    """Videos and pictures of clips, made when they are asked for first."""

    folder: Path
    most_bytes: int = 1 << 30
    """Of all of them; those that were looked at longest ago are deleted."""

    def file(self, clip: Clip, view: View, variant: Variant) -> Path:
        """The file of a view: mp4 at the rate at which the model sees the frames, a picture where
        there is one frame. DataError if a file of the clip can't be read, or this one written."""
        try:
            path = self.folder / self._name(clip, view, variant)
        except OSError as error:
            raise DataError(f"{clip.path}: can't be read ({error.strerror})") from error
        if self._found(path):
            return path
        frames = view_frames(clip, view, variant)
        if path.suffix == ".mp4":
            write_video(path, frames, variant.fps)
        else:
            try:
                with replacing(path) as temporary:
                    Image.fromarray(frames[0]).save(temporary, quality=_JPEG_QUALITY)
            except OSError as error:
                raise DataError(f"{path}: can't be written ({error.strerror})") from error
        self._make_room(path)
        return path

    def _found(self, path: Path) -> bool:
        try:
            os.utime(path)  # it is looked at now
        except OSError:
            return False
        return True

    def _name(self, clip: Clip, view: View, variant: Variant) -> str:
        digest = view_key(clip, view, variant)
        if view == "poster":
            return f"{digest}.jpg"
        is_picture = clip.frames == 1 or view == "condition"
        return f"{digest}.{'png' if is_picture else 'mp4'}"

    def _make_room(self, kept: Path) -> None:
        files = list[tuple[float, int, Path]]()
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                stat = path.stat()
                files.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.most_bytes:
                return
            if path != kept:
                with contextlib.suppress(OSError):  # one that is being sent, on Windows
                    path.unlink()
                    total -= size
