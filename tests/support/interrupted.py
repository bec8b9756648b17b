"""Real second processes that write under temporary names or hold a lock, alive or killed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_WRITE = """
import contextlib, pathlib, sys
from onewan.files import temporary_beside
with contextlib.ExitStack() as stack:
    for path in map(pathlib.Path, sys.argv[2:]):
        temporary = stack.enter_context(temporary_beside(path))
        if sys.argv[1] == "folder":
            temporary.mkdir()
            temporary = temporary / "inside"
        temporary.write_text("half")
        print(temporary.name if sys.argv[1] == "file" else temporary.parent.name)
    print("written", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def writing(*paths: Path, kind: str = "file") -> Iterator[tuple[subprocess.Popen[str], list[Path]]]:
    """A live process that has half written `paths`, and its temporary paths; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITE, kind, *map(str, paths)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        names = [process.stdout.readline().strip() for _ in paths]
        assert process.stdout.readline().strip() == "written"
        yield process, [path.with_name(name) for path, name in zip(paths, names, strict=True)]
    finally:
        process.kill()
        process.wait()


def leave_interrupted(*paths: Path, kind: str = "file") -> list[Path]:
    """The temporary files or folders that a killed writer of `paths` left."""
    with writing(*paths, kind=kind) as (_, left):
        pass
    return left


_LOCK = """
import pathlib, sys
from onewan.locks import locked
with locked(pathlib.Path(sys.argv[1]), pathlib.Path("x"), ""):
    print("locked", flush=True)
    sys.stdin.read()
"""
_CLAIM = """
import pathlib, sys
from onewan.locks import Claim
claim = Claim(pathlib.Path(sys.argv[1]))
print("locked" if claim.taken else "is another's", flush=True)
sys.stdin.read()
"""


def locking(file: Path) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """A live process that holds the lock `file`; killed at the end."""
    return _holding(_LOCK, file)


def claiming(file: Path) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """A live process that holds the claim `file`; killed at the end."""
    return _holding(_CLAIM, file)


@contextlib.contextmanager
def _holding(script: str, file: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "locked"
        yield process
    finally:
        process.kill()
        process.wait()


# Stands for a system that can't exchange two folders. The process kills itself after a number of
# renames, as no test could do from outside at that moment.
_REPLACE = """
import os, pathlib, signal, sys
from onewan import files
files._renamed = lambda first, second, flag: False
rename, left = os.rename, int(sys.argv[2])
def rename_or_die(*names):
    global left
    if not left:
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
    left -= 1
    rename(*names)
os.rename = rename_or_die
with files.temporary_beside(pathlib.Path(sys.argv[1])) as staging:
    staging.mkdir()
    (staging / "config.json").write_text("new")
    files.replace(staging, pathlib.Path(sys.argv[1]))
"""


def replace_and_die(folder: Path, *, after_renames: int) -> None:
    """Replace `folder` without an atomic exchange by one with a ``config.json`` that contains
    "new", in a process that is killed after so many of its three renames."""
    command = [sys.executable, "-c", _REPLACE, str(folder), str(after_renames)]
    assert subprocess.run(command, check=False).returncode != 0
