"""Sources -> clips, with one report of all that can't be used and why.

Hides the walk through the folders, the captions, and the choice of the span of each file. Reads no
more of a file than its header, one frame and its end. One bad file never hides another: each is in
the report with its reason, and the rest are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import floor
from pathlib import Path
from typing import Literal

from onewan.arithmetic.buckets import choose_size, floor_to_4n_plus_1
from onewan.config.schema import SourceSection, VideoDataFields, WanTrainConfig
from onewan.data.masks import Mask, is_mask, mask_for, masked_by
from onewan.errors import DataError
from onewan.media import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    MediaInfo,
    extension,
    keyframe_near,
    probe,
)
from onewan.seeds import derive_seed

_NAMES_SHOWN = 3
"""Files named for a note that many files share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """A span of a video file, or an image, with its captions."""

    path: Path
    name: str
    """The path relative to its source, with forward slashes, so equal on every machine."""
    captions: tuple[str, ...]
    """At least one; alternatives of which each draw takes one."""
    kind: Literal["video", "image"]
    start: float
    """Time of the first frame in the file's own clock, s."""
    fps: float
    """Frames per second at which the clip is taken."""
    frames: int
    """4n+1; 1 for an image."""
    size: tuple[int, int]
    """(width, height) to train at."""
    source_size: tuple[int, int]
    """(width, height) of the upright picture in the file, in square pixels."""
    repeats: int
    """How often it comes in one pass over the data."""
    loss_weight: float = 1.0
    """What its loss is multiplied with."""
    is_prior: bool = False
    """Whether it teaches what the untrained model makes of it, and not what it shows."""
    mask: Mask | None = None
    """Which of its places count; None where all do."""

    def times(self) -> tuple[float, ...]:
        """When each frame is shown in the file's own clock, s."""
        return tuple(self.start + k / self.fps for k in range(self.frames))


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A file that is not used."""

    path: Path
    reason: str
    """What is wrong and what to do, without the path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Something worth knowing that keeps nothing from being used."""

    path: Path | None
    """None for a note about the whole run."""
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the sources hold: the clips, what can't be used, and what is worth knowing."""

    clips: tuple[Clip, ...]
    problems: tuple[Problem, ...]
    notes: tuple[Note, ...]
    held_out: tuple[Clip, ...] = ()
    """Clips to validate on, which do not train."""

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """The report for a person: counts, each unusable file, and the notes by kind."""
        videos = sum(clip.kind == "video" for clip in self.clips)
        kinds = f"{_count(videos, 'video')}, {_count(len(self.clips) - videos, 'image')}"
        out = [f"{_count(len(self.clips), 'clip')} ({kinds})"]
        for size, frames in sorted({(clip.size, clip.frames) for clip in self.clips}):
            number = sum((clip.size, clip.frames) == (size, frames) for clip in self.clips)
            shape = f"{size[0]}x{size[1]}, {_count(frames, 'frame')}"
            out.append(f"  {shape}: {_count(number, 'clip')}")
        masked = sum(clip.mask is not None for clip in self.clips)
        if masked:
            out.append(f"  with a mask: {_count(masked, 'clip')}")
        if self.held_out:
            out.append(f"held out for validation: {_count(len(self.held_out), 'clip')}")
        if self.problems:
            out.append(f"{_count(len(self.problems), 'file')} can't be used:")
            out += [f"  {problem.path}: {problem.reason}" for problem in self.problems]
        if self.notes:
            out.append("Notes:")
            by_text: dict[str, list[Path]] = {}
            for note in self.notes:
                by_text.setdefault(note.text, []).extend([note.path] if note.path else [])
            out += [f"  {_names(paths)}{text}" for text, paths in by_text.items()]
        return out


