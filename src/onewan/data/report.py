"""The report on a data set: its clips, the files that can't be used, and warnings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from onewan.data.clip import Clip, alternatives, count_clips
from onewan.data.clip_notes import taken, used_seconds
from onewan.errors import DataError, one_line

_T = TypeVar("_T")

_FILES_NAMED = 3
"""File names shown in a line that concerns many files; the rest are counted."""
_VIDEOS_LISTED = 20
"""Lines on what is taken of single videos; the other videos are counted."""


def _kind(path: Path, text: str) -> str:
    """`text` about the file without the names and numbers in which files of one kind differ."""
    names = rf"{re.escape(one_line(path.stem))}(\.\w+)+"
    return re.sub(rf"{names}|\d+(\.\d+)?", "#", text)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipProblem:
    """A file that can't be used."""

    path: Path
    reason: str
    """What is wrong and what to do, without the path."""

    @staticmethod
    def from_error(path: Path, error: DataError) -> ClipProblem:
        """The problem that `error`, whose message may begin with `path`, describes."""
        # Messages of errors have control characters written as escapes.
        return ClipProblem(path=path, reason=str(error).removeprefix(f"{one_line(str(path))}: "))

    def __str__(self) -> str:
        return one_line(f"{self.path}: {self.reason}")

    @property
    def kind(self) -> str:
        """The reason without the names and numbers in which files of one kind differ."""
        return _kind(self.path, self.reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipWarning:
    """Something the user should know about a file that is used nevertheless."""

    path: Path | None
    """None if the warning concerns the whole data set."""
    text: str
    about: str = ""
    """What it is about, in a word or two for a table; empty for what is said in the text only."""
    other: Path | None = None
    """The file that it is like, of a duplicate."""

    @property
    def kind(self) -> str:
        """The text without the names and numbers in which files of one kind differ."""
        return self.text if self.path is None else _kind(self.path, self.text)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetReport:
    """The usable clips, the unusable files and the warnings of a data set."""

    clips: tuple[Clip, ...]
    """Training clips."""
    problems: tuple[ClipProblem, ...]
    warnings: tuple[ClipWarning, ...]
    validation_clips: tuple[Clip, ...] = ()
    """Clips that are held out of training, to validate on."""
    contact_sheet: str | None = None
    """A line about the contact sheet of the clips, and where it is."""
    contact_sheet_pages: tuple[Path, ...] = ()
    """Its pages, JPEG files."""
    problem_list: Path | None = None
    """A file that lists all `problems`, so that `lines` need not."""
    listed_before: frozenset[str] = frozenset()
    """The lines that this file had before."""

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self, *, repeat: bool = True, with_taken: bool = True) -> list[str]:
        """The report as text: counts, each unusable file, and the warnings grouped by text. Without
        `repeat`, unusable files that an earlier report has named are counted. `with_taken` adds
        what is taken of each video."""
        left_out = f", {len(self.problems)} left out" if self.problems else ""
        number = count(count_clips(self.clips), "clip")
        lines = [f"{number} ({self._kinds()}){left_out}", *self._bucket_lines()]
        if self.validation_clips:
            lines.append(f"held out for validation: {count(len(self.validation_clips), 'clip')}")
        lines += self._taken_lines() if with_taken else []
        new = self.problems
        if not repeat:
            new = tuple(p for p in new if str(p) not in self.listed_before)
        if new:
            lines.append(f"{count(len(new), 'file')} can't be used:")
            lines += [f"  {line}" for line in self._problem_lines(new)]
        if known := len(self.problems) - len(new):
            lines.append(
                f"{count(known, 'file')} can't be used, as before (listed by `onewan cache` and in "
                f"{self.problem_list})"
            )
        if self.warnings:
            lines.append("Warnings:")
            for _, alike in _groups(self.warnings, lambda warning: warning.kind):
                lines += [f"  {line}" for line in _warning_lines(alike)]
        return [*lines, self.contact_sheet] if self.contact_sheet else lines

    def _kinds(self) -> str:
        """How many videos and images the training clips are of."""
        in_videos = [clip for clip in self.clips if clip.kind == "video"]
        clips, videos = count_clips(in_videos), len({clip.path for clip in in_videos})
        from_ = f"{clips} from " if clips > videos else ""
        return (
            f"{from_}{count(videos, 'video')}, {count(len(self.clips) - len(in_videos), 'image')}"
        )

    def _bucket_lines(self) -> list[str]:
        """The number of training clips of each shape, and of those with a mask, ..."""
        clips = [group[0] for group in alternatives(self.clips)]
        shapes = sorted(Counter((clip.size, clip.frames) for clip in clips).items())
        lines = [
            f"  {size[0]}x{size[1]}, {count(frames, 'frame')}: {count(number, 'clip')}"
            for (size, frames), number in shapes
        ]
        if masked := sum(clip.mask is not None for clip in clips):
            lines.append(f"  with a mask: {count(masked, 'clip')}")
        what = "reference" if any(clip.conditions.as_reference for clip in clips) else "condition"
        if given := sum(clip.conditions.image is not None for clip in clips):
            lines.append(f"  with a {what} image of their own: {count(given, 'clip')}")
        own = [clip.conditions for clip in clips if clip.conditions.image is None]
        if random := sum(conditions.has_own_image for conditions in own):
            lines.append(f"  with a random frame as their {what} image: {count(random, 'clip')}")
        if controlled := sum(clip.conditions.control is not None for clip in clips):
            lines.append(f"  with a control video: {count(controlled, 'clip')}")
        if augmented := sum(clip.augmentation is not None for clip in clips):
            lines.append(f"  with augmented variants: {count(augmented, 'clip')}")
        return lines

    def _taken_lines(self) -> list[str]:
        """How many frames and seconds are taken of each video; a line for those that are alike."""
        videos: dict[tuple[Path, str, float, bool], list[Clip]] = {}
        for clip in (*self.clips, *self.validation_clips):
            if clip.kind == "video":
                # Sources that share a file may take it at other rates, or other spans in each pass.
                how = (clip.path, clip.item_name, clip.fps, clip.takes > 1)
                videos.setdefault(how, []).append(clip)
        if not videos:
            return []
        notes = [ClipWarning(path=path, text=taken(clips)) for (path, *_), clips in videos.items()]
        used = sum(used_seconds(clips) for clips in videos.values())
        total = sum(clips[0].source_seconds for clips in videos.values())
        lines = [f"Taken of the videos, {used:.1f} s of {total:.1f} s:"]
        groups = list(_groups(notes, lambda note: note.text))
        for text, alike in groups[:_VIDEOS_LISTED]:
            lines.append(f"  {_name_prefix([note.path for note in alike if note.path])}{text}")
        if more := sum(len(alike) for _, alike in groups[_VIDEOS_LISTED:]):
            lines.append(f"  and {count(more, 'other video')}, which `onewan doctor` lists")
        return lines

    def _problem_lines(self, problems: Sequence[ClipProblem]) -> list[str]:
        """A line for each problem; one for many of a kind if there is a file with all of them."""
        if self.problem_list is None:
            return [str(problem) for problem in problems]
        lines, footer = list[str](), list[str]()
        for _, alike in _groups(problems, lambda problem: problem.kind):
            if len(alike) <= _FILES_NAMED:
                lines += [str(problem) for problem in alike]
                continue
            footer = [f"all are listed in {self.problem_list}"]
            first, *others = alike
            names = ", ".join(problem.path.name for problem in others[: _FILES_NAMED - 1])
            lines.append(
                f"{first.path} and {count(len(others), 'other')} like it ({names}, ...): "
                f"{first.reason}"
            )
        return lines + footer


