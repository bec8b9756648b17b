"""`Drafts`: run files that are being written on the page, kept on disk until they are started.

A draft is a file, so that neither a reload of the page nor a restart of its server loses it. It has
its id as its name; relative paths in it are those of the page's folder.
"""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from onewan.config.edits import RunText
from onewan.documents import LIMITS
from onewan.errors import OnewanError
from onewan.files import read_input, replacing

_ID = re.compile("[0-9a-f]{16}")
_MOST = 200


@dataclass(frozen=True, slots=True)
class Draft:
    """A run file that is being written."""

    id: str
    changed: float
    """Seconds since the last change."""
    text: str
    name: str
    """That of its run; empty if it has none yet."""


class Drafts:
    """The drafts of the page, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, text: str) -> str:
        """Keep a new draft; returns its id. OnewanError if there are too many."""
        if len(list(self._folder.glob("*.yaml"))) >= _MOST:
            raise OnewanError(
                f"{self._folder}: has {_MOST} drafts; start or delete some, which are listed at "
                "New run"
            )
        draft = secrets.token_hex(8)
        self.write(draft, text)
        return draft

    def read(self, draft: str) -> str | None:
        """The text of a draft; None if there is none with this id."""
        if not _ID.fullmatch(draft):
            return None
        try:
            return read_input(self._file(draft), 4 * LIMITS.bytes).decode("utf-8")
        except (OSError, ValueError):
            return None

    def write(self, draft: str, text: str) -> None:
        """Replace the text of a draft."""
        with replacing(self._file(draft)) as temporary:
            temporary.write_bytes(text.encode("utf-8", "replace"))

    def replace(self, draft: str, old: str, new: str) -> bool:
        """Replace the text `old` of a draft, unless it was changed or deleted elsewhere since;
        returns whether the draft has the text `new` now."""
        present = self.read(draft)
        if present == old != new:
            self.write(draft, new)
        return present in (old, new)

    def delete(self, draft: str) -> None:
        """Delete a draft, if it is still there."""
        if _ID.fullmatch(draft):
            self._file(draft).unlink(missing_ok=True)

    def all(self) -> list[Draft]:
        """All drafts, the one that was changed last first."""
        found: list[Draft] = []
        for file in self._folder.glob("*.yaml"):
            text = self.read(file.stem)
            if text is not None:
                changed = max(0.0, time.time() - file.stat().st_mtime)
                name = str(RunText(text).value(("output", "name")) or "")
                found.append(Draft(file.stem, changed, text, name))
        return sorted(found, key=lambda draft: draft.changed)

    def _file(self, draft: str) -> Path:
        return self._folder / f"{draft}.yaml"
