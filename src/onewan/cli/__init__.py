"""The command line: `onewan COMMAND`. The only package that prints.

`parser` and the `*_parsers` modules describe the commands without heavy imports, so that
``onewan --help`` is fast; the module that executes a command is imported when it runs. Exit status:
0 success, 1 an error that the user can fix (one message on stderr, no traceback), 2 wrong usage,
70 a defect of onewan (its traceback is in a file, which the message names), 130 stopped by the user
with the state saved.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial

from onewan.cli.boundary import guarded
from onewan.cli.parser import parse

__all__ = ["main", "parse"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    # Run files are UTF-8, so messages that quote them are too, also on a Windows console.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    _silence_libraries()
    return guarded(partial(_run, arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = parse(arguments)
    return options.command(options)


def _silence_libraries() -> None:
    """Keep notices of libraries off the terminal: they address programmers (a missing optional
    package, unused kernels), and onewan itself reports what concerns the user."""
    # Read by diffusers and transformers when they are imported, which happens in the commands.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # PEFT imports the first two wherever they are installed.
    for package in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(package).setLevel(logging.ERROR)
