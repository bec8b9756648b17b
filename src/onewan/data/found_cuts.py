"""Changes of scene in video files, remembered from one start to the next.

Finding them decodes the whole file, which a start of a run must not do again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from random import SystemRandom

from onewan.data.ahead import results_ahead, usable_cores
from onewan.data.file_memory import FileMemory, FileState
from onewan.errors import DataError
from onewan.media import IMAGE_SUFFIXES, extension
from onewan.media.cuts import Cut, cut_detector, find_cuts

_WORKERS = 4
"""Files that are searched at a time, on as many cores: comparing the frames of one takes one core,
while its decoder uses others."""


class FoundCuts:
    """The changes of scene of files; those of another detector are not used."""

    def __init__(self, file: Path | None = None, *, search: bool = True) -> None:
        """`file` is where they are remembered; None for this process alone. Without `search`, a
        file that was not searched has none."""
        self._memory = FileMemory(file)
        self._search = search
        # Of files that can't be searched to their end.
        self._errors = dict[tuple[Path, FileState], DataError]()

    def of(self, path: Path) -> Sequence[Cut]:
        """The changes of scene of a file, see `onewan.media.cuts.find_cuts`."""
        known = self._valid(path)
        if known is None and self._search:
            self.prepare([path])
            if error := self._errors.get((path, FileState.of(path))):
                raise DataError(error.message, error.details) from error
            known = self._valid(path)
        return known or ()

    def prepare(
        self, paths: Iterable[Path], progress: Callable[[int, int], None] = lambda *_: None
    ) -> None:
        """Search those of the files that were not, several at a time; `progress` is called with
        the number of those that are done, and that of all. What is wrong with one is raised by
        `of`. Several processes that do this at the same time share the work."""
        new = [path for path in dict.fromkeys(paths) if self._is_new(path)]
        # In an order that differs between processes, each of which looks before it searches a file
        # whether another one has searched it: only those that are searched at that moment are
        # searched twice.
        SystemRandom().shuffle(new)
        workers = min(_WORKERS, usable_cores()) if len(new) > 1 else 0
        with closing(results_ahead(self._searched, new, workers=workers)) as results:
            for done, (path, result) in enumerate(results, start=1):
                state, found = result()
                if isinstance(found, DataError):
                    self._errors[path, state] = found
                elif found is not None:
                    self._memory.set(path, state, [cut_detector(), *found])
                    # At once, since a search takes long, and may be interrupted at the next file.
                    self._memory.save()
                progress(done, len(new))

    def knows(self, path: Path) -> bool:
        """Whether the file was searched as it is now. Images count as searched, since still ones
        have no changes of scene."""
        return extension(path) in IMAGE_SUFFIXES or self._valid(path) is not None

    def _is_new(self, path: Path) -> bool:
        is_searched = self._valid(path) is not None or (path, FileState.of(path)) in self._errors
        return self._search and not is_searched

    def _valid(self, path: Path) -> tuple[Cut, ...] | None:
        match self._memory.get(path, FileState.of(path)):
            case [detector, *cuts] if detector == cut_detector():
                return tuple(Cut(before, after) for before, after in cuts)
            case _:
                return None

    def _searched(self, path: Path) -> tuple[FileState, tuple[Cut, ...] | DataError | None]:
        """What is found in a file, None if another process has searched it; its state before that,
        so that one that is replaced meanwhile is searched again."""
        state = FileState.of(path)
        self._memory.refresh()
        if self._valid(path) is not None:
            return state, None
        try:
            return state, find_cuts(path)
        except DataError as error:
            return state, error
