"""Writing files so that they are whole or not there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"
"""Names of unfinished files and folders start with it; a reader never looks at them."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to the temporary path this yields; when the block ends well it becomes `path`.

    The temporary file lies beside `path` and ends as it does (writers that go by the extension
    work). It is synced to disk before the rename, so that not even a power cut leaves half a file
    under the final name. If the block raises, the temporary file is removed and `path` untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def remove_unfinished(folder: Path) -> None:
    """Delete what writers that were killed left in `folder`, where nobody is writing now."""
    for left in folder.glob(f"{TEMPORARY_PREFIX}*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Delete a file or a folder, so that nobody ever finds half a folder under its name."""
    if not path.is_dir():
        path.unlink()
        return
    doomed = path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}")
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
    """Hexadecimal BLAKE2b-160 of a file's content, read in pieces."""
    digest = hashlib.blake2b(digest_size=20)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