def index_clips(
    video_data: VideoDataFields,
    wan: WanTrainConfig,
    *,
    seed: int,
    target_fps: float,
    resolutions: Sequence[int | str],
    size_multiple: int,
    temporal_compression: int,
    field: str = "video_data.sources",
) -> Report:
    """All clips of all sources, in an order that depends on names alone, and what is wrong.

    `seed` places the spans of the strategy "random"; a clip's place depends on the seed and its
    name, not on what else the source holds. Raises `DataError` for a source that is not a folder;
    `field` is where the run file names it. That no clip is left is for the caller to judge.
    """
    planner = ClipPlanner(
        video_data=video_data,
        wan=wan,
        seed=seed,
        fps=target_fps,
        resolutions=tuple(resolutions),
        size_multiple=size_multiple,
        temporal=temporal_compression,
    )
    clips: list[Clip] = []
    problems: list[Problem] = []
    notes: list[Note] = []
    whole = floor_to_4n_plus_1(wan.max_frames, temporal_compression)
    if whole != wan.max_frames:
        notes.append(
            Note(
                path=None,
                text=f"wan_config.max_frames is {wan.max_frames}; {whole} are used, since a clip "
                f"has {temporal_compression}n+1 frames",
            )
        )
    for source in video_data.sources:
        if not source.path.is_dir():
            raise DataError(f"{source.path}: is not a folder; correct {field} in the run file")
        media, masks = _media_files(
            source.path, problems, notes, video_data.supported_formats, masks=video_data.masks
        )
        for path in media:
            try:
                clip, clip_notes = planner.clip(path, source, masks.get(path.with_suffix(""), ()))
            except DataError as error:
                problems.append(Problem(path=path, reason=str(error).removeprefix(f"{path}: ")))
                continue
            clips.append(clip)
            notes += clip_notes
    return Report(clips=tuple(clips), problems=tuple(problems), notes=tuple(notes))


# --- Files ---------------------------------------------------------------------------------------


def _media_files(
    folder: Path,
    problems: list[Problem],
    notes: list[Note],
    formats: Sequence[str],
    *,
    masks: bool,
) -> tuple[list[Path], dict[Path, list[Path]]]:
    """The usable kinds of media file below `folder`, by name, and the masks by `masked_by`.

    What is left out goes into the lists; without `masks` that is every mask.
    """
    videos = VIDEO_SUFFIXES | set(formats)
    media: list[Path] = []
    found: list[Path] = []
    texts: list[Path] = []
    named: set[Path] = set()
    for path in _walk(folder, problems, frozenset()):
        kind = extension(path)
        if kind == "txt":
            texts.append(path)
        if is_mask(path):  # of any kind: that one can't be read must not go unnoticed
            found.append(path)
            continue
        if kind not in videos | IMAGE_SUFFIXES:
            continue
        named.add(path.with_suffix(""))
        if kind in IMAGE_SUFFIXES or kind in formats:
            media.append(path)
        else:
            problems.append(
                Problem(
                    path=path,
                    reason=f"{kind} is not among video_data.supported_formats "
                    f"({', '.join(formats)}); add {kind} there to use it",
                )
            )
    notes += [
        Note(path=path, text="captions without a video or image of that name; not used")
        for path in texts
        if path.with_suffix("") not in named
    ]
    if not masks:
        if found:
            files = "mask file is" if len(found) == 1 else "mask files are"
            text = f"{len(found)} {files} not used (video_data.masks is false): {folder}"
            notes.append(Note(path=None, text=text))
        return media, {}
    by_name: dict[Path, list[Path]] = {}
    for path in found:
        by_name.setdefault(masked_by(path), []).append(path)
        if masked_by(path) not in named:
            text = "a mask without a video or image of that name; not used"
            notes.append(Note(path=path, text=text))
    return media, by_name


def _walk(folder: Path, problems: list[Problem], above: frozenset[Path]) -> Iterator[Path]:
    """Files below `folder`, depth first in the order of names; hidden ones are passed over."""
    real = folder.resolve()
    if real in above:  # a link that leads back up
        return
    try:
        entries = sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        reason = f"this folder can't be read ({error.strerror}); check its permissions"
        problems.append(Problem(path=folder, reason=reason))
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry, problems, above | {real})
        else:
            yield entry


def _captions(path: Path) -> tuple[str, ...]:
    """The captions beside a media file, one a line; an empty file is one empty caption."""
    beside = path.with_suffix(".txt")
    try:
        text = beside.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(
            f"{path}: has no caption; write one into {beside.name} beside it (an empty file will "
            "do for training without text)"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: its caption file {beside.name} is not UTF-8 (byte {error.start}); save it "
            "as UTF-8"
        ) from error
    except OSError as error:
        raise DataError(
            f"{path}: its caption file {beside.name} can't be read ({error.strerror}); check its "
            "permissions"
        ) from error
    captions = tuple(line.strip() for line in text.splitlines() if line.strip())
    return captions or ("",)


