"""Real second processes that write under temporary names, alive or killed."""

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
