"""`Finding`, one thing that the user should know, and the removal of names from texts."""

from __future__ import annotations

import getpass
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Severity = Literal["problem", "note"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A problem, after which the exit status is 1, or a note."""

    severity: Severity
    kind: str
    """What it is about, for programs, such as "near black"."""
    text: str
    path: Path | None = None
    """The file that it is about; None if it concerns the machine or the whole data set."""
    other: Path | None = None
    """The file that it is like, of a duplicate."""


def without_names(text: str) -> str:
    """`text` with ``~`` for the home folder, and without the name of the user in other paths, so
    that it can be shown to others."""
    for home in _homes():
        if len(home) > 1:  # "/" in some containers
            text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    # Homes of other users too: an environment may be shared.
    text = re.sub(r"[A-Za-z]:[\\/]Users[\\/][^\\/:*?\"<>|]+(?=[\\/])", "~", text)
    text = re.sub(r"(/home/|/Users/)[^/\s:'\",;)]+", "~", text)
    user = _user()
    if user and user != "root":
        # As a part of a path only: a name may also be a word.
        text = re.sub(rf"(?<=[\\/]){re.escape(user)}(?=[\\/\s:'\",;)]|$)", "USER", text)
    return text


def _homes() -> set[str]:
    try:
        return {str(Path.home()), Path.home().as_posix()}
    except RuntimeError:  # none is known
        return set()


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # no name for this number of a user
        return ""
