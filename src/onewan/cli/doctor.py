"""The command doctor: the machine, the clips and the captions of a run, before anything is loaded.

What concerns the data is imported when it is needed, so that the machine is looked at where one of
their packages is broken.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onewan.cli.output import complain, say, write_file, write_json
from onewan.cli.progress_lines import ProgressLines
from onewan.doctor.diagnosis import Diagnosis
from onewan.doctor.environment import Environment, environment_ahead
from onewan.doctor.finding import Finding, without_names
from onewan.errors import ConfigError, OnewanError

if TYPE_CHECKING:
    from onewan.config.schema import ResolvedRun
    from onewan.doctor.examination import Examination

_PROGRESS_SECONDS = 2.0
"""Between two lines about how far the examination is."""


def doctor(
    run: Path | None,
    overrides: Sequence[str],
    *,
    as_json: bool,
    html: Path | None,
    fix: bool,
    yes: bool,
) -> int:
    """Print the diagnosis. Returns 0 if it has no problem, else 1."""
    if fix and not yes and not sys.stdin.isatty():
        raise ConfigError("--fix", ["asks before it changes files; add --yes in a script"])
    examination, other = None, list[Finding]()
    environment = environment_ahead()
    try:
        if run is not None:
            config = _load(run, overrides)
            if fix:
                _repair(config, yes=yes)
            examination = _examine(config, environment, previews=html is not None)
    except ImportError as error:
        text = f"the data can't be looked at, since a package is missing or broken: {error}"
        other.append(_problem("package", text))
    except OnewanError as error:
        # The message of a wrong run file is only the number of its problems.
        lines = [*error.details] if isinstance(error, ConfigError) else []
        lines = lines or [error.message, *error.details]
        other += [_problem("run file", line) for line in lines]
    diagnosis = Diagnosis(environment=environment(), examination=examination, other=tuple(other))
    if html is not None and examination is not None:
        from onewan.doctor.page import html_page

        write_file(html, html_page(diagnosis, f"{run}: what will be trained"))
    if as_json:
        write_json(diagnosis.as_data())
    else:
        for line in diagnosis.lines():
            say(line)
        if html is not None and examination is not None:
            say(f"{html}: written; open it in a browser to see the clips as they are trained")
    return 1 if diagnosis.problems else 0


def _problem(kind: str, text: str) -> Finding:
    return Finding(severity="problem", kind=kind, text=without_names(text))


def _load(run: Path, overrides: Sequence[str]) -> ResolvedRun:
    from onewan.cli.importing import run_file_of
    from onewan.config.load import load_run

    return load_run(run_file_of(run), overrides)


def _examine(
    config: ResolvedRun, environment: Callable[[], Environment], *, previews: bool
) -> Examination:
    from onewan.doctor.examination import examine

    said = _progress()
    return examine(
        config,
        environment,
        previews=previews,
        advance=lambda done, total: said("looking at clips", done, total),
        progress=said,
    )


def _progress() -> Callable[[str, int, int], None]:
    """Says on stderr now and then how much is done; nothing if that takes a moment only."""
    last = time.monotonic()
    for_program = ProgressLines()

    def advance(activity: str, done: int, total: int) -> None:
        nonlocal last
        if for_program.wanted:
            for_program.write(activity, done, total, unit="item")
        elif time.monotonic() - last >= _PROGRESS_SECONDS:
            last = time.monotonic()
            complain(f"{activity}: {done} of {total}")

    return advance


def _repair(config: ResolvedRun, *, yes: bool) -> None:
    """Offer the repairs that are possible, and make those that the user wants."""
    from onewan.doctor.repair import possible_repairs

    repairs = possible_repairs(config)
    if not repairs:
        complain("nothing to repair: all captions are UTF-8, or can't be made so")
        return
    for repair in repairs:
        complain(f"{repair.path}: is {repair.encoding}, not UTF-8; its text would be:")
        complain(f"  {repair.excerpt}")
    if not yes and not _agrees(len(repairs)):
        complain("nothing was changed")
        return
    for repair in repairs:
        backup = repair.apply()
        complain(f"{repair.path}: is UTF-8 now; {backup.name} is the file as it was")


def _agrees(number: int) -> bool:
    """Whether the user wants the repairs."""
    files = "this file" if number == 1 else f"these {number} files"
    complain(f"Write {files} as UTF-8, with a backup of each? [y/N]")
    return sys.stdin.readline().strip().lower() in ("y", "yes")