def count(number: int, noun: str) -> str:
    """`number` and the noun in singular or plural: "1 clip", "2 clips"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _groups(items: Iterable[_T], key: Callable[[_T], str]) -> Iterable[tuple[str, list[_T]]]:
    """The items by their key, in the order in which the keys come first."""
    groups: dict[str, list[_T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups.items()


def _warning_lines(alike: Sequence[ClipWarning]) -> Iterable[str]:
    """A line for each text; one for all of the kind if there are many: a data set of long files has
    thousands of which a part is used, and no two of the same length."""
    texts = list(_groups(alike, lambda warning: warning.text))
    if len(texts) > _FILES_NAMED:
        first, *others = alike
        names = ", ".join(each.path.name for each in others[: _FILES_NAMED - 1] if each.path)
        assert first.path is not None
        yield (
            f"{first.path.name} and {count(len(others), 'other')} like it ({names}, ...): "
            f"{first.text}"
        )
        return
    for text, warnings in texts:
        yield f"{_name_prefix([each.path for each in warnings if each.path])}{text}"


def _name_prefix(paths: Sequence[Path]) -> str:
    """The names of the first few of `paths`, to begin a line with; empty if there are none."""
    if not paths:
        return ""
    more = len(paths) - _FILES_NAMED
    names = ", ".join(path.name for path in paths[:_FILES_NAMED])
    return f"{names} and {count(more, 'other')}: " if more > 0 else f"{names}: "
