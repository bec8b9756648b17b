"""The files that `onewan sample` writes: their names, and what would keep it from writing them.

Checked before a model is loaded, so that no video is lost after minutes of sampling.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from onewan.documents import decode_text
from onewan.errors import ConfigError, DataError
from onewan.files import read_input, unwritable_reason
from onewan.media import check_video_name
from onewan.runs.layout import RunLayout

_MAX_PROMPT_BYTES = 1 << 20


def video_paths(out: Path, count: int, format: str) -> list[Path]:
    """The files for `count` videos.

    A folder, which is one that exists or a name without an ending, gets 0.mp4, 1.mp4, ... as the
    samples of a run. A file's name is that of one video; several become NAME-0.mp4, NAME-1.mp4, ...
    """
    if os.path.isdir(out) or not out.suffix:
        return [out / f"{number}.{format}" for number in range(count)]
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{number}{out.suffix}") for number in range(count)]


def unused_video_paths(layout: RunLayout, label: str, count: int, format: str) -> list[Path]:
    """Files in the run's own folder for `count` videos, LABEL-0.mp4, LABEL-1.mp4, ..., with numbers
    after those of earlier ones."""
    folder = layout.manual_samples_dir
    names = (re.fullmatch(rf"{label}-([0-9]+)", path.stem) for path in folder.glob(f"{label}-*"))
    first = 1 + max((int(name[1]) for name in names if name), default=-1)
    return [folder / f"{label}-{number}.{format}" for number in range(first, first + count)]


def output_problems(paths: Sequence[Path], *, force: bool) -> Iterator[str]:
    """Why the videos can't be written to `paths`, one line for each problem."""
    for path in paths:
        try:
            check_video_name(path)
        except DataError as error:
            yield f"--out: {error}"
            continue
        if os.path.isdir(path):  # not `Path.is_dir`, which raises for a name that is too long
            yield f"--out: {path} is a folder; give another name"
        elif os.path.lexists(path) and not force:
            yield f"--out: {path} exists already; add --force to replace it, or give another name"
        elif (reason := unwritable_reason(path)) is not None:
            # The same for all of them.
            yield f"--out: {path} can't be written ({reason}); give another place"
            return


def read_prompts(path: Path) -> list[str]:
    """The prompts in a text file, one on each line; empty lines and lines that begin with # are
    skipped. ConfigError if it can't be read or holds none."""
    try:
        lines = decode_text(read_input(path, _MAX_PROMPT_BYTES)).splitlines()
    except OSError as error:
        raise ConfigError(str(path), [f"can't be read: {error.strerror}"]) from None
    except ValueError as error:
        raise ConfigError(str(path), [str(error)]) from None
    prompts = [line.strip() for line in lines]
    prompts = [prompt for prompt in prompts if prompt and not prompt.startswith("#")]
    if not prompts:
        raise ConfigError(str(path), ["holds no prompt; write one on each line"])
    return prompts
