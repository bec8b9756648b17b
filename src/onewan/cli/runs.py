"""The command runs: what ran, and where it stands; imports no torch, so that it answers quickly."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from onewan.cli.output import say, write_json
from onewan.errors import OnewanError
from onewan.runs.layout import displayed
from onewan.runs.status import RunStatus, find_runs, read_status
from onewan.runs.status_text import kind_text, losses_text, progress_text, validations_text


def list_runs(folder: Path, *, as_json: bool) -> int:
    """Print the runs in `folder`, the one with the newest event first.

    OnewanError if `folder` does not exist. A run whose files can't be read is listed as such.
    """
    if not folder.is_dir():
        raise OnewanError(f"{folder}: there is no such folder; give one that has runs in it")
    found, unreadable = list[RunStatus](), dict[Path, str]()
    for path in find_runs(folder):
        status = _readable(path)
        if isinstance(status, RunStatus):
            found.append(status)
        else:
            unreadable[path] = status
    never = datetime.min.replace(tzinfo=timezone.utc)
    found.sort(key=lambda run: run.updated or never, reverse=True)
    if as_json:
        runs = [run.as_data() for run in found]
        errors = {str(path): text for path, text in unreadable.items()}
        write_json({"folder": str(folder), "runs": runs, "unreadable": errors})
        return 0
    for run in found:
        for line in _lines(run):
            say(line)
    for path, text in unreadable.items():
        say(f"{displayed(path)}: can't be read ({text})")
    if not found and not unreadable:
        say(f"{folder}: has no runs")
    return 0


def _readable(folder: Path) -> RunStatus | str:
    """The status of the run in `folder`, or why it can't be read."""
    try:
        return read_status(folder)
    except OSError as error:
        return str(error)


def _lines(run: RunStatus) -> Iterator[str]:
    yield f"{displayed(run.folder)}: {run.state}, {progress_text(run)}"
    if run.reason:
        yield f"  {run.reason}"
    yield f"  {kind_text(run)}"
    if losses := losses_text({name: e.loss for name, e in run.experts.items()}):
        yield f"  loss: {losses}"
    validations = {name: expert.validation for name, expert in run.experts.items()}
    if text := validations_text(validations, " against base"):
        yield f"  validation: {text}"
    for problem in run.problems:
        yield f"  problem: {problem}"
