"""`SourceContents`: the clips of one source before they are probed, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass, field

from onewan.data.report import ClipProblem, ClipWarning
from onewan.data.sources.item import SourceItem


@dataclass(slots=True)
class SourceContents:
    """What a source contains; the modules of the kinds fill it."""

    items: list[SourceItem] = field(default_factory=list[SourceItem])
    problems: list[ClipProblem] = field(default_factory=list[ClipProblem])
    warnings: list[ClipWarning] = field(default_factory=list[ClipWarning])

    def add(self, other: SourceContents) -> None:
        """Append what another part of the source contains."""
        self.items += other.items
        self.problems += other.problems
        self.warnings += other.warnings

    def note(self, text: str) -> None:
        """Add a warning about the source as a whole."""
        self.warnings.append(ClipWarning(path=None, text=text))
