"""What is printed: the only module that writes to the terminal, besides the bar of `Progress`; and
documents that a command writes into a file instead.

Text for people goes through `say` and `complain`, line by line: names of files and tensors,
metadata and settings may contain control characters, which they write as escapes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from onewan.errors import one_line
from onewan.files import replacing


def say(line: str = "") -> None:
    """Print one line to stdout."""
    with stdout() as file:
        print(one_line(line), file=file)


def complain(line: str) -> None:
    """Print one line to stderr. An error there is ignored, since there is nowhere to report it."""
    with contextlib.suppress(OSError):
        print(one_line(line), file=sys.stderr, flush=True)


def write(document: str) -> None:
    """Print a document for a program or an editor, such as JSON or a run file, as it is."""
    with stdout() as file:
        file.write(document if document.endswith("\n") else f"{document}\n")


def write_json(data: object) -> None:
    """Print JSON data as one document, the only thing that a command prints with ``--json``."""
    write(json.dumps(data, indent=2, ensure_ascii=False))


def write_file(path: Path, document: str) -> None:
    """Write a document into a file: in UTF-8 and with "\\n" on every system, completely or not at
    all."""
    with replacing(path) as temporary:
        temporary.write_bytes(document.encode("utf-8"))


@contextlib.contextmanager
def stdout() -> Iterator[TextIO]:
    """stdout; an error of the block, such as a full disk, names it. That the terminal was closed is
    no failure of a command."""
    try:
        yield sys.stdout
    except OSError as error:
        if error.errno != errno.EIO:
            error.filename = error.filename or "the output"
            raise


def drop_unwritable() -> None:
    """Drop what stdout and stderr can't take any more, since their reader has exited, the terminal
    was closed or the disk is full: Python would complain, and exit with another status, when it
    flushes them at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # noqa: PERF203  (two streams)
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
