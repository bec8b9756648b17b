"""The run file of an earlier run, to start another one from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onewan.config.edits import RunText
from onewan.config.load import changed_fields, dump_run, load_run, run_of_text
from onewan.config.schema import ResolvedRun
from onewan.documents import decode_text, key_path
from onewan.errors import ConfigError, OnewanError
from onewan.files import read_input
from onewan.runs.layout import RunLayout

_MOST_BYTES = 256 * 1024


def run_file_of(folder: Path) -> str:
    """The text of a run file with the settings of the run in `folder`, without its name.

    It is the run's own file, with its comments, in which relative paths and what differed when the
    run was started are replaced; or, where that can't be read any more, all settings. OnewanError
    if the folder has no run.
    """
    layout = RunLayout(folder)
    settled = load_run(folder)
    try:
        text = RunText(decode_text(read_input(layout.run_file, _MOST_BYTES)))
        _settle(text, layout.run_file, settled)
        if changed_fields(run_of_text(text.text, layout.run_file), settled):
            raise ConfigError(str(layout.run_file), ["says something else than its run had"])
    except (OSError, ValueError, OnewanError):
        text = RunText(dump_run(settled))
    text.remove(("output", "name"))
    return text.text


def with_absolute_paths(text: str, file: Path) -> str:
    """The text of the run file `file` with all paths absolute, so that it means the same anywhere.

    ConfigError if something is wrong with it.
    """
    run = RunText(text)
    _settle(run, file.parent / "elsewhere" / file.name, run_of_text(text, file))
    return run.text


def _settle(text: RunText, file: Path, settled: ResolvedRun) -> None:
    """Set what `text` says otherwise, as the run file `file`, than `settled`."""
    for name, _, value in changed_fields(run_of_text(text.text, file), settled):
        path = key_path(name)
        if value is None:
            text.remove(path)
        else:
            text.set(path, _plain(value))


def _plain(value: object) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
