"""The command `onewan onetrainer`."""

from __future__ import annotations

from pathlib import Path

from onewan.cli.output import say
from onewan.errors import ConfigError
from onewan.onetrainer.contract import contract
from onewan.onetrainer.environment import environment
from onewan.onetrainer.install import MANIFEST, InstallOutcome, Status, install, status, uninstall


def run(action: str, path: Path, *, force: bool) -> int:
    return {"check": _check, "install": _install, "status": _status, "uninstall": _uninstall}[
        action
    ](path, force)


def _check(path: Path, force: bool) -> int:
    del force
    return 0 if _print_check(path, status(path)) else 1


def _print_check(path: Path, found: Status) -> bool:
    """Whether the checkout has what the add-on needs, and no Wan 2.2 of its own."""
    known, checked = contract(), found.checked
    assert checked is not None
    say(f"{path}: looked for {checked.names} names in {checked.files} files of OneTrainer")
    if checked.unseen:
        say(
            f"not looked at: {', '.join(checked.unseen)}, since there is no environment with them "
            "in the checkout (venv)"
        )
    for name in found.taken:
        say(f"  {name}: is a file of OneTrainer's or of yours at a path of the add-on's")
    if checked.problems:
        say(
            f"not supported, since {len(checked.problems)} of them differ from what the add-on "
            "needs:"
        )
        for problem in checked.problems:
            say(f"  {problem}")
    if checked.problems or found.taken:
        say(
            f"supported are commit {known['commit'][:8]} ({known['date']}) and later ones with the "
            "same names; go back to that commit, or update onewan"
        )
        return False
    say(f"all of them exist; made for commit {known['commit'][:8]} ({known['date']})")
    return True


def _print_environment(path: Path) -> bool:
    """Whether the add-on can be loaded in the checkout's own environment, if it has one."""
    found = environment(path)
    if found is None:
        say(
            f"environment: none in {path} (venv); the one that OneTrainer is started with needs "
            "onewan"
        )
        return True
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    say(f"environment: {found.python} with {versions or 'none of the packages'}")
    for failure in found.failures:
        say(f"  Wan 2.2 is not available there: {failure}")
    return not found.failures


def _install(path: Path, force: bool) -> int:
    outcome = install(path, force=force)
    _print_outcome(outcome)
    say(f"installed: {path / MANIFEST} lists the files. OneTrainer now has the model type Wan 2.2")
    _print_environment(path)
    return 0


def _uninstall(path: Path, force: bool) -> int:
    outcome = uninstall(path, force=force)
    _print_outcome(outcome)
    return 1 if outcome.kept else 0


def _print_outcome(outcome: InstallOutcome) -> None:
    for what, names in (("wrote", outcome.written), ("removed", outcome.removed)):
        if names:
            say(f"{what} {len(names)} files")
    for name in outcome.taken:
        say(f"kept, because it is OneTrainer's own file by now: {name}")
    for name in outcome.kept:
        say(f"kept, because it was changed: {name} (--force removes or overwrites it)")
    if not (outcome.written or outcome.removed or outcome.kept or outcome.taken):
        say("nothing to do: all files are up to date")


def _status(path: Path, force: bool) -> int:
    del force
    found = status(path)
    if not found.installed:
        say(f"{path}: the add-on is not installed")
        _print_check(path, found)
        return 1
    say(f"{path}: add-on of onewan {found.version}{'' if found.complete else ', not complete'}")
    for what, names in (("changed", found.changed), ("missing", found.missing)):
        for name in names:
            say(f"  {what}: {name}")
    if not found.current:
        say("  the files of another version of onewan; `onewan onetrainer install` updates them")
    complete = found.complete and found.current and not (found.changed or found.missing)
    compatible, available = _print_check(path, found), _print_environment(path)
    return 0 if complete and compatible and available else 1


def export(backup: Path, destination: Path | None, to: str | None, *, force: bool) -> int:
    from onewan.onetrainer.backups import export_backup

    if destination is None:
        raise ConfigError(
            "onetrainer export", ["OUT: is missing; give the path of the file to write"]
        )
    for path in export_backup(backup, destination, to, force=force, report=say):
        say(str(path))
    return 0
