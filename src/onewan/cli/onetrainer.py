"""The command `onewan onetrainer`."""

from __future__ import annotations

from pathlib import Path

from onewan.errors import ConfigError
from onewan.onetrainer.contract import CheckResult, contract
from onewan.onetrainer.install import (
    MANIFEST,
    InstallOutcome,
    has_onewan,
    install,
    python_in,
    status,
    uninstall,
)


def run(action: str, path: Path, *, force: bool) -> int:
    return {"check": _check, "install": _install, "status": _status, "uninstall": _uninstall}[
        action
    ](path, force)


def _check(path: Path, force: bool) -> int:
    del force
    found = status(path).checked
    assert found is not None
    _print_check(path, found)
    return 1 if found.problems else 0


def _print_check(path: Path, found: CheckResult) -> None:
    known = contract()
    print(f"{path}: looked for {found.names} names in {found.files} files of OneTrainer")
    if found.problems:
        print(
            f"not supported, since {len(found.problems)} of them differ from what the add-on needs:"
        )
        for problem in found.problems:
            print(f"  {problem}")
        print(
            f"supported are commit {known['commit'][:8]} ({known['date']}) and later ones with the "
            "same names; go back to that commit, or update onewan"
        )
    else:
        print(f"all of them exist; made for commit {known['commit'][:8]} ({known['date']})")


def _install(path: Path, force: bool) -> int:
    outcome = install(path, force=force)
    _print_outcome(outcome)
    print(
        f"installed: {path / MANIFEST} lists the files. OneTrainer now has the model type Wan 2.2"
    )
    if has_onewan(path) is False:
        print(
            "Wan 2.2 is not available yet, because OneTrainer's environment has no onewan: "
            f"{python_in(path)} -m pip install onewan"
        )
    return 0


def _uninstall(path: Path, force: bool) -> int:
    outcome = uninstall(path, force=force)
    _print_outcome(outcome)
    return 1 if outcome.kept else 0


def _print_outcome(outcome: InstallOutcome) -> None:
    for what, names in (("wrote", outcome.written), ("removed", outcome.removed)):
        if names:
            print(f"{what} {len(names)} files")
    for name in outcome.kept:
        print(f"kept, because it was changed: {name} (--force removes or overwrites it)")
    if not (outcome.written or outcome.removed or outcome.kept):
        print("nothing to do: all files are up to date")


def _status(path: Path, force: bool) -> int:
    del force
    found = status(path)
    if not found.installed:
        print(f"{path}: the add-on is not installed")
        return 1
    print(f"{path}: add-on of onewan {found.version}{'' if found.complete else ', not complete'}")
    for what, names in (("changed", found.changed), ("missing", found.missing)):
        for name in names:
            print(f"  {what}: {name}")
    if not found.current:
        print("  the files of another version of onewan; `onewan onetrainer install` updates them")
    assert found.checked is not None
    _print_check(path, found.checked)
    fine = found.complete and found.current and not (found.changed or found.missing)
    return 0 if fine and not found.checked.problems else 1


def export(backup: Path, destination: Path | None, to: str | None, *, force: bool) -> int:
    from onewan.onetrainer.backups import export_backup

    if destination is None:
        raise ConfigError(
            "onetrainer export", ["OUT: is missing; give the path of the file to write"]
        )
    for path in export_backup(backup, destination, to, force=force, report=print):
        print(path)
    return 0
