"""`delete_run`: deletes a run's folder, and never that of a run that is trained."""

from __future__ import annotations

from pathlib import Path

from onewan.errors import OnewanError
from onewan.files import IS_WINDOWS, remove
from onewan.locks import Claim
from onewan.runs.layout import RunLayout
from onewan.runs.processes import trainer_of
from onewan.runs.status import is_run


def delete_run(runs: Path, name: str) -> None:
    """Delete the run called `name` in the folder `runs`, at once for whoever looks at the folder.

    OnewanError if there is no such run directly in `runs`, if it is a link to a folder elsewhere,
    or if a process trains it, here or on another host.
    """
    folder = runs / name
    if name in ("", ".", "..") or folder.parent != runs or not is_run(folder):
        raise OnewanError(f"{name}: there is no such run in {runs}")
    if folder.is_symlink():
        raise OnewanError(
            f"{name}: is a link to {folder.resolve()}, which is not deleted from here; delete it "
            "there, and then the link"
        )
    layout = RunLayout(folder)
    trainer = trainer_of(layout)
    if trainer is not None and trainer.is_alive is not False:
        rest = "" if trainer.is_here else ", or delete its folder there if that has ended"
        raise OnewanError(
            f"{name}: is trained by process {trainer.number} on {trainer.host}; stop it first{rest}"
        )
    # Held until the folder has another name, so that no trainer starts meanwhile. Windows renames
    # no folder with an open file.
    claim = Claim(layout.lock)
    if not claim.taken:
        raise OnewanError(f"{name}: has just been started; stop it first")
    try:
        if IS_WINDOWS:
            claim.release()
        remove(folder)
    finally:
        claim.release()
