"""`Diagnosis`, all that was found, as lines of text and as plain data.

Needs no package: where one is broken, the diagnosis is that of the environment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from onewan.doctor.environment import Environment, environment_ahead
from onewan.doctor.finding import Finding, without_names

if TYPE_CHECKING:
    from onewan.doctor.examination import Examination

DATA_VERSION = 2
"""Of the document of ``--json``; incremented when a field changes its meaning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What `onewan doctor` has found."""

    environment: Environment
    examination: Examination | None = None
    """None if no run file was given, or if its data could not be examined."""
    other: tuple[Finding, ...] = ()
    """What kept the data from being examined."""

    @property
    def findings(self) -> tuple[Finding, ...]:
        data = () if self.examination is None else self.examination.findings
        return (*self.environment.findings, *self.other, *data)

    @property
    def problems(self) -> list[Finding]:
        """The findings after which the exit status is 1."""
        return [finding for finding in self.findings if finding.severity == "problem"]

    @property
    def summary(self) -> str:
        """The last line: how many problems and notes there are."""
        problems, notes = len(self.problems), len(self.findings) - len(self.problems)
        counts = (
            f"{problems or 'no'} problem{'' if problems == 1 else 's'}",
            f"{notes or 'no'} note{'' if notes == 1 else 's'}",
        )
        return f"{', '.join(counts)}.".capitalize()

    def lines(self) -> Iterator[str]:
        """The diagnosis for a terminal."""
        yield "Environment (can be pasted into a bug report)"
        for line in self.environment.lines():
            yield f"  {line}"
        for finding in (*self.environment.findings, *self.other):
            yield f"  {finding.severity}: {finding.text}"
        if self.examination is not None:
            yield ""
            yield from self.examination.lines()
        yield ""
        yield self.summary

    def as_data(self) -> dict[str, Any]:
        """The diagnosis as plain data, the document of ``--json``."""
        data: dict[str, Any] = {
            "version": DATA_VERSION,
            "ok": not self.problems,
            "environment": self.environment.as_data(),
            "findings": [_finding_data(finding) for finding in self.findings],
        }
        if self.examination is not None:
            data["data"] = self.examination.as_data()
        return data


@lru_cache(maxsize=1)
def environment_report() -> str:
    """The diagnosis of this machine alone. It is kept until ``cache_clear``, since it takes
    seconds: torch is imported in a process of its own."""
    return "\n".join(Diagnosis(environment=environment_ahead()()).lines())


def _finding_data(finding: Finding) -> dict[str, Any]:
    data = {
        "severity": finding.severity,
        "kind": finding.kind,
        "path": None if finding.path is None else without_names(str(finding.path)),
        "text": without_names(finding.text),
    }
    return data if finding.other is None else data | {"other": without_names(str(finding.other))}
