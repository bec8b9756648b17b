"""How far a command is, for the program that started it: JSON lines on stderr.

Commands that take long write them where the environment has ``ONEWAN_PROGRESS=json``, in the place
of a bar or of lines for people. An option would have to be on every command, and would be a part of
the command line that a page shows to be copied.
"""

from __future__ import annotations

import json
import os
import time

from onewan.cli.output import complain

_VARIABLE = "ONEWAN_PROGRESS"
_SECONDS = 0.2
"""Between two lines of an activity."""


class ProgressLines:
    """Writes the lines."""

    def __init__(self) -> None:
        self.wanted = os.environ.get(_VARIABLE) == "json"
        """Whether a program asks for them."""
        self._activity = ""
        self._last = 0.0

    def write(self, activity: str, done: int, total: int, *, unit: str, note: str = "") -> None:
        """Write that `done` of `total` units are done, unless the last line is too new; the end of
        an activity is always written."""
        now = time.monotonic()
        if activity == self._activity and done < total and now - self._last < _SECONDS:
            return
        self._activity, self._last = activity, now
        fields = {"activity": activity, "done": done, "total": total, "unit": unit, "note": note}
        complain(json.dumps({"progress": fields}, ensure_ascii=False))
