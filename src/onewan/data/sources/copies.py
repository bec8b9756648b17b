"""`Copies`: where files from archives and from other machines are kept, below the cache."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from onewan.data.sources.remote import Progress, RemoteFiles


@dataclass
class Copies:
    """The copies in a cache folder: ``remote`` has files of other machines, ``shards`` the members
    of archives."""

    folder: Path
    make: bool = True
    """Whether archives are unpacked that have not been before; otherwise they are left out."""
    progress: Progress = lambda *_: None
    verify: bool = False
    """Ask whether a remote file has changed, also where only a table names it."""

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @cached_property
    def remote(self) -> RemoteFiles:
        return RemoteFiles(self.folder / "remote", self.progress, self.verify)
