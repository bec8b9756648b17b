"""Locks that keep two processes from writing to one place at the same time.

The lock is the operating system's on a file (through `filelock`), so it ends with the process, also
if that is killed; NFS passes it on to other machines. Who holds it is written beside it, for the
message to whoever comes second. Both files are deleted when the lock is released; those of a killed
process lock nothing and are replaced by the next one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from onewan.errors import OnewanError

log = logging.getLogger(__name__)

_WAIT_SECONDS = 0.5
"""Long enough for a holder that is just releasing the lock."""

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


@contextlib.contextmanager
def locked(file: Path, subject: Path, remedy: str) -> Iterator[None]:
    """Holds the lock `file` on `subject` while the block runs. The file's folder is created, and
    deleted again if the block puts nothing into it.

    OnewanError if another process holds it: with its process id, host and start, and `remedy`.
    Where the file system has no locks the block runs without one, after a warning.
    """
    holder = file.with_name(f"{file.name}.json")
    with _folder(file.parent):
        lock = FileLock(file)
        try:
            lock.acquire(timeout=_WAIT_SECONDS)
        except Timeout:
            # Where no file can be created, such as in /proc, `filelock` also waits. Then this
            # raises the system's error.
            os.close(os.open(file, os.O_RDWR | os.O_CREAT))
            raise OnewanError(f"{subject}: is in use by {_described(holder)}; {remedy}") from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            log.warning("%s: can't be locked (%s); let no other process use it", subject, error)
            yield
            return
        identity = file.stat()
        try:
            _describe_this_process(holder)
            yield
        finally:
            # If the folder was renamed meanwhile, the files of these names are another process's.
            own = _is_file(file, identity)
            if own:
                _delete(holder)
            # While the lock is held: whoever has opened the file, and locks it now, finds it
            # deleted and tries again (`filelock` does that). Windows can't delete an open file.
            if own and os.name != "nt":
                _delete(file)
            lock.release()
            if own and os.name == "nt":
                _delete(file)


def remove_abandoned_locks(folder: Path) -> None:
    """Delete the files of locks in `folder` that killed processes left and nobody holds."""
    for file in folder.glob(".lock*"):
        if file.suffix != ".json":
            with contextlib.suppress(OnewanError), locked(file, folder, ""):
                pass


@contextlib.contextmanager
def _folder(folder: Path) -> Iterator[None]:
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # until one is not empty
            for path in new:
                path.rmdir()


def _describe_this_process(holder: Path) -> None:
    now = datetime.now().isoformat(sep=" ", timespec="seconds")
    facts = {"process": os.getpid(), "host": socket.gethostname(), "since": now}
    with contextlib.suppress(OSError):  # such as a full disk: the lock holds without a description
        holder.write_text(json.dumps(facts), encoding="utf-8")


def _described(holder: Path) -> str:
    """The process that holds a lock, as its file says."""
    try:
        facts = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {facts['process']} on {facts['host']} since {facts['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it is being written, or was deleted
        return "another process"


def _is_file(path: Path, identity: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.stat(), identity)
    except OSError:
        return False


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):  # it is gone, or the next process holds it already
        path.unlink()
