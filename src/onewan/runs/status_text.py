"""What a run's status says, as the terminal and the page write it."""

from __future__ import annotations

from collections.abc import Mapping

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.arithmetic.durations import format_duration
from onewan.runs.status import RunStatus, ValidationStatus


def steps_text(run: RunStatus) -> str:
    """How far the run is, and each of its experts if it has several."""
    steps = f"step {run.step:,}" + ("" if run.steps is None else f" of {run.steps:,}")
    own = [
        f"{name} {e.step:,} of {e.steps:,}" for name, e in run.experts.items() if e.step is not None
    ]
    return f"{steps} ({', '.join(own)})" if len(own) > 1 else steps


def progress_text(run: RunStatus) -> str:
    """How far the run is, and how long it still takes."""
    left = run.seconds_left
    return steps_text(run) + ("" if left is None else f", about {format_duration(left)} left")


def kind_text(run: RunStatus) -> str:
    """What is trained, since when and for how long, and the size of the folder."""
    parts = [", ".join(text for text in (run.variant, run.method) if text)]
    if run.started is not None:
        local = run.started.astimezone()
        parts.append(f"started {local:%Y-%m-%d %H:%M}, ran for {format_duration(run.seconds)}")
    parts.append(format_bytes(run.bytes))
    return "; ".join(filter(None, parts))


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
