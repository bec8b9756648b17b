"""Errors that the user can fix, one class per kind.

Each message follows one pattern: ``<field or file>: <what is wrong, with the value>; <remedy>``.
The command line prints it as it is, without a traceback, and exits with status 1; anything that is
not an `OnewanError` is a defect of onewan and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class OnewanError(Exception):
    """Base class of all errors that the user, not the programmer, can fix."""


class ConfigError(OnewanError):
    """The run file or an override is wrong. Has every problem found, not only the first."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = source
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {p}" for p in self.problems)]))


class DataError(OnewanError):
    """A media file, a caption or a whole data set can't be used."""


class CheckpointError(OnewanError):
    """A model, an adapter or a training state can't be read, or does not match the request."""


class TrainingError(OnewanError):
    """Training can't continue, for example because the loss is no longer finite."""


class Interrupted(Exception):  # noqa: N818  (not an error: the user asked the run to stop)
    """The user asked the run to stop; whatever had to be saved has been saved."""
