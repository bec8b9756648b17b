"""Writes files atomically: complete or absent, also if several processes share a folder.

Everything is written under a temporary name and renamed when it is complete. A temporary name is
``.tmp-MACHINE-PID-RANDOM-`` followed by the final name, so that two processes never write to the
same file and `remove_abandoned` knows which process wrote it. Where a system can't exchange two
folders, the one to be replaced is ``.replaced-MACHINE-PID-RANDOM-NAME`` between two renames.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"
"""Prefix of unfinished files and folders, which readers ignore."""

REPLACED_PREFIX = ".replaced-"
"""Prefix of a folder that `replace` moved aside and has not yet replaced."""

LARGE_BYTES = 100_000_000
"""Temporary files of at least this size are mentioned to the user when they are found."""

ABANDONED_AFTER_SECONDS = 24 * 60 * 60
"""Time since the last change after which `remove_abandoned` deletes files of another machine. No
writer pauses for nearly as long, and clocks of machines that share a folder differ by less."""

IS_WINDOWS = os.name == "nt"

_HELD = (5, 32, 33)
"""Windows' errors for what another program holds open: ERROR_ACCESS_DENIED (which it gives for a
file that is being deleted, too), ERROR_SHARING_VIOLATION and ERROR_LOCK_VIOLATION."""
_HELD_SECONDS = 2.0
"""For which that is waited for: indexers and virus scanners open new files for moments."""

_TEMPORARY_NAME = re.compile(
    r"\.(?:tmp|replaced)-([0-9a-f]{8})-([0-9]+)-[0-9a-f]{8}-(.+)", re.DOTALL
)

_in_use: set[str] = set()
"""The temporary names that this process is writing to."""


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path` that does not exist.

    The block creates a file or folder there and renames it. If the temporary path still exists when
    the block ends, by an exception or not, it is deleted. What interrupted processes left of `path`
    is deleted before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent, path.name)
    temporary = _owned(TEMPORARY_PREFIX, path)
    # Whatever has this name must not become a part of what is written. (What an earlier process
    # with this id left was deleted above.)
    if os.path.lexists(temporary):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(temporary))
    _in_use.add(temporary.name)
    try:
        with _named(path):
            yield temporary
    finally:
        _delete(temporary)
        _in_use.discard(temporary.name)


def unwritable_reason(path: Path) -> str | None:
    """Why no file can be written at `path`, whose folder need not exist yet; None if one can.

    Tried with an empty temporary file in the nearest folder that exists: what permissions say is
    not all on Windows, on network drives and for an administrator.
    """
    found = next(p for p in path.absolute().parents if os.path.lexists(p))
    if not found.is_dir():
        return f"{found} is not a folder"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)  # for a name that is too long, also of a folder
        with temporary_beside(found / path.name) as temporary:
            temporary.touch()
    except OSError as error:
        return f"{error.strerror}"
    return None


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Gives `path` to an error of writing, which does not say where there is no space, for
    example."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        # safetensors has a class of its own for what the system reports.
        if found := re.search(r"\(os error ([0-9]+)\)", str(error)):
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def _owned(prefix: str, path: Path) -> Path:
    """A name beside `path` that identifies this process."""
    match = _TEMPORARY_NAME.fullmatch(path.name)
    name = path.name if match is None else match[3]  # one prefix, so that names do not get too long
    random = secrets.token_hex(4)
    return path.with_name(f"{prefix}{machine()}-{os.getpid()}-{random}-{name}")


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
        _when_free(lambda: os.replace(temporary, path))
    sync(path.parent)


@contextlib.contextmanager
def creating(path: Path) -> Iterator[Path]:
    """Like `replacing`, but nothing is ever replaced: FileExistsError if something has the name
    `path` when the block ends, even if it was not there when the block began."""
    with temporary_beside(path) as temporary:
        yield temporary
        sync(temporary)
        _give_new_name(temporary, path)
    sync(path.parent)


def _give_new_name(source: Path, destination: Path) -> None:
    """Let the complete file `source` appear as `destination`; FileExistsError if that exists.

    Atomic, except where a file system has neither hard links nor renaming without replacement
    (some network drives): a process that is killed there may leave a part of the file.
    """
    if IS_WINDOWS:
        _when_free(lambda: os.rename(source, destination))  # which replaces nothing on Windows
        return
    try:
        os.link(source, destination)
    except FileExistsError:
        raise
    except OSError:
        if _renamed(source, destination, _RENAME_NOREPLACE):
            return
        with destination.open("xb") as file:
            file.write(source.read_bytes())
        sync(destination)


def replace(source: Path, destination: Path) -> None:
    """Rename `source` to `destination`; if both are folders, what was there before may afterwards
    have the name `source`, for the caller to delete.

    Atomic for files, and for folders on Linux where the file system can exchange two names. No
    system renames a folder over one that is not empty, so elsewhere the old folder is moved aside
    first. If the process is killed between the two renames, `remove_abandoned` moves it back.
    """
    if not destination.is_dir():
        _when_free(lambda: os.replace(source, destination))
    elif not _renamed(source, destination, _RENAME_EXCHANGE):
        aside = _owned(REPLACED_PREFIX, destination)
        _in_use.add(aside.name)
        try:
            _when_free(lambda: os.rename(destination, aside))
            try:
                _when_free(lambda: os.rename(source, destination))
            except BaseException:
                _when_free(lambda: os.rename(aside, destination))
                raise
            os.rename(aside, source)
        finally:
            _in_use.discard(aside.name)
    sync(destination.parent)


def _when_free(rename: Callable[[], None]) -> None:
    """Call `rename`. Windows renames nothing that another program holds open, so there it is called
    again until that lets go, for `_HELD_SECONDS` at most."""
    end, pause = time.monotonic() + _HELD_SECONDS, 0.01
    while True:
        try:
            return rename()
        except OSError as error:
            # Only errors of Windows have its numbers.
            if getattr(error, "winerror", None) not in _HELD or time.monotonic() > end:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 0.2)


def moved_aside(path: Path) -> Path | None:
    """Where the folder `path` is, if `replace` was killed after moving it aside; else None."""
    if os.path.lexists(path):
        return None
    aside = (p for p in path.parent.glob(f"{REPLACED_PREFIX}*") if _replaced_original(p) == path)
    return next(aside, None)


_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def _renamed(first: Path, second: Path, flag: int) -> bool:
    """Rename `first` to `second`, without replacing it or as an exchange of the two, atomically;
    False where the system or the file system can't."""
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # an older C library
        return False
    names = os.fsencode(first), os.fsencode(second)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # such as NFS
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def remove_abandoned(folders: Path | Iterable[Path], name: str | None = None) -> list[str]:
    """Delete temporary files that interrupted writers left in `folders`: all, or those for `name`.
    A folder that one moved aside, to replace it, is moved back unless it has been replaced.

    A file that a live process may be writing is kept. It is deleted only if no process on this
    machine has the process id in its name (or only this process, which is not writing to it), or,
    if it is from another machine or container, after `ABANDONED_AFTER_SECONDS` without a change.

    Returns notices for the user, one line each: about folders moved back, and about files of
    `LARGE_BYTES` and more, deleted or kept.
    """
    notices: list[str] = []
    count = total = 0
    for folder in [folders] if isinstance(folders, Path) else folders:
        for path in [*folder.glob(f"{TEMPORARY_PREFIX}*"), *folder.glob(f"{REPLACED_PREFIX}*")]:
            if name is not None and not path.name.endswith(f"-{name}"):
                continue
            size = total_bytes(path)
            if not _is_abandoned(path):
                if size >= LARGE_BYTES and _local_process(path) is None:
                    notices.append(_kept(path, size))
            elif (original := _replaced_original(path)) is not None:
                with contextlib.suppress(FileNotFoundError):  # another process has done it
                    os.rename(path, original)
                    notices.append(f"{original}: moved back; replacing it was interrupted")
            else:
                _delete(path)
                count, total = count + 1, total + size
    if total >= LARGE_BYTES:
        files = "1 temporary file" if count == 1 else f"{count} temporary files"
        notices.append(f"deleted {files} of interrupted processes ({total / 1e9:.2f} GB)")
    return notices


