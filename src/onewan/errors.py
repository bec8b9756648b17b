"""Errors that the user can fix, one class per kind; and text of others made safe for a line.

Each message follows one pattern: ``<field or file>: <what is wrong, with the value>; <remedy>``.
The command line prints it as it is, without a traceback, and exits with status 1; anything that is
neither an `OnewanError` nor an error of the system is a defect of onewan and keeps its traceback.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

_E = TypeVar("_E", bound="OnewanError")

_NOT_PRINTED = re.compile(
    # Control characters, surrogates, and those that reorder or hide text: in a name, they would let
    # a file write lines, colors or other names onto the terminal and into a log.
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def one_line(text: str) -> str:
    """`text` with control characters, line breaks, surrogates (from names that are not UTF-8) and
    characters that reorder text written as escapes such as ``\\n``."""
    return _NOT_PRINTED.sub(lambda m: m[0].encode("unicode_escape").decode("ascii"), text)


class OnewanError(Exception):
    """Base class of all errors that the user, not the programmer, can fix.

    `message` is one line; `details` are lines below it, such as one for each of several problems.
    """

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        self.message = one_line(message)
        self.details = tuple(map(one_line, details))
        super().__init__("\n".join([self.message, *(f"  {line}" for line in self.details)]))


def combined(kind: type[_E], problems: Iterable[str]) -> _E:
    """One error of `kind`, which takes a message and details, with a line for each of `problems`,
    of which there is one at least."""
    lines = list(dict.fromkeys(problems))
    return kind(lines[0]) if len(lines) == 1 else kind(f"{len(lines)} problems", lines)


class ConfigError(OnewanError):
    """The run file or an override is wrong. Has every problem found, not only the first."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = source
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        super().__init__(f"{source}: {count}", problems)
        self.problems = self.details

    def by_field(self, names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
        """The problems of the fields `names` and of what is in them, and the other problems."""
        known, found, others = tuple(names), dict[str, str](), list[str]()
        for line in self.problems:
            name, _, reason = line.partition(": ")
            field = next((each for each in known if f"{name}.".startswith(f"{each}.")), None)
            if field is None:
                others.append(line)
            else:
                found[field] = reason
        return found, others


class DataError(OnewanError):
    """A media file, a caption or a whole data set can't be used."""


class CheckpointError(OnewanError):
    """A model, an adapter or a training state can't be read, or does not match the request."""


class MemoryPlanError(OnewanError):
    """The run needs more memory than there is."""


class TrainingError(OnewanError):
    """Training can't continue, for example because the loss is no longer finite."""


class RankError(OnewanError):
    """Another process of the run has failed, was killed or does not answer."""


class Interrupted(Exception):  # noqa: N818  (not an error: the user asked the run to stop)
    """The user asked the run to stop; whatever had to be saved has been saved."""
