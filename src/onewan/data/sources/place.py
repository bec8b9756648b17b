"""`Place`: the files of a source, wherever they are; `LocalPlace` for those on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Protocol

from onewan.data.report import ClipProblem, ClipWarning
from onewan.files import IS_WINDOWS, windows_reserves
from onewan.runs.layout import displayed

BY_NAME = attrgetter("parts")
"""Sorts paths alike on all systems; comparing the paths themselves ignores case on Windows."""


@dataclass(slots=True)
class Listing:
    """The files of a folder, sorted by name, without hidden files and folders."""

    folder: Path
    paths: list[Path] = field(default_factory=list[Path])
    """Below `folder`."""
    problems: list[ClipProblem] = field(default_factory=list[ClipProblem])
    warnings: list[ClipWarning] = field(default_factory=list[ClipWarning])
    """Of folders that are left out."""


class Place(Protocol):
    """A file or folder of a source, and the files that it names."""

    @property
    def label(self) -> str:
        """Its name in messages."""
        ...

    def listing(self, *, recursive: bool = True) -> Listing:
        """The files of the folder, which need not be on this machine before `fetch`."""
        ...

    def files(self) -> list[Path]:
        """The file itself, or those that its pattern stands for, on this machine."""
        ...

    def named(self, reference: str, beside: Path) -> Path:
        """Where the file is that the file `beside` names as `reference`; see `fetch`.

        ValueError with the reason if it may not name that.
        """
        ...

    def fetch(self, paths: Iterable[Path]) -> Mapping[Path, str]:
        """Bring the files to this machine; what is wrong with those that can't be brought."""
        ...


@dataclass(frozen=True, slots=True)
class LocalPlace:
    """A file or folder on this machine."""

    path: Path

    @property
    def label(self) -> str:
        return str(displayed(self.path))

    def listing(self, *, recursive: bool = True) -> Listing:
        return _walk(self.path, recursive=recursive)

    def files(self) -> list[Path]:
        return [self.path]

    def named(self, reference: str, beside: Path) -> Path:
        if "\0" in reference:
            raise ValueError("has the character NUL in it")
        path = beside.parent / reference
        if "\\" in reference and not IS_WINDOWS and not os.path.lexists(path):
            path = beside.parent / reference.replace("\\", "/")  # written on Windows
        return Path(os.path.normpath(path))

    def fetch(self, paths: Iterable[Path]) -> Mapping[Path, str]:
        del paths
        return {}


def inner_path(reference: str) -> PurePosixPath:
    """`reference` as a path within the place that names it, with forward slashes.

    ValueError if it leads out of it, or is no name for a file on every system: what comes from
    elsewhere must not choose where on this machine it is written.
    """
    text = reference.replace("\\", "/")
    path = PurePosixPath(text)
    if path.is_absolute() or PureWindowsPath(reference).drive or ".." in path.parts:
        raise ValueError("leads out of its folder")
    not_in_names = '<>:"|?*' if IS_WINDOWS else ""
    is_no_name = not path.parts or any(ord(c) < 32 or c in not_in_names for c in text)
    if is_no_name or (IS_WINDOWS and any(map(windows_reserves, path.parts))):
        raise ValueError("is no name that a file can have here")
    return path


def clip_name(path: Path, folder: Path) -> str:
    """The name of the clip of a file that a table in `folder` names: the same wherever the folder
    lies."""
    if path.is_relative_to(folder):
        return path.relative_to(folder).as_posix()
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # on Windows there is no relative path to another drive
        return path.name


def _walk(folder: Path, *, recursive: bool) -> Listing:
    """Each real folder is read once, so that folders which link one another come to an end and no
    clip counts twice. Links are followed last, since a clip is named by its real folder."""
    listing = Listing(folder)
    folders, links = [folder], list[Path]()
    visited = set[object]()
    while folders or links:
        if not folders:
            # By name, since each file system has another order, and clips must not.
            links.sort(key=BY_NAME, reverse=True)
            folders.append(links.pop())
        here = folders.pop()
        try:
            # With "/.", this is an error if the folder may be listed, but not entered.
            stat = os.stat(os.path.join(here, os.curdir))
            # Some file systems on Windows have no numbers of files.
            real = (stat.st_dev, stat.st_ino) if stat.st_ino else here.resolve()
            if real in visited:
                text = "leads to a folder that is read already, so it is left out"
                listing.warnings.append(ClipWarning(path=here, text=text))
                continue
            visited.add(real)
            for entry in here.iterdir():
                if entry.name.startswith("."):  # also the temporary files of `onewan.files`
                    continue
                if not _is_folder(entry):
                    listing.paths.append(entry)
                elif recursive:
                    (links if entry.is_symlink() else folders).append(entry)
        except OSError as error:
            reason = f"this folder can't be read ({error.strerror}); check its permissions"
            listing.problems.append(ClipProblem(path=here, reason=reason))
    listing.problems.sort(key=lambda problem: problem.path)
    listing.paths.sort(key=BY_NAME)
    return listing


def _is_folder(path: Path) -> bool:
    """Whether `path` is a folder or a link to one; false if the link's target can't be reached."""
    try:
        return path.is_dir()
    except OSError:
        return False


def first_few(names: Sequence[str], most: int = 3) -> str:
    """The first few of `names`, and the number of the others."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} others" if more > 0 else "")