def _kept(path: Path, size: int) -> str:
    return (
        f"{path}: {size / 1e9:.2f} GB, is left from another machine, or from before a restart; "
        "delete it if no process writes it, else it is deleted after a day without a change"
    )


def _replaced_original(path: Path) -> Path | None:
    """The name that the folder `path`, which was moved aside, had, if nothing has it now."""
    match = _TEMPORARY_NAME.fullmatch(path.name)
    if match is None or not path.name.startswith(REPLACED_PREFIX):
        return None
    original = path.with_name(match[3])
    return None if os.path.lexists(original) else original


def total_bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    total = 0
    for entry in [path, *path.rglob("*")] if path.is_dir() else [path]:
        with contextlib.suppress(OSError):  # its writer is moving or deleting it
            total += entry.lstat().st_size
    return total


def _is_abandoned(path: Path) -> bool:
    if path.name in _in_use:
        return False
    if (pid := _local_process(path)) is not None:
        # An own process id that is not in `_in_use` is left from an earlier process with that id.
        return pid == os.getpid() or not is_alive(pid)
    try:
        entries = [path, *path.rglob("*")]
        changed = max(entry.lstat().st_mtime for entry in entries)
    except OSError:  # its writer is moving or deleting it
        return False
    return time.time() - changed > ABANDONED_AFTER_SECONDS


