"""`Roots`: the folders that the page may read and write, and nothing outside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from onewan.errors import OnewanError
from onewan.runs.status import is_run

RUNS = "runs"
"""Name of the root that has the runs."""


class OutsideError(OnewanError):
    """A path is outside the folders that the page was started for."""


class Roots:
    """The folder of runs, and the folders of data and models that ``--data`` names."""

    def __init__(self, runs: Path, data: Sequence[Path]) -> None:
        self.runs = runs.resolve()
        folders = dict.fromkeys(folder.resolve() for folder in data)
        self.data = tuple(folders)
        self.by_name = {RUNS: self.runs} | {
            f"data{number}": folder for number, folder in enumerate(self.data, 1)
        }
        """Folders by the names that addresses of files have."""

    def inside(self, path: str | Path) -> Path:
        """`path` with symbolic links resolved; relative ones start at the current folder.

        OutsideError if it is in none of the folders. It need not exist.
        """
        try:
            found = Path(path).expanduser().resolve()
        except (OSError, ValueError, RuntimeError):
            raise OutsideError(f"{path}: is no path of this system; correct it") from None
        if any(found.is_relative_to(folder) for folder in self.by_name.values()):
            return found
        raise OutsideError(
            f"{path}: is outside the folders that this page may use "
            f"({', '.join(map(str, self.by_name.values()))}); start it with: "
            f"onewan serve --data {found if found.is_dir() else found.parent}"
        )

    def at(self, root: str, path: str) -> Path:
        """The existing file or folder `path` of the root called `root`, as in an address.

        OutsideError if there is none, also for hidden files and for what a symbolic link or ``..``
        leads out of all roots to: an address tells nothing about other folders.
        """
        folder = self.by_name.get(root)
        unknown = OutsideError(f"{root}/{path}: there is no such file on this page")
        if folder is None or Path(path).is_absolute():
            raise unknown
        try:
            found = self.inside(folder / path)
            exists = found.exists()
        except OSError:
            raise unknown from None
        if not exists or any(part.startswith(".") for part in self._below(found)):
            raise unknown
        return found

    def run(self, name: str) -> Path:
        """The folder of the run called `name`. OutsideError if there is none."""
        if name in ("", ".", "..") or "/" in name or "\\" in name:
            raise OutsideError(f"{name}: there is no such run")
        try:
            folder = self.at(RUNS, name)
        except OutsideError:
            raise OutsideError(f"{name}: there is no such run in {self.runs}") from None
        if not is_run(folder):
            raise OutsideError(f"{name}: there is no such run in {self.runs}")
        return folder

    def address(self, path: Path, kind: str = "media") -> str:
        """The address of a file in one of the roots: of itself (``media``), or of a picture of it
        (``poster``). OutsideError if it is in none."""
        for name, folder in self.by_name.items():
            if path.is_relative_to(folder):
                return f"/{kind}/{name}/{quote(path.relative_to(folder).as_posix())}"
        raise OutsideError(f"{path}: is outside the folders that this page may use")

    def _below(self, path: Path) -> tuple[str, ...]:
        """The parts of `path` below the root that it is in."""
        return next(
            path.relative_to(folder).parts
            for folder in self.by_name.values()
            if path.is_relative_to(folder)
        )
