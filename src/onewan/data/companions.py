"""Files that belong to a clip: its loss mask, its condition image and its control video.

NAME.mask.ext, NAME.condition.ext and NAME.control.ext belong to NAME.ext; a table names them in
columns. Hides the pairing by name, and what such a file must be for its clip to use it. Reads
headers only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from onewan.data.probes import MediaProbes
from onewan.errors import DataError, one_line
from onewan.media import IMAGE_SUFFIXES, RGB, VIDEO_SUFFIXES, WHITE, MediaInfo, extension

Role = Literal["mask", "condition", "control"]
"""What a file beside a clip is for, which is also the end of its name before the extension."""

NOUNS: Mapping[Role, str] = {
    "mask": "mask",
    "condition": "condition image",
    "control": "control video",
}
"""What the files are called in messages."""

# A mask drawn over an export of the clip differs by about a pixel per side; another crop by more.
_ASPECT_TOLERANCE = 0.01

# WebM rounds times to 1 ms, so two spans, each between two frames, differ by up to 2 ms; in s.
_TIME_ROUNDING = 0.0025


@dataclass(frozen=True, slots=True, kw_only=True)
class Companion:
    """A file that belongs to one clip."""

    path: Path
    start: float = 0.0
    """Time in the file's own clock at the clip's first frame, s; 0 for an image."""
    is_image: bool
    """Whether it is one image, for all frames of the clip."""
    background: RGB = WHITE
    """What its transparent parts are laid over; white for a file without them."""


def role_of(path: Path) -> Role | None:
    """What the file is for by its name, NAME.mask.ext for instance; None for all others, such as
    captions."""
    if extension(path) == "txt":
        return None
    _, dot, last = path.stem.lower().rpartition(".")
    return cast("Role", last) if dot and last in get_args(Role) else None


def clip_stem(path: Path) -> Path:
    """Path without extension of the clips that a file with a role belongs to: NAME for
    NAME.mask.ext."""
    return path.with_name(path.stem.rpartition(".")[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class CompanionFinder:
    """Finds the companions of the clips of a file, and checks them."""

    clip: MediaInfo
    """The clips' file."""
    video_formats: Sequence[str]
    """Extensions of the video files to use."""
    background: RGB
    """What transparent parts of condition images and control videos are laid over."""
    probes: MediaProbes

    def find(self, role: Role, files: Sequence[Path], times: Sequence[float]) -> Companion | None:
        """The companion of a clip with frames at `times` (s); `files` are the candidates by their
        name.

        Raises DataError, which names the clip, if it can't be used: training the clip without it
        would teach something else.
        """
        if not files:
            return None
        clip, noun, path = self.clip, NOUNS[role], files[0]
        if len(files) > 1:
            names = ", ".join(path.name for path in files)
            raise DataError(f"{clip.path}: has {len(files)} {noun}s ({names}); keep one")
        if why := _unreadable(role, path, self.video_formats):
            raise DataError(f"{clip.path}: {why}")
        try:
            info = self.probes.of(path)
        except DataError as error:
            raise as_companion_error(role, error, clip.path, path) from error
        if why := _other_kind(role, info.kind, clip.kind) or self._other_shape(role, info):
            raise DataError(f"{clip.path}: its {noun} {path.name} {why}")
        # White in a mask is what is trained on.
        background = self.background if info.has_alpha and role != "mask" else WHITE
        if info.kind == "image":
            return Companion(path=path, is_image=True, background=background)
        # Relative to the first frame of each file, since containers start their clocks differently.
        start = times[0] - clip.start + info.start
        end = start + (times[-1] - times[0])
        if end > info.last + info.frame_interval / 2 + _TIME_ROUNDING:
            raise DataError(
                f"{clip.path}: its {noun} {path.name} is too short (its last frame is at "
                f"{info.last - info.start:.2f} s, the clip's at {end - info.start:.2f} s); make it "
                "as long as the clip"
            )
        return Companion(path=path, start=start, is_image=False, background=background)

    def _other_shape(self, role: Role, info: MediaInfo) -> str | None:
        """What is wrong with the shape of a file; None if it is right."""
        if role == "condition":  # is cropped, like the image that a sample starts from
            return None
        if abs(_aspect_ratio(info) / _aspect_ratio(self.clip) - 1) <= _ASPECT_TOLERANCE:
            return None
        # Sizes as shown: where pixels are not square, a file of the stored size does not fit.
        own, wanted = ("{}x{}".format(*each.shown_size) for each in (info, self.clip))
        return (
            f"has another aspect ratio (shown {own}, the clip {wanted}); make it {wanted}, or of "
            "the same aspect ratio"
        )


def as_companion_error(role: Role, error: DataError, clip: Path, path: Path) -> DataError:
    """`error`, whose message begins with the path of a companion, as an error that names the
    clip."""
    reason = str(error).removeprefix(f"{one_line(str(path))}: ")
    return DataError(f"{clip}: its {NOUNS[role]} {path.name} {reason}")


def _unreadable(role: Role, path: Path, video_formats: Sequence[str]) -> str | None:
    """Why a file can't have `role` by its extension; None if it can."""
    kind, noun = extension(path), NOUNS[role]
    images = ", ".join(sorted(IMAGE_SUFFIXES))
    if role == "condition" and kind not in IMAGE_SUFFIXES:
        return f"its {noun} {path.name} is not an image ({images}); save it as one of them"
    if kind not in VIDEO_SUFFIXES | IMAGE_SUFFIXES | set(video_formats):
        return (
            f"its {noun} {path.name} is neither an image ({images}) nor a video; save it as one "
            "of them"
        )
    if kind not in IMAGE_SUFFIXES and kind not in video_formats:
        return (
            f"{kind} of its {noun} {path.name} is not among video_data.supported_formats "
            f"({', '.join(video_formats)}); add {kind} there to use it"
        )
    return None


def _other_kind(role: Role, kind: str, clip_kind: str) -> str | None:
    """Why a file that is an image or a video can't have `role` for a clip that is one of them."""
    if role == "condition" and kind != "image":
        return "is animated; save the one frame of it that is meant"
    if role == "control" and kind != clip_kind:
        a = {"image": "an image", "video": "a video"}
        return f"is {a[kind]}, and the clip is {a[clip_kind]}; make it {a[clip_kind]}"
    return None


def _aspect_ratio(info: MediaInfo) -> float:
    return info.width * info.pixel_aspect / info.height
