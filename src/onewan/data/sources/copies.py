"""`Copies`: where files from archives and from other machines are kept, below the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from onewan.data.sources.remote import Progress, RemoteFiles, no_progress
from onewan.files import TEMPORARY_PREFIX


@dataclass
class Copies:
    """The copies in a cache folder: ``remote`` has files of other machines, ``shards`` the members
    of archives."""

    folder: Path
    make: bool = True
    """Whether archives are unpacked, and remote files fetched, that have not been before; otherwise
    they are left out."""
    progress: Progress = no_progress
    """Told of what takes long before the clips are known: fetching files, searching them for
    changes of scene."""
    verify: bool = False
    """Ask whether a remote file has changed, also where only a table names it."""

    used_shards: set[Path] = field(default_factory=set[Path])
    """The folders of unpacked archives that were read."""

    @property
    def used(self) -> frozenset[Path]:
        """Copies that were asked for, and folders of unpacked archives that were read."""
        return frozenset(self.used_shards | self.remote.used)

    def unpacked(self) -> Iterator[Path]:
        """The folders of all archives that are unpacked."""
        if self.shards.is_dir():
            for path in sorted(self.shards.iterdir()):
                if path.is_dir() and not path.name.startswith(TEMPORARY_PREFIX):
                    yield path

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @cached_property
    def remote(self) -> RemoteFiles:
        return RemoteFiles(self.folder / "remote", self.progress, self.verify, make=self.make)
