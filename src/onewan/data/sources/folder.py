"""A folder of clips: each video or image NAME.ext with its caption NAME.txt beside it.

Hides the walk through the folders, and which file is a clip, a caption or a mask.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

from onewan.data.masks import clip_stem, is_mask
from onewan.data.report import ClipProblem, ClipWarning
from onewan.data.sources.contents import SourceContents
from onewan.data.sources.item import SourceItem
from onewan.data.sources.names import Patterns, pairing_key
from onewan.media import IMAGE_SUFFIXES, UNREAD_IMAGE_SUFFIXES, VIDEO_SUFFIXES, extension
from onewan.runs.layout import displayed

BY_NAME = attrgetter("parts")
"""Sorts paths alike on all systems; comparing the paths themselves ignores case on Windows."""


def read_folder(
    folder: Path,
    video_formats: Sequence[str],
    *,
    recursive: bool = True,
    patterns: Patterns | None = None,
    use_masks: bool = False,
) -> SourceContents:
    """The clips below `folder` sorted by name, and what of it can't be used."""
    files = FolderFiles(folder)
    paths = walk(files, recursive=recursive)
    files.sort_by_role(paths, video_formats, patterns or Patterns())
    return files.contents(use_masks=use_masks)


@dataclass(slots=True)
class FolderFiles:
    """The files below one folder, by their role.

    A clip finds its caption and masks by the key of its path without extension (`pairing_key`).
    """

    folder: Path
    media: list[Path] = field(default_factory=list[Path])
    """Videos and images that can be clips, sorted by name."""
    clip_keys: set[str] = field(default_factory=set[str])
    """Keys of all videos and images, also those that are not used."""
    masks: dict[str, list[Path]] = field(default_factory=dict[str, list[Path]])
    """Mask files by the key of their clips."""
    texts: dict[str, list[Path]] = field(default_factory=dict[str, list[Path]])
    """Caption files by the key of their clips."""
    others: dict[str, Path] = field(default_factory=dict[str, Path])
    """Files of other kinds, one of each name, by key."""
    problems: list[ClipProblem] = field(default_factory=list[ClipProblem])
    warnings: list[ClipWarning] = field(default_factory=list[ClipWarning])
    """Of folders and files that are left out."""

    def sort_by_role(
        self, paths: Sequence[Path], video_formats: Sequence[str], patterns: Patterns
    ) -> None:
        """Sort the files `paths` into the fields."""
        names, left_out = list[str](), 0
        for path in paths:
            kind, key = extension(path), pairing_key(path.with_suffix(""))
            if kind == "txt":
                self.texts.setdefault(key, []).append(path)
            elif is_mask(path):  # of any format, so that an unsupported mask is reported
                self.masks.setdefault(pairing_key(clip_stem(path)), []).append(path)
            elif kind in IMAGE_SUFFIXES | UNREAD_IMAGE_SUFFIXES | VIDEO_SUFFIXES | {*video_formats}:
                self.clip_keys.add(key)
                names.append(path.relative_to(self.folder).as_posix())
                if not patterns.allow(names[-1]):
                    left_out += 1
                elif reason := _unusable_reason(kind, video_formats):
                    self.problems.append(ClipProblem(path=path, reason=reason))
                else:
                    self.media.append(path)
            else:  # metadata, notes, archives
                self.others[key] = path
        self._note_patterns(patterns, names, left_out)

    def _note_patterns(self, patterns: Patterns, names: Sequence[str], left_out: int) -> None:
        place = displayed(self.folder)
        if left_out:
            text = f"{left_out} of {len(names)} files in {place} are left out by include / exclude"
            self.warnings.append(ClipWarning(path=None, text=text))
        self.warnings += [
            ClipWarning(path=None, text=f"the pattern {pattern} fits no file in {place}")
            for pattern in patterns.unused(names)
        ]

    def contents(self, *, use_masks: bool) -> SourceContents:
        """The media files as items, with their captions and masks."""
        items = list[SourceItem]()
        for path in self.media:
            key = pairing_key(path.with_suffix(""))
            item = SourceItem(
                path=path,
                name=path.relative_to(self.folder).as_posix(),
                texts=tuple(self.texts.get(key, ())),
                masks=tuple(self.masks.get(key, ())) if use_masks else (),
            )
            items.append(item)
        warnings = self.warnings + self._unpaired_warnings(use_masks=use_masks)
        return SourceContents(items, self.problems, warnings)

    def _unpaired_warnings(self, *, use_masks: bool) -> list[ClipWarning]:
        """Captions and masks that belong to no clip; without `use_masks`, the number of masks."""
        warnings = [
            ClipWarning(path=path, text=self._unused_text(key))
            for key, paths in self.texts.items()
            if key not in self.clip_keys
            for path in paths
        ]
        if use_masks:
            return warnings + [
                ClipWarning(path=path, text="mask without a video or image of its name; unused")
                for key, paths in self.masks.items()
                if key not in self.clip_keys
                for path in paths
            ]
        if number := sum(len(paths) for paths in self.masks.values()):
            files = "mask file is" if number == 1 else "mask files are"
            text = f"{number} {files} not used (video_data.masks is false): {self.folder}"
            warnings.append(ClipWarning(path=None, text=text))
        return warnings

    def _unused_text(self, key: str) -> str:
        """Why the caption file of `key` is not used."""
        if other := self.others.get(key):
            kind = f"a {other.suffix} file" if other.suffix else "a file without extension"
            return f"caption of {kind}, which is neither a video nor an image that is read; unused"
        return "caption file without a video or image of its name; unused"


def _unusable_reason(kind: str, video_formats: Sequence[str]) -> str | None:
    """Why a video or image with the extension `kind` is not read; None if it is."""
    if kind in IMAGE_SUFFIXES or kind in video_formats:
        return None
    if kind in UNREAD_IMAGE_SUFFIXES:
        return f"{kind} is not read; convert it to png"
    return (
        f"{kind} is not among video_data.supported_formats ({', '.join(video_formats)}); "
        f"add {kind} there to use it"
    )


def walk(files: FolderFiles, *, recursive: bool) -> list[Path]:
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
            links.sort(key=BY_NAME, reverse=True)
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
                elif recursive:
                    (links if entry.is_symlink() else folders).append(entry)
        except OSError as error:
            reason = f"this folder can't be read ({error.strerror}); check its permissions"
            files.problems.append(ClipProblem(path=folder, reason=reason))
    files.problems.sort(key=lambda problem: problem.path)
    return sorted(found, key=BY_NAME)


def _is_folder(path: Path) -> bool:
    """Whether `path` is a folder or a link to one; false if the link's target can't be reached."""
    try:
        return path.is_dir()
    except OSError:
        return False
