"""`Page`: what the screens work with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onewan.web.commands import Commands
from onewan.web.roots import Roots


@dataclass(frozen=True, kw_only=True)
class Page:
    """What the screens work with."""

    roots: Roots
    commands: Commands

    @property
    def runs(self) -> Path:
        """The folder of runs."""
        return self.roots.runs
