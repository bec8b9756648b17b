"""Changes of scene in video files, remembered from one start to the next.

Finding them decodes the whole file, which a start of a run must not do again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onewan.data.file_memory import FileMemory, FileState
from onewan.media import IMAGE_SUFFIXES, extension
from onewan.media.cuts import Cut, cut_detector, find_cuts


class FoundCuts:
    """The changes of scene of files; those of another detector are not used."""

    def __init__(self, file: Path | None) -> None:
        """`file` is where they are remembered; None for this process alone."""
        self._memory = FileMemory(file)

    def of(self, path: Path) -> Sequence[Cut]:
        """The changes of scene of a file, see `onewan.media.cuts.find_cuts`."""
        if (known := self._valid(path)) is not None:
            return known
        state = FileState.of(
            path
        )  # before reading: a file that is replaced meanwhile is read again
        cuts = find_cuts(path)
        self._memory.set(path, state, [cut_detector(), *cuts])
        # At once, since a search takes long, and may be interrupted at the next file.
        self._memory.save()
        return cuts

    def known(self, path: Path) -> Sequence[Cut]:
        """Those that are remembered; none if the file was not searched."""
        return self._valid(path) or ()

    def knows(self, path: Path) -> bool:
        """Whether the file was searched as it is now. Images count as searched, since still ones
        have no changes of scene."""
        return extension(path) in IMAGE_SUFFIXES or self._valid(path) is not None

    def _valid(self, path: Path) -> tuple[Cut, ...] | None:
        match self._memory.get(path, FileState.of(path)):
            case [detector, *cuts] if detector == cut_detector():
                return tuple(Cut(before, after) for before, after in cuts)
            case _:
                return None
