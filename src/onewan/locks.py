"""Locks that keep two processes from writing to one place at the same time.

The lock is the operating system's on a file (through `filelock`), so it ends with the process, also
if that is killed; NFS passes it on to other machines. Who holds it is written beside it, for the
message to whoever comes second. Both files are deleted when the lock is released; those of a killed
process lock nothing and are replaced by the next one. A `Claim` is the same without a wait and
without words, for work that is left to whoever has begun it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from onewan.errors import OnewanError
from onewan.files import IS_WINDOWS, is_alive, machine

if TYPE_CHECKING:
    import psutil

log = logging.getLogger(__name__)

_WAIT_SECONDS = 0.5
"""Long enough for a holder that is just releasing the lock."""

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)

_SAME_START_SECONDS = 1.0
"""Two processes that had one id did not start within this time of each other; Windows says when it
was started with about this error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessId:
    """Names one process, also after it has ended and another one has its number."""

    number: int
    host: str
    machine: str = ""
    """What numbers of processes are unique in: a machine since its start, or a container of it
    (`onewan.files.machine`). Empty in what older versions wrote."""
    started: float | None = None
    """Seconds from the start of the machine to that of the process; None if not known."""

    @classmethod
    def of(cls, number: int) -> ProcessId:
        """That of the process of this machine that has the number `number` now."""
        return cls(
            number=number, host=socket.gethostname(), machine=machine(), started=_started(number)
        )

    @property
    def is_here(self) -> bool:
        """Whether this machine and container can reach the process, if it exists."""
        return self.host == socket.gethostname() and self.machine == machine()

    @property
    def is_alive(self) -> bool | None:
        """Whether the process exists; None if that can't be told, since it is on another host."""
        if self.host != socket.gethostname():
            return None
        return is_alive(self.number) and self._has_its_start()

    def find(self) -> psutil.Process | None:
        """The process, if it exists and can be reached from here."""
        if not (self.is_here and self.is_alive):
            return None
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.number)
            # Once more: from here on psutil itself notices that a number was given away.
            return process if self._has_its_start() else None
        return None

    def _has_its_start(self) -> bool:
        started = _started(self.number)
        if self.started is None or started is None:
            return True
        return abs(started - self.started) <= _SAME_START_SECONDS


def _started(number: int) -> float | None:
    """When the process was started, in seconds from the start of the machine, which do not change
    when its clock is set; None if there is no such process, or it is not known."""
    import psutil

    with contextlib.suppress(psutil.Error, OSError):
        # In this order: some versions of psutil keep the time of the machine's start from here.
        boot = psutil.boot_time()
        return round(psutil.Process(number).create_time() - boot, 2)
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a lock, or held it last and was killed."""

    process: ProcessId
    since: str
    """Local time."""


@contextlib.contextmanager
def locked(file: Path, subject: Path, remedy: str) -> Iterator[None]:
    """Holds the lock `file` on `subject` while the block runs. The file's folder is created, and
    deleted again if the block puts nothing into it.

    OnewanError if another process holds it: with its process id, host and start, and `remedy`.
    Where the file system has no locks the block runs without one, after a warning.
    """
    holder = _description(file)
    with _folder(file.parent):
        lock = FileLock(file)
        try:
            lock.acquire(timeout=_WAIT_SECONDS)
        except Timeout:
            # Where no file can be created, such as in /proc, `filelock` also waits. Then this
            # raises the system's error.
            os.close(os.open(file, os.O_RDWR | os.O_CREAT))
            raise OnewanError(f"{subject}: is in use by {_described(file)}; {remedy}") from None
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
            if _is_file(file, identity):
                _delete(holder)
            _release(lock, file, identity)


def holder_of(file: Path) -> Holder | None:
    """The process that holds the lock `file`, or has held it last and was killed; None if nobody is
    written down: the lock is free, or its holder is about to say who it is."""
    try:
        facts = json.loads(_description(file).read_text(encoding="utf-8"))
        started = facts.get("started")
        process = ProcessId(
            number=int(facts["process"]),
            host=str(facts["host"]),
            machine=str(facts.get("machine", "")),
            started=None if started is None else float(started),
        )
        return Holder(process=process, since=str(facts["since"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def holder_is_alive(file: Path) -> bool | None:
    """Whether the process that holds the lock `file`, or has held it last and was killed, exists;
    None if that can't be told: nobody is written down, or a process of another machine."""
    holder = holder_of(file)
    return None if holder is None else holder.process.is_alive


class Claim:
    """A piece of work that this process has begun, for others to leave to it: a lock on a file,
    which is deleted in the end. Any thread may release it."""

    def __init__(self, file: Path) -> None:
        """`taken` says whether the claim is this process's. It is too where no lock can be made,
        such as on a full disk: two processes may then do the same work."""
        self._file = file
        self._lock: FileLock | None = None
        self._identity: os.stat_result | None = None
        self.taken = True
        lock = FileLock(file, thread_local=False)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
            self._identity = file.stat()
            self._lock = lock
        except Timeout:
            self.taken = False
        except OSError:
            lock.release()

    @property
    def is_locked(self) -> bool:
        """Whether other processes are kept from the work, until `release`."""
        return self._lock is not None

    def release(self) -> None:
        """Nothing happens if the claim is not this process's, or was released before."""
        if self._lock is not None and self._identity is not None:
            _release(self._lock, self._file, self._identity)
            self._lock = None


def _release(lock: FileLock, file: Path, identity: os.stat_result) -> None:
    """Release a lock, and delete its file if that is still the one of `identity`."""
    own = _is_file(file, identity)
    # While the lock is held: whoever has opened the file, and locks it now, finds it
    # deleted and tries again (`filelock` does that). Windows can't delete an open file.
    if own and not IS_WINDOWS:
        _delete(file)
    lock.release()
    if own and IS_WINDOWS:
        _delete(file)


def remove_abandoned_locks(folder: Path) -> None:
    """Delete the files of locks in `folder` that killed processes left and nobody holds."""
    for file in folder.glob(".lock*"):
        if file.suffix != ".json" and (claim := Claim(file)).is_locked:
            _delete(_description(file))
            claim.release()


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


def _description(file: Path) -> Path:
    """The file that says who holds the lock `file`."""
    return file.with_name(f"{file.name}.json")


def _describe_this_process(holder: Path) -> None:
    now = datetime.now().isoformat(sep=" ", timespec="seconds")
    me = ProcessId.of(os.getpid())
    facts = {
        "process": me.number,
        "host": me.host,
        "since": now,
        "machine": me.machine,
        "started": me.started,
    }
    with contextlib.suppress(OSError):  # such as a full disk: the lock holds without a description
        holder.write_text(json.dumps(facts), encoding="utf-8")


def _described(file: Path) -> str:
    """The process that holds the lock `file`, as is written beside it."""
    holder = holder_of(file)
    if holder is None:
        return "another process"
    return f"process {holder.process.number} on {holder.process.host} since {holder.since}"


def _is_file(path: Path, identity: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.stat(), identity)
    except OSError:
        return False


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):  # it is gone, or the next process holds it already
        path.unlink()
