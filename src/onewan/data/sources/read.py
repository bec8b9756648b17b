"""From the settings of a source to its items: which module reads it, and what can't be read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onewan.data.clip import ClipSource
from onewan.data.sources.contents import SourceContents
from onewan.data.sources.folder import read_folder


def read_source(
    source: ClipSource, video_formats: Sequence[str], *, use_masks: bool
) -> SourceContents:
    """The items of `source`, in an order that depends on names alone, and what is wrong with it."""
    return read_folder(
        source.path,
        video_formats,
        recursive=source.recursive,
        patterns=source.patterns,
        use_masks=use_masks,
    )


def source_problem(path: Path, key_path: str) -> str | None:
    """What is wrong with the source that the run file names at `key_path`; None if it can be
    read."""
    try:
        is_folder = path.is_dir()
    except OSError as error:
        remedy = f"check the permissions of the folders above it, or correct {key_path}"
        return f"can't be read ({error.strerror}); {remedy} in the run file"
    return None if is_folder else f"is not a folder; correct {key_path} in the run file"
