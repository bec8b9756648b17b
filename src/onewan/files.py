"""Writes files atomically: complete or absent, also if several processes share a folder.

Everything is written under a temporary name and renamed when it is complete. A temporary name is
``.tmp-MACHINE-PID-RANDOM-`` followed by the final name, so that two processes never write to the
same file and `remove_abandoned` knows which process wrote it.
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
"""Prefix of unfinished files and folders, which readers ignore."""

ABANDONED_AFTER_SECONDS = 24 * 60 * 60
"""Time since the last change after which `remove_abandoned` deletes files of another machine. No
writer pauses for nearly as long, and clocks of machines that share a folder differ by less."""

_TEMPORARY_NAME = re.compile(r"\.tmp-([0-9a-f]{8})-([0-9]+)-[0-9a-f]{8}-.+", re.DOTALL)

_in_use: set[str] = set()
"""The temporary names that this process is writing to."""


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path` that does not exist yet.

    The block creates a file or folder there and renames it. If the temporary path still exists when
    the block ends, by an exception or not, it is deleted.
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
    """Yields a temporary path to write to; it is renamed to `path` when the block ends.

    The temporary file is beside `path` and has its extension, for writers that choose the format by
    it. It is synced to disk before the rename, so that even after a power cut the file at `path` is
    complete. If the block raises, `path` is unchanged.
    """
    with temporary_beside(path) as temporary:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    sync(path.parent)


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Delete temporary files that interrupted writers left in `folder`: all, or those for `name`.

    A file that a live process may be writing is kept. It is deleted only if no process on this
    machine has the process id in its name (or only this process, which is not writing to it), or,
    if it is from another machine or container, after `ABANDONED_AFTER_SECONDS` without a change.
    """
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        if (name is None or path.name.endswith(f"-{name}")) and _is_abandoned(path):
            _delete(path)


def _is_abandoned(path: Path) -> bool:
    if path.name in _in_use:
        return False
    match = _TEMPORARY_NAME.fullmatch(path.name)
    # An own process id that is not in `_in_use` is left from an earlier process with the same id.
    if match is not None and match[1] == _machine():
        return int(match[2]) == os.getpid() or not _is_alive(int(match[2]))
    try:
        entries = [path, *path.rglob("*")]
        changed = max(entry.lstat().st_mtime for entry in entries)
    except OSError:  # its writer is moving or deleting it
        return False
    return time.time() - changed > ABANDONED_AFTER_SECONDS


def _is_alive(pid: int) -> bool:
    # psutil instead of `os.kill(pid, 0)`, which would end the process on Windows. Imported lazily,
    # since only cleaning up needs it.
    import psutil

    return psutil.pid_exists(pid)


@cache
def _machine() -> str:
    """Eight hexadecimal digits that identify this machine or container, and its process ids.

    On Linux they cover the boot and the PID namespace, since containers and cloned machines that
    share a folder often have the same host name but other processes with the same ids. After a
    restart a machine therefore counts as another one.
    """
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text("ascii"))
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=4).hexdigest()


def _delete(path: Path) -> None:
    """Delete a file or folder with a temporary name; errors are ignored, since `remove_abandoned`
    tries again."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Delete a file or folder atomically: a reader never finds a part of a folder."""
    if not path.is_dir():
        path.unlink()
        return
    with temporary_beside(path) as doomed:
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def sync(path: Path) -> None:
    """Force a file's content, or a folder's entries, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows can't sync a folder
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_digest(path: Path) -> str:
    """BLAKE2b-160 of a file's content in hexadecimal, in constant memory."""
    digest = hashlib.blake2b(digest_size=20)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
