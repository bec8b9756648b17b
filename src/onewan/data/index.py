"""Folders -> clips, with a report of every file that can't be used and why.

Hides the walk through the folders and the pairing of media files with captions and masks. Reads no
more of a file than its header, one frame and its end. One bad file never hides another: each is in
the report with its reason, and the others are used.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

from onewan.data.captions import read_lines, several_lines_note
from onewan.data.clip import Clip, ClipFolder, ClipPlanner
from onewan.data.masks import clip_stem, is_mask
from onewan.data.report import ClipProblem, ClipWarning, DatasetReport
from onewan.errors import DataError, combined
from onewan.media import IMAGE_SUFFIXES, UNREAD_IMAGE_SUFFIXES, VIDEO_SUFFIXES, extension

_BY_NAME = attrgetter("parts")
"""Sorts paths alike on all systems; comparing the paths themselves ignores case on Windows."""


def index_clips(
    folders: Sequence[ClipFolder],
    planner: ClipPlanner,
    *,
    use_masks: bool,
    key_path: str = "video_data.sources",
) -> DatasetReport:
    """All clips of all `folders`, in an order that depends on names alone, and what is wrong.

    A clip depends on its own file and name, not on what else a folder contains. `key_path` is where
    the run file names the folders. Raises DataError with all that are not folders; that no clip is
    found is not an error here.
    """
    clips = list[Clip]()
    problems = list[ClipProblem]()
    warnings = list[ClipWarning]()
    if planner.longest_clip != planner.max_frames:
        text = (
            f"wan_config.max_frames is {planner.max_frames}; {planner.longest_clip} are used, "
            f"since a clip has {planner.temporal_compression}n+1 frames"
        )
        warnings.append(ClipWarning(path=None, text=text))
    wrong = [f"{f.path}: {why}" for f in folders if (why := folder_problem(f.path, key_path))]
    if wrong:
        raise combined(DataError, wrong)
    for folder in folders:
        files = _find_files(folder.path, planner.video_formats)
        problems += files.problems
        warnings += files.warnings + files.unpaired_warnings(use_masks=use_masks)
        line_counts = list[int]()
        for path in files.media:
            stem = path.with_suffix("")
            masks = files.masks.get(stem, []) if use_masks else []
            try:
                lines = read_lines(path, files.texts.get(stem, []))
                captions = folder.captions.captions(lines, planner.seed)
                clip = planner.plan(path, folder, captions, masks)
            except DataError as error:
                problems.append(ClipProblem.from_error(path, error))
                continue
            clips.append(clip)
            line_counts.append(len(lines))
            warnings += [ClipWarning(path=path, text=text) for text in planner.warnings(clip)]
        if several := sum(number > 1 for number in line_counts):
            text = several_lines_note(
                folder.path, several, len(line_counts), whole=folder.captions.whole
            )
            warnings.append(ClipWarning(path=None, text=text))
    return DatasetReport(clips=tuple(clips), problems=tuple(problems), warnings=tuple(warnings))


def folder_problem(path: Path, key_path: str) -> str | None:
    """What is wrong with the folder that the run file names at `key_path`; None if it can be
    read."""
    try:
        is_folder = path.is_dir()
    except OSError as error:
        remedy = f"check the permissions of the folders above it, or correct {key_path}"
        return f"can't be read ({error.strerror}); {remedy} in the run file"
    return None if is_folder else f"is not a folder; correct {key_path} in the run file"


def media_files(folder: Path, video_formats: Sequence[str]) -> list[Path]:
    """The videos and images below `folder` that have a caption file, sorted by name."""
    files = _find_files(folder, video_formats)
    return [path for path in files.media if path.with_suffix("") in files.texts]


@dataclass(slots=True)
class _FolderFiles:
    """The files below one folder, by their role."""

    folder: Path
    media: list[Path] = field(default_factory=list[Path])
    """Videos and images that can be clips, sorted by name."""
    clip_stems: set[Path] = field(default_factory=set[Path])
    """Paths without extension of all videos and images, of unsupported formats too."""
    masks: dict[Path, list[Path]] = field(default_factory=dict[Path, list[Path]])
    """Mask files by the path of their clips without extension."""
    texts: dict[Path, list[Path]] = field(default_factory=dict[Path, list[Path]])
    """Caption files by the path of their clips without extension."""
    others: dict[Path, Path] = field(default_factory=dict[Path, Path])
    """Files of other kinds, one of each name, by their path without extension."""
    problems: list[ClipProblem] = field(default_factory=list[ClipProblem])
    warnings: list[ClipWarning] = field(default_factory=list[ClipWarning])
    """Of folders that are left out."""

    def unpaired_warnings(self, *, use_masks: bool) -> list[ClipWarning]:
        """Captions and masks that belong to no clip; without `use_masks`, the number of masks."""
        warnings = [
            ClipWarning(path=path, text=self._unused_text(stem))
            for stem, paths in self.texts.items()
            if stem not in self.clip_stems
            for path in paths
        ]
        if use_masks:
            return warnings + [
                ClipWarning(path=path, text="mask without a video or image of its name; unused")
                for stem, paths in self.masks.items()
                if stem not in self.clip_stems
                for path in paths
            ]
        if number := sum(len(paths) for paths in self.masks.values()):
            files = "mask file is" if number == 1 else "mask files are"
            text = f"{number} {files} not used (video_data.masks is false): {self.folder}"
            warnings.append(ClipWarning(path=None, text=text))
        return warnings

    def _unused_text(self, stem: Path) -> str:
        """Why the caption file of `stem` is not used."""
        if other := self.others.get(stem):
            kind = f"a {other.suffix} file" if other.suffix else "a file without extension"
            return f"caption of {kind}, which is neither a video nor an image that is read; unused"
        return "caption file without a video or image of its name; unused"


def _find_files(folder: Path, video_formats: Sequence[str]) -> _FolderFiles:
    files = _FolderFiles(folder)
    for path in _walk(files):
        kind, stem = extension(path), path.with_suffix("")
        if kind == "txt":
            files.texts.setdefault(stem, []).append(path)
        elif is_mask(path):  # of any format, so that an unsupported mask is reported
            files.masks.setdefault(clip_stem(path), []).append(path)
        elif kind in IMAGE_SUFFIXES or kind in video_formats:
            files.clip_stems.add(stem)
            files.media.append(path)
        elif kind in VIDEO_SUFFIXES:
            files.clip_stems.add(stem)
            reason = (
                f"{kind} is not among video_data.supported_formats ({', '.join(video_formats)}); "
                f"add {kind} there to use it"
            )
            files.problems.append(ClipProblem(path=path, reason=reason))
        elif kind in UNREAD_IMAGE_SUFFIXES:
            files.clip_stems.add(stem)
            reason = f"{kind} is not read; convert it to png"
            files.problems.append(ClipProblem(path=path, reason=reason))
        else:  # metadata, notes, archives
            files.others[stem] = path
    return files


def _walk(files: _FolderFiles) -> list[Path]:
    """All files below the folder, sorted by name, without hidden files and folders.

    Each real folder is read once, so that folders which link one another come to an end and no clip
    counts twice. Links are followed last, since a clip is named by its real folder. What is left
    out is added to the problems and warnings of `files`.
    """
    found, folders, links = list[Path](), [files.folder], list[Path]()
    visited = set[object]()
    while folders or links:
        if not folders:
            # By name, since each file system has another order, and clips must not.
            links.sort(key=_BY_NAME, reverse=True)
            folders.append(links.pop())
        folder = folders.pop()
        try:
            # With "/.", this is an error if the folder may be listed, but not entered.
            stat = os.stat(os.path.join(folder, os.curdir))
            # Some file systems on Windows have no numbers of files.
            real = (stat.st_dev, stat.st_ino) if stat.st_ino else folder.resolve()
            if real in visited:
                text = "leads to a folder that is read already, so it is left out"
                files.warnings.append(ClipWarning(path=folder, text=text))
                continue
            visited.add(real)
            for entry in folder.iterdir():
                if entry.name.startswith("."):  # also the temporary files of `onewan.files`
                    continue
                if not _is_folder(entry):
                    found.append(entry)
                else:
                    (links if entry.is_symlink() else folders).append(entry)
        except OSError as error:
            reason = f"this folder can't be read ({error.strerror}); check its permissions"
            files.problems.append(ClipProblem(path=folder, reason=reason))
    files.problems.sort(key=lambda problem: problem.path)
    return sorted(found, key=_BY_NAME)


def _is_folder(path: Path) -> bool:
    """Whether `path` is a folder or a link to one; false if the link's target can't be reached."""
    try:
        return path.is_dir()
    except OSError:
        return False
