"""The files that a sample is given: images and a control video, as pixels at the sample's size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from onewan.errors import DataError
from onewan.media import Fit, probe, read_frames, read_image

# WebM rounds times to 1 ms; in s.
_TIME_ROUNDING = 0.002


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GivenPixels:
    """What a sample is given, at its size."""

    images: Mapping[str, Image.Image]
    """``image`` and ``last_image``, the first and the last frame, as far as they are given."""
    control: np.ndarray | None
    """uint8 RGB [F, H, W, 3]: the frames of the control video at the instants of the sample's."""
    reference: np.ndarray | None
    """uint8 RGB [1, H, W, 3]: the reference image."""

    @property
    def any(self) -> bool:
        """Whether there is something that the VAE has to encode."""
        return bool(self.images) or self.control is not None or self.reference is not None


def read_given_files(
    files: Mapping[str, Path | None], frames: int, fps: float, size: tuple[int, int]
) -> GivenPixels:
    """The `files` of a sample of this size (width, height), by the names of its fields. DataError
    if one can't be read, or the control video is too short."""
    # Cropped here, since diffusers would stretch an image of another aspect ratio.
    fit = Fit(*size)
    control, reference = files["control"], files["reference"]
    return GivenPixels(
        images={
            name: Image.fromarray(read_image(path, fit))
            for name in ("image", "last_image")
            if (path := files[name]) is not None
        },
        control=None
        if control is None
        else read_frames(control, _control_times(control, frames, fps), fit),
        reference=None if reference is None else read_image(reference, fit)[None],
    )


def _control_times(path: Path, frames: int, fps: float) -> list[float]:
    info = probe(path)
    if info.kind == "image":
        if frames > 1:
            raise DataError(
                f"{path}: is an image, and the sample has {frames} frames; give a control video"
            )
        return [info.start]
    times = [info.start + index / fps for index in range(frames)]
    if times[-1] > info.last + info.frame_interval / 2 + _TIME_ROUNDING:
        raise DataError(
            f"{path}: is too short as a control video (its last frame is at "
            f"{info.last - info.start:.2f} s, that of a sample of {frames} frames at {fps:g} fps "
            f"at {times[-1] - times[0]:.2f} s); give a longer one, or make a shorter sample"
        )
    return times


def unreadable_files(files: Mapping[str, Path | None], frames: int, fps: float) -> dict[str, str]:
    """What is wrong with the files of a sample, by the names of their fields."""
    problems = dict[str, str]()
    for name, path in files.items():
        if path is None:
            continue
        try:
            if name == "control":
                _control_times(path, frames, fps)
            else:
                read_image(path, Fit(16, 16))
        except DataError as error:
            problems[name] = str(error)
    return problems
