"""The commands report and compare: pages about runs; they import no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onewan.cli.output import say
from onewan.report.comparison import write_comparison
from onewan.report.page import write_report
from onewan.report.videos import VideoChoice
from onewan.runs.layout import displayed


def report(run: Path, out: Path | None, choice: VideoChoice) -> int:
    path = write_report(run, out, choice)
    say(f"{displayed(path)}: written; open it in a browser")
    return 0


def compare(runs: Sequence[Path], out: Path, choice: VideoChoice) -> int:
    path = write_comparison(runs, out, choice)
    say(f"{displayed(path)}: written; open it in a browser")
    return 0
