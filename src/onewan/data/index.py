"""Folders -> clips, with a report of every file that can't be used and why.

Hides the walk through the folders and the pairing of media files with captions and masks. Reads no
more of a file than its header, one frame and its end. One bad file never hides another: each is in
the report with its reason, and the others are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onewan.data.clip import Clip, ClipFolder, ClipPlanner
from onewan.data.masks import clip_stem, is_mask
from onewan.data.report import ClipProblem, ClipWarning, DatasetReport
from onewan.errors import DataError
from onewan.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, extension


def index_clips(
    folders: Sequence[ClipFolder],
    planner: ClipPlanner,
    *,
    use_masks: bool,
    key_path: str = "video_data.sources",
) -> DatasetReport:
    """All clips of all `folders`, in an order that depends on names alone, and what is wrong.

    A clip depends on its own file and name, not on what else a folder contains. `key_path` is where
    the run file names the folders. Raises DataError for one that is not a folder; that no clip is
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
    for folder in folders:
        if not folder.path.is_dir():
            raise DataError(f"{folder.path}: is not a folder; correct {key_path} in the run file")
        files = _find_files(folder.path, planner.video_formats)
        problems += files.problems
        warnings += files.unpaired_warnings(use_masks=use_masks)
        for path in files.media:
            masks = files.masks.get(path.with_suffix(""), []) if use_masks else []
            try:
                clip = planner.plan(path, folder, read_captions(path), masks)
            except DataError as error:
                problems.append(ClipProblem.from_error(path, error))
                continue
            clips.append(clip)
            warnings += [ClipWarning(path=path, text=text) for text in planner.warnings(clip)]
    return DatasetReport(clips=tuple(clips), problems=tuple(problems), warnings=tuple(warnings))


def read_captions(path: Path) -> tuple[str, ...]:
    """The captions of a media file: the lines of NAME.txt beside it, or "" if that file is empty.

    Raises DataError if there is no such file or it is not UTF-8.
    """
    caption_file = path.with_suffix(".txt")
    try:
        # "-sig", since some editors on Windows begin a UTF-8 file with a byte order mark.
        text = caption_file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(
            f"{path}: has no caption; write one into {caption_file.name} beside it (an empty file "
            "trains without text)"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: its caption file {caption_file.name} is not UTF-8 (byte {error.start}); save "
            "it as UTF-8"
        ) from error
    except OSError as error:
        raise DataError(
            f"{path}: its caption file {caption_file.name} can't be read ({error.strerror}); check "
            "its permissions"
        ) from error
    captions = tuple(line.strip() for line in text.splitlines() if line.strip())
    return captions or ("",)


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
    texts: list[Path] = field(default_factory=list[Path])
    problems: list[ClipProblem] = field(default_factory=list[ClipProblem])

    def unpaired_warnings(self, *, use_masks: bool) -> list[ClipWarning]:
        """Captions and masks that belong to no clip; without `use_masks`, the number of masks."""
        warnings = [
            ClipWarning(path=path, text="caption file without a video or image of its name; unused")
            for path in self.texts
            if path.with_suffix("") not in self.clip_stems
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


def _find_files(folder: Path, video_formats: Sequence[str]) -> _FolderFiles:
    files = _FolderFiles(folder)
    for path in _walk(folder, files.problems, frozenset()):
        kind = extension(path)
        if kind == "txt":
            files.texts.append(path)
        if is_mask(path):  # of any format, so that an unsupported mask is reported
            files.masks.setdefault(clip_stem(path), []).append(path)
        elif kind in IMAGE_SUFFIXES or kind in video_formats:
            files.clip_stems.add(path.with_suffix(""))
            files.media.append(path)
        elif kind in VIDEO_SUFFIXES:
            files.clip_stems.add(path.with_suffix(""))
            reason = (
                f"{kind} is not among video_data.supported_formats ({', '.join(video_formats)}); "
                f"add {kind} there to use it"
            )
            files.problems.append(ClipProblem(path=path, reason=reason))
    return files


def _walk(folder: Path, problems: list[ClipProblem], parents: frozenset[Path]) -> Iterator[Path]:
    """Files below `folder`, depth first, sorted by name, without hidden files and folders.

    A subfolder that can't be read is added to `problems`.
    """
    resolved = folder.resolve()
    if resolved in parents:  # a symbolic link to one of its own parents
        return
    try:
        # `iterdir` has another order on each file system, and clips must not.
        entries = sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        reason = f"this folder can't be read ({error.strerror}); check its permissions"
        problems.append(ClipProblem(path=folder, reason=reason))
        return
    for entry in entries:
        if entry.name.startswith("."):  # also the temporary files of `onewan.files`
            continue
        if entry.is_dir():
            yield from _walk(entry, problems, parents | {resolved})
        else:
            yield entry
