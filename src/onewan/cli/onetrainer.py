"""What `onewan onetrainer` does."""

from __future__ import annotations

from pathlib import Path

from onewan.errors import ConfigError
from onewan.onetrainer.contract import CheckResult, contract
from onewan.onetrainer.install import (
    MANIFEST,
    Outcome,
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
    _tell_check(path, found)
    return 1 if found.problems else 0


def _tell_check(path: Path, found: CheckResult) -> None:
    known = contract()
    print(f"{path}: looked for {found.names} names in {found.files} files of OneTrainer")
    if found.problems:
        print(f"not supported, {len(found.problems)} of them are not as the add-on needs them:")
        for problem in found.problems:
            print(f"  {problem}")
        print(
            f"supported are commit {known['commit'][:8]} ({known['date']}) and later ones with the "
            "same names; go back to that commit, or update onewan"
        )
    else:
        print(f"all are there; made for commit {known['commit'][:8]} ({known['date']})")


def _install(path: Path, force: bool) -> int:
    outcome = install(path, force=force)
    _tell(outcome)
    print(
        f"installed: {path / MANIFEST} lists the files. OneTrainer now has the model type Wan 2.2"
    )
    if has_onewan(path) is False:
        print(
            "its own environment has no onewan yet, without which Wan 2.2 stays switched off: "
            f"{python_in(path)} -m pip install onewan"
        )
    return 0


def _uninstall(path: Path, force: bool) -> int:
    outcome = uninstall(path, force=force)
    _tell(outcome)
    return 1 if outcome.kept else 0


def _tell(outcome: Outcome) -> None:
    for what, names in (("wrote", outcome.written), ("removed", outcome.removed)):
        if names:
            print(f"{what} {len(names)} files")
    for name in outcome.kept:
        print(f"left alone, since it was changed: {name} (--force takes it too)")
    if not (outcome.written or outcome.removed or outcome.kept):
        print("nothing to do: all files are as they should be")


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
        print("  not the files of this onewan; `onewan onetrainer install` brings them up to date")
    assert found.checked is not None
    _tell_check(path, found.checked)
    fine = found.complete and found.current and not (found.changed or found.missing)
    return 0 if fine and not found.checked.problems else 1


def export(backup: Path, destination: Path | None, to: str | None, *, force: bool) -> int:
    from onewan.onetrainer.backups import export_backup

    if destination is None:
        raise ConfigError("onetrainer export", ["OUT: is missing; give the file to write"])
    for path in export_backup(backup, destination, to, force=force, report=print):
        print(path)
    return 0
