"""The command runs: what ran, and where it stands; imports no torch, so that it answers quickly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.arithmetic.durations import format_duration
from onewan.cli.output import say, write_json
from onewan.errors import OnewanError
from onewan.runs.layout import displayed
from onewan.runs.status import RunStatus, ValidationStatus, find_runs, read_status


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
    steps = f"step {run.step:,}" + ("" if run.steps is None else f" of {run.steps:,}")
    own = [
        f"{name} {e.step:,} of {e.steps:,}" for name, e in run.experts.items() if e.step is not None
    ]
    if len(own) > 1:
        steps += f" ({', '.join(own)})"
    left = "" if run.seconds_left is None else f", about {format_duration(run.seconds_left)} left"
    yield f"{displayed(run.folder)}: {run.state}, {steps}{left}"
    if run.reason:
        yield f"  {run.reason}"
    parts = [", ".join(text for text in (run.variant, run.method) if text)]
    if run.started is not None:
        local = run.started.astimezone()
        parts.append(f"started {local:%Y-%m-%d %H:%M}, ran for {format_duration(run.seconds)}")
    parts.append(format_bytes(run.bytes))
    yield f"  {'; '.join(filter(None, parts))}"
    if losses := losses_text({name: e.loss for name, e in run.experts.items()}):
        yield f"  loss: {losses}"
    validations = {name: expert.validation for name, expert in run.experts.items()}
    if text := validations_text(validations, " against base"):
        yield f"  validation: {text}"
    for problem in run.problems:
        yield f"  problem: {problem}"


def losses_text(losses: Mapping[str, float | None]) -> str:
    """The loss of each expert that has one."""
    return ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None)


def validations_text(
    validations: Mapping[str, ValidationStatus | None], against: str = " against the base model"
) -> str:
    """The newest validation of each expert, with its change `against` the base model."""
    return ", ".join(
        f"{name} {_validation(validation, against)}"
        for name, validation in validations.items()
        if validation is not None
    )


def _validation(validation: ValidationStatus, against: str) -> str:
    if validation.loss is None:
        return "not finite"
    change = ""
    if validation.base and validation.step:
        change = f", {100 * (validation.loss / validation.base - 1):+.1f} %{against}"
    return f"{validation.loss:.4f} (step {validation.step:,}{change})"