def _local_process(path: Path) -> int | None:
    """The process id in a temporary name; None if it is not from this machine and this boot."""
    match = _TEMPORARY_NAME.fullmatch(path.name)
    return int(match[2]) if match is not None and match[1] == machine() else None


def is_alive(pid: int) -> bool:
    """Whether a process of this machine has the id `pid` and has not ended."""
    # psutil instead of `os.kill(pid, 0)`, which would end the process on Windows. Imported lazily,
    # since only cleaning up needs it.
    import psutil

    try:
        # A zombie has ended, and its parent has not yet asked how.
        return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


@cache
def machine() -> str:
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
        _when_free(path.unlink)
        return
    with temporary_beside(path) as doomed:
        _when_free(lambda: os.replace(path, doomed))
        shutil.rmtree(doomed)


def link_or_copy(source: Path, destination: Path) -> None:
    """Make `destination` the same as the complete file or folder `source`, atomically; it replaces
    what was there. Hard links where the file system has them, so that no more space is used."""
    with temporary_beside(destination) as temporary:
        if source.is_dir():
            shutil.copytree(source, temporary, copy_function=_link_or_copy_file)
            for folder in [temporary, *(path for path in temporary.rglob("*") if path.is_dir())]:
                sync(folder)
        else:
            _link_or_copy_file(source, temporary)
        replace(temporary, destination)


def _link_or_copy_file(source: str | Path, destination: str | Path) -> None:
    try:
        os.link(source, destination)
    except OSError:  # such as exFAT and many network drives
        shutil.copyfile(source, destination)
        sync(Path(destination))


def sync(path: Path) -> None:
    """Force a file's content, or a folder's entries, to the disk. Of a folder where that is
    possible: Windows and some network drives can't."""
    is_folder = path.is_dir()
    if is_folder and IS_WINDOWS:
        return
    handle = os.open(path, os.O_RDWR if IS_WINDOWS else os.O_RDONLY)
    try:
        _sync_to_disk(handle)
    except OSError as error:
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _sync_to_disk(handle: int) -> None:
    if sys.platform == "darwin":
        import fcntl

        # `fsync` of macOS leaves the data in the memory of the drive, which a power cut empties.
        with contextlib.suppress(OSError):  # not every file system has it
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            return
    os.fsync(handle)


_RESERVED = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3]) *(\..*)?", re.IGNORECASE
)


def windows_reserves(name: str) -> bool:
    """Whether no file or folder on Windows can have this name: that of a device, with any
    extension, or one that ends with a dot or a space."""
    return _RESERVED.fullmatch(name) is not None or name.endswith((".", " "))


def append_lines(file: Path, lines: Iterable[str]) -> None:
    """Append `lines` to a file that several processes append to."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # The first newline ends a line that a process did not complete, because it was killed.
    content = "".join(f"\n{line}" for line in lines) + "\n"
    # Unbuffered: one write in append mode, which is not interleaved with those of others.
    with _named(file), file.open("ab", buffering=0) as opened:
        opened.write(content.encode())


def check_input(path: Path) -> Path:
    """`path`, if it names a file that can be read to its end.

    OSError with the reason as ``strerror`` for a folder and for a device, a FIFO or a socket, which
    would be waited for or never end; FileNotFoundError and others as `os.stat` raises them.
    """
    if "\0" in str(path):  # which `os.stat` refuses with a ValueError
        raise OSError(errno.EINVAL, "has the character NUL in its name", str(path))
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(path))
    if not stat.S_ISREG(mode):
        kinds = {stat.S_ISFIFO: "a FIFO", stat.S_ISSOCK: "a socket"}
        kind = next((name for is_kind, name in kinds.items() if is_kind(mode)), "a device")
        raise OSError(errno.EINVAL, f"is {kind}, not a file", str(path))
    return path


def read_input(path: Path, max_bytes: int) -> bytes:
    """The content of a file that a user gives; OSError as in `check_input`, and if the file is
    larger than `max_bytes`, without reading it."""
    with check_input(path).open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        limit = f"{max_bytes >> 20} MiB" if max_bytes >= 1 << 20 else f"{max_bytes >> 10} KiB"
        raise OSError(errno.EFBIG, f"is larger than {limit}", str(path))
    return data


def file_digest(path: Path) -> str:
    """BLAKE2b-160 of a file's content in hexadecimal, in constant memory."""
    digest = hashlib.blake2b(digest_size=20)
    with check_input(path).open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
