"""Writing files so that they are complete or absent, also when several processes share a folder.

Everything is written under a temporary name and renamed when it is complete. A temporary name is
``.tmp-MACHINE-PID-RANDOM-`` and the final name, so that two processes never write to the same one
and `remove_abandoned` can tell whose it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"
"""Names of unfinished files and folders start with it; a reader never looks at them."""

ABANDONED_AFTER_SECONDS = 24 * 60 * 60
"""Age, since the last change, from which `remove_abandoned` deletes what another machine left. No
writer pauses nearly as long, and clocks of machines that share a folder agree better than that."""

_TEMPORARY_NAME = re.compile(r"\.tmp-([0-9a-f]{8})-([0-9]+)-[0-9a-f]{8}-.+", re.DOTALL)

_in_use: set[str] = set()
"""The temporary names that this process writes under now."""


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`, under which nothing exists yet.

    The block writes a file or makes a folder there and renames it. Whatever still has the
    temporary name when the block ends, by an exception or not, is deleted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = f"{TEMPORARY_PREFIX}{_machine()}-{os.getpid()}-{secrets.token_hex(4)}-{path.name}"
    temporary = path.with_name(name)
    _in_use.add(name)
    try:
        yield temporary
    finally:
        _delete(temporary)
        _in_use.discard(name)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to the temporary path this yields; when the block ends well it becomes `path`.

    The temporary file lies beside `path` and has its extension, for writers that choose the format
    by it. It is synced to disk before the rename, so that not even a power cut leaves half a file
    under the final name. If the block raises, `path` is untouched.
    """
    with temporary_beside(path) as temporary:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    sync(path.parent)


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Delete what interrupted writers left in `folder`, all of it or that for the file `name`.

    What a live process may still be writing stays: it goes only if no process on this machine has
    the process id in the name (or only this one, which does not write under it), or, where another
    machine or container wrote it, after `ABANDONED_AFTER_SECONDS` without a change.
    """
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        if (name is None or path.name.endswith(f"-{name}")) and _is_abandoned(path):
            _delete(path)


def _is_abandoned(path: Path) -> bool:
    if path.name in _in_use:
        return False
    match = _TEMPORARY_NAME.fullmatch(path.name)
    if match is not None and match[1] == _machine():
        return int(match[2]) == os.getpid() or not _is_alive(int(match[2]))
    try:
        entries = [path, *path.rglob("*")]
        changed = max(entry.lstat().st_mtime for entry in entries)
    except OSError:  # its writer is moving or deleting it
        return False
    return time.time() - changed > ABANDONED_AFTER_SECONDS


def _is_alive(pid: int) -> bool:
    # Signal 0 asks for this on POSIX, but would end the process on Windows. Imported here since
    # only cleaning up needs it.
    import psutil

    return psutil.pid_exists(pid)


@cache
def _machine() -> str:
    """Eight hexadecimal digits that stand for the process ids of this machine or container.

    On Linux the boot and the PID namespace are part of it, since containers and cloned machines
    that share a folder often have one host name, and the same process ids mean other processes
    there. A machine that was restarted is therefore another machine.
    """
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text("ascii"))
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=4).hexdigest()


def _delete(path: Path) -> None:
    """Delete a file or folder with a temporary name, as far as the system lets us."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Delete a file or a folder, so that no reader ever finds half a folder under its name."""
    if not path.is_dir():
        path.unlink()
        return
    with temporary_beside(path) as doomed:
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def sync(path: Path) -> None:
    """Force a file's content, or a folder's entries, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle to sync for a folder
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_digest(path: Path) -> str:
    """Hexadecimal BLAKE2b-160 of a file's content, read piece by piece."""
    digest = hashlib.blake2b(digest_size=20)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