# --- Spans ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipPlanner:
    """The settings that turn one media file into one clip."""

    video_data: VideoDataFields
    wan: WanTrainConfig
    seed: int
    fps: float
    resolutions: tuple[int | str, ...]
    size_multiple: int
    temporal: int

    def clip(
        self, path: Path, source: SourceSection, masks: Sequence[Path]
    ) -> tuple[Clip, list[Note]]:
        """The clip of `path` with the captions beside it; `DataError` if unusable."""
        return self.captioned(path, source, _captions(path), masks)

    def captioned(
        self, path: Path, source: SourceSection, captions: tuple[str, ...], masks: Sequence[Path]
    ) -> tuple[Clip, list[Note]]:
        """The clip of `path` and what is worth knowing about it; `DataError` if unusable.

        `masks` are the files that could be its mask.
        """
        info = probe(path)
        self._check_size(info)
        name = path.relative_to(source.path).as_posix()
        frames = self._frames(info)
        width, height = info.shown_size
        limit = self.video_data.max_resolution
        size = choose_size(width, height, self.resolutions, self.size_multiple, limit)
        clip = Clip(
            path=path,
            name=name,
            captions=captions,
            kind=info.kind,
            start=self._start(info, name, frames),
            fps=self.fps,
            frames=frames,
            size=size,
            source_size=(width, height),
            repeats=source.repeats,
            loss_weight=source.loss_weight,
            is_prior=source.target == "base",
        )
        mask = mask_for(info, clip.times(), masks, self.video_data.supported_formats)
        return replace(clip, mask=mask), list(self._notes(clip))

    def _check_size(self, info: MediaInfo) -> None:
        # Either way up, as for the largest size: portrait is no smaller than landscape.
        have = sorted((info.width, info.height))
        least = self.video_data.min_resolution
        if have[0] < min(least) or have[1] < max(least):
            raise DataError(
                f"{info.path}: is {info.width}x{info.height}, smaller than "
                f"video_data.min_resolution ({least[0]}x{least[1]}); lower that, or take it out"
            )

    def _frames(self, info: MediaInfo) -> int:
        longest = floor(self.video_data.max_duration * self.fps + 1e-6)
        wanted = min(self.wan.max_frames, max(1, longest), info.frames_at(self.fps))
        return floor_to_4n_plus_1(wanted, self.temporal)

    def _start(self, info: MediaInfo, name: str, frames: int) -> float:
        """Time of the first frame by `wan_config.frame_sample_strategy`, s."""
        slack = max(0.0, info.last - info.start - (frames - 1) / self.fps)
        strategy = self.wan.frame_sample_strategy
        if info.kind == "image" or not slack:
            return info.start
        if strategy == "keyframe":
            key = keyframe_near(info.path, (info.start + info.last) / 2)
            # Too near the end for all frames: as late as they fit.
            return min(max(key, info.start), info.start + slack)
        part = 0.5
        if strategy == "random":
            part = derive_seed(self.seed, "span", name) / 2**63
        # On a frame of the file. Midway between two, the last bit of each time would decide which
        # of them is nearest, so that frames would come twice and others not at all.
        whole = floor(slack * part / info.frame_interval + 1e-6)
        return info.start + whole * info.frame_interval

    def _notes(self, clip: Clip) -> Iterator[Note]:
        width, height = clip.source_size
        if clip.size[0] > width or clip.size[1] > height:
            yield Note(
                path=clip.path,
                text=f"scaled up from {width}x{height} to {clip.size[0]}x{clip.size[1]}",
            )
        most = floor_to_4n_plus_1(self.wan.max_frames, self.temporal)
        if clip.kind == "video" and clip.frames < most:
            yield Note(
                path=clip.path,
                text=f"{_count(clip.frames, 'frame')} at {clip.fps:g} fps instead of {most}: the "
                "file is short, or video_data.max_duration is",
            )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _names(paths: Sequence[Path]) -> str:
    """The first few of `paths`, as the beginning of a line of the report."""
    if not paths:
        return ""
    more = len(paths) - _NAMES_SHOWN
    names = ", ".join(path.name for path in paths[:_NAMES_SHOWN])
    return f"{names} and {_count(more, 'other')}: " if more > 0 else f"{names}: "
