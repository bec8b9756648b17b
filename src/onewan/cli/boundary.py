"""The boundary between the commands and the user: what leaves a command becomes an exit status."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from onewan.errors import Interrupted, OnewanError

DEFECT_STATUS = 70
"""Exit status after an error that is a defect of onewan: EX_SOFTWARE of sysexits.h."""


def guarded(command: Callable[[], int]) -> int:
    """Run `command`; returns its exit status, or that of the error which left it."""
    try:
        status = command()
        _flush_stdout()
        return status
    except OnewanError as error:
        _tell(f"onewan: {error}")
        return 1
    except (Interrupted, KeyboardInterrupt):
        _tell("onewan: stopped")
        return 130
    except BrokenPipeError:  # the reader of our output has exited (`onewan schema | head`)
        return 1
    except Exception as error:  # noqa: BLE001  (the process boundary: nobody else reports it)
        _tell(_defect(error))
        return DEFECT_STATUS
    finally:
        _drop_unwritable_output()


def _flush_stdout() -> None:
    try:
        sys.stdout.flush()
    except OSError as error:
        # A terminal that was closed is no failure of the command; a full disk is one.
        if error.errno != errno.EIO:
            raise


def _tell(text: str) -> None:
    """Print to stderr, or nothing where the terminal was closed."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)


def _drop_unwritable_output() -> None:
    """Drop what stdout and stderr can't take any more, since their reader has exited or the
    terminal was closed: Python would complain, and exit with another status, when it flushes them
    at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # noqa: PERF203  (two streams)
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _defect(error: Exception) -> str:
    """Writes the traceback of `error` into a file; returns the line that names it."""
    handle, name = tempfile.mkstemp(prefix="onewan-error-", suffix=".txt")
    with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write("".join(traceback.format_exception(error)))
    place = traceback.extract_tb(error.__traceback__)[-1]
    what = (
        f"{type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}:{place.lineno})"
    )
    return f"onewan: a defect of onewan, please report it with the file {name}: {what}"
