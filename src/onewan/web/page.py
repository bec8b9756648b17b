"""`Page`: what the screens work with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from onewan.serving.commands import Commands
from onewan.serving.roots import Roots
from onewan.web.queue import JobLoop


@dataclass(frozen=True, kw_only=True)
class Page:
    """What the screens work with."""

    roots: Roots
    commands: Commands

    @property
    def runs(self) -> Path:
        """The folder of runs."""
        return self.roots.runs

    @cached_property
    def jobs(self) -> JobLoop:
        """All runs, their queue and the machine."""
        return JobLoop(self.runs)
