"""A folder of clips: each video or image NAME.ext with its caption NAME.txt beside it.

Hides which file is a clip, a caption, a mask or a condition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onewan.data.captions import reviewed_key
from onewan.data.companions import NOUNS, Role, clip_stem, role_of
from onewan.data.report import ClipProblem, ClipWarning, count
from onewan.data.sources.contents import SourceContents
from onewan.data.sources.item import SourceItem
from onewan.data.sources.names import Patterns, pairing_key, with_keys_of_clips
from onewan.data.sources.place import Listing
from onewan.media import IMAGE_SUFFIXES, UNREAD_IMAGE_SUFFIXES, VIDEO_SUFFIXES, extension


def read_folder(
    listing: Listing,
    label: str,
    video_formats: Sequence[str],
    *,
    patterns: Patterns | None = None,
    use_masks: bool = False,
) -> SourceContents:
    """The clips among the files of a folder, and what of it can't be used. `label` is the folder's
    name in messages."""
    files = _FolderFiles(listing.folder, label)
    files.problems += listing.problems
    files.warnings += listing.warnings
    files.sort_by_role(listing.paths, video_formats, patterns or Patterns())
    return files.contents(use_masks=use_masks)


@dataclass(slots=True)
class _FolderFiles:
    """The files below one folder, by their role.

    A clip finds its caption and companions by the key of its path without extension
    (`pairing_key`).
    """

    folder: Path
    label: str
    media: list[Path] = field(default_factory=list[Path])
    """Videos and images that can be clips, sorted by name."""
    clip_keys: set[str] = field(default_factory=set[str])
    """Keys of all videos and images, also those that are not used."""
    companions: dict[tuple[Role, str], list[Path]] = field(
        default_factory=dict[tuple[Role, str], list[Path]]
    )
    """Files of each role by the key of their clips."""
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
            elif role := role_of(path):  # of any format, so that an unsupported one is reported
                clip_key = pairing_key(clip_stem(path))
                self.companions.setdefault((role, clip_key), []).append(path)
            elif kind in IMAGE_SUFFIXES | UNREAD_IMAGE_SUFFIXES | VIDEO_SUFFIXES | {*video_formats}:
                self.clip_keys.add(key)
                names.append(path.relative_to(self.folder).as_posix())
                if not patterns.allow(names[-1]):
                    left_out += 1
                elif reason := unusable_reason(kind, video_formats):
                    self.problems.append(ClipProblem(path=path, reason=reason))
                else:
                    self.media.append(path)
            else:  # metadata, notes, archives
                self.others[key] = path
        self.texts = with_keys_of_clips(self.texts, self.clip_keys)
        by_role: dict[Role, dict[str, list[Path]]] = {}
        for (role, key), files in self.companions.items():
            by_role.setdefault(role, {})[key] = files
        self.companions = {
            (role, key): files
            for role, found in by_role.items()
            for key, files in with_keys_of_clips(found, self.clip_keys).items()
        }
        self._note_patterns(patterns, names, left_out)

    def _note_patterns(self, patterns: Patterns, names: Sequence[str], left_out: int) -> None:
        if left_out:
            text = (
                f"{left_out} of {len(names)} files in {self.label} are left out by include / "
                "exclude"
            )
            self.warnings.append(ClipWarning(path=None, text=text))
        self.warnings += [
            ClipWarning(path=None, text=f"the pattern {pattern} fits no file in {self.label}")
            for pattern in patterns.unused(names)
        ]

    def contents(self, *, use_masks: bool) -> SourceContents:
        """The media files as items, with their captions and companions."""
        items = list[SourceItem]()
        for path in self.media:
            key = pairing_key(path.with_suffix(""))
            item = SourceItem(
                path=path,
                name=path.relative_to(self.folder).as_posix(),
                texts=tuple(self.texts.get(key, ())),
                masks=self._companions("mask", key) if use_masks else (),
                condition_images=self._companions("condition", key),
                controls=self._companions("control", key),
            )
            items.append(item)
        warnings = self.warnings + self._unpaired_warnings(use_masks=use_masks)
        return SourceContents(items, self.problems, warnings)

    def _companions(self, role: Role, key: str) -> tuple[Path, ...]:
        return tuple(self.companions.get((role, key), ()))

    def _unpaired_warnings(self, *, use_masks: bool) -> list[ClipWarning]:
        """Captions and companions that belong to no clip; without `use_masks`, the number of
        masks."""
        unpaired = {key: paths for key, paths in self.texts.items() if key not in self.clip_keys}
        for_review = {key for key in unpaired if reviewed_key(key) in self.clip_keys}
        warnings = [
            ClipWarning(path=path, text=self._unused_text(key))
            for key, paths in unpaired.items()
            if key not in for_review
            for path in paths
        ]
        if for_review:
            text = (
                f"{count(len(for_review), 'caption')} for review (NAME.caption.txt) in "
                f"{self.label}: not used; rename a file to NAME.txt to train with it"
            )
            warnings.append(ClipWarning(path=None, text=text))
        warnings += [
            ClipWarning(
                path=path, text=f"{NOUNS[role]} without a video or image of its name; unused"
            )
            for (role, key), paths in self.companions.items()
            if key not in self.clip_keys and (use_masks or role != "mask")
            for path in paths
        ]
        masks = [paths for (role, _), paths in self.companions.items() if role == "mask"]
        if not use_masks and (number := sum(map(len, masks))):
            files = "mask file is" if number == 1 else "mask files are"
            text = f"{number} {files} not used (video_data.masks is false): {self.label}"
            warnings.append(ClipWarning(path=None, text=text))
        return warnings

    def _unused_text(self, key: str) -> str:
        """Why the caption file of `key` is not used."""
        if other := self.others.get(key):
            kind = f"a {other.suffix} file" if other.suffix else "a file without extension"
            return f"caption of {kind}, which is neither a video nor an image that is read; unused"
        return "caption file without a video or image of its name; unused"


def unusable_reason(kind: str, video_formats: Sequence[str]) -> str | None:
    """Why a file with the extension `kind` is not read as a clip; None if it is."""
    if kind in IMAGE_SUFFIXES or kind in video_formats:
        return None
    if kind not in UNREAD_IMAGE_SUFFIXES | VIDEO_SUFFIXES:
        return "is neither a video nor an image that is read, by its name"
    if kind in UNREAD_IMAGE_SUFFIXES:
        return f"{kind} is not read; convert it to png"
    return (
        f"{kind} is not among video_data.supported_formats ({', '.join(video_formats)}); "
        f"add {kind} there to use it"
    )
