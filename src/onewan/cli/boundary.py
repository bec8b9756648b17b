"""The boundary between the commands and the user: what leaves a command becomes an exit status."""

from __future__ import annotations

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
        sys.stdout.flush()
    except OnewanError as error:
        print(f"onewan: {error}", file=sys.stderr)
        return 1
    except (Interrupted, KeyboardInterrupt):
        print("onewan: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has exited (`onewan schema | head`). Without this, Python would
        # complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001  (the process boundary: nobody else reports it)
        print(_defect(error), file=sys.stderr)
        return DEFECT_STATUS
    return status


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
