"""`SourceItem`: what a source says about one media file, in the form that all kinds share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, inf
from pathlib import Path
from typing import Literal, TypeAlias

from onewan.data.conditions import ConditionChoice
from onewan.errors import DataError
from onewan.media import MediaInfo

Split: TypeAlias = Literal["train", "validation"]

_FRAME_ROUNDING = 0.05
"""Frames by which a time may be past a frame and still mean it: tables have rounded times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionCell:
    """The cell of a table that a caption is from."""

    table: Path
    number: int
    """Of its row; see `onewan.data.sources.rows.Row`."""
    column: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceItem:
    """One media file of a source, or a part of it, before anything of it is read."""

    path: Path
    name: str
    """Of the clip: the same on every machine, with forward slashes."""
    captions: tuple[str, ...] | None = None
    """The captions that the source itself gives; None: those in `texts`."""
    cell: CaptionCell | None = None
    """Where `captions` are, if that is a cell of a table of their own."""
    texts: tuple[Path, ...] = ()
    """Caption files by the file's name."""
    masks: tuple[Path, ...] = ()
    """Files that could be its loss mask."""
    condition_images: tuple[Path, ...] = ()
    """Files that could be its condition image."""
    controls: tuple[Path, ...] = ()
    """Files that could be its control video."""
    condition: ConditionChoice | None = None
    """Which frame is the condition image where no file is; None: what its source says."""
    start: float = 0.0
    """Where the part that is used begins, s after the first frame."""
    end: float | None = None
    """Where it ends, s after the first frame; None is the end of the file."""
    repeats: int = 1
    """Factor of the repeats of its source."""
    weight: float = 1.0
    """Factor of the loss weight of its source."""
    is_prior: bool = False
    """Whether its target is the base model's prediction, whatever its source says."""
    split: Split | None = None
    """What it is for; None: what its source is for."""
    origin: str = ""
    """Where the source says it, for messages, such as "clips.csv, line 5"."""

    @property
    def companions(self) -> tuple[Path, ...]:
        """All files of pictures besides its own."""
        return (*self.masks, *self.condition_images, *self.controls)

    @property
    def part(self) -> tuple[float, float | None] | None:
        """(start, end) of the part of the file that is used; None: all of it."""
        return None if self.start == 0 and self.end is None else (self.start, self.end)

    def bounds(self, info: MediaInfo) -> tuple[float, float]:
        """The times between which frames of the file are those of the part, in its own clock; the
        end is not included."""
        if info.kind == "image":
            return -inf, inf
        rounding = _FRAME_ROUNDING * info.frame_interval
        first = info.start + self.start - rounding if self.start else -inf
        return first, inf if self.end is None else info.start + self.end - rounding

    def within(self, info: MediaInfo) -> MediaInfo:
        """`info` of the file as if it had only the frames of the part that is used: from the first
        one at or after `start` to the last one before `end`.

        DataError, which names the file, if the file has no frame there.
        """
        if info.kind == "image" or self.part is None:
            return info
        # On frames, as `ClipPlanner` has all times; the given ones may be rounded.
        interval = info.frame_interval or 1.0
        start = info.start + interval * ceil(self.start / interval - _FRAME_ROUNDING)
        last = info.last
        if self.end is not None:
            before_end = ceil(self.end / interval - _FRAME_ROUNDING) - 1
            last = min(last, info.start + interval * before_end)
        if start > info.last + interval / 2 or last < start - interval / 2:
            end = "its end" if self.end is None else f"{self.end:g} s"
            raise DataError(
                f"{info.path}: has no frame from {self.start:g} s to {end}, since it is "
                f"{info.last - info.start + interval:.2f} s long; correct the times"
            )
        return replace(info, start=start, last=max(start, last))
