"""The boundary between the commands and the user: what leaves a command becomes a line on stderr
and an exit status.

What the user can fix, such as a full disk, is one line that names the file and the remedy.
Everything else is a defect of onewan: its traceback is in a file, which the line names.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from onewan.cli.output import complain, drop_unwritable, stdout
from onewan.errors import Interrupted, OnewanError
from onewan.files import IS_WINDOWS

DEFECT_STATUS = 70
"""Exit status after an error that is a defect of onewan: EX_SOFTWARE of sysexits.h."""

_PERMISSION = "permission denied; choose another place, or change the permissions"
_SYSTEM_ERRORS: Mapping[int, str] = {
    errno.ENOSPC: "there is no space left on the disk; free some, or choose another disk",
    errno.EDQUOT: "the quota of the disk is used up; free some space, or choose another disk",
    errno.EFBIG: "is larger than the disk or the process may have (ulimit -f); choose another disk",
    errno.EROFS: "is on a disk that is read-only; choose another place",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.ENOENT: "there is no such file or folder; correct the path",
    errno.ENOTDIR: "is not in a folder, since a part of the path is a file; correct the path",
    errno.EISDIR: "is a folder where a file is needed; correct the path",
    errno.EEXIST: "exists already, as a file where a folder is needed or the reverse; move it away",
    errno.ENOTEMPTY: "is a folder that is not empty; move it away",
    errno.ENAMETOOLONG: "the path is too long; choose a shorter one",
    errno.ELOOP: "is a symbolic link to itself, or one of too many links; correct the link",
    errno.EXDEV: "is on another disk than its folder; choose another place",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this system; close other programs",
    errno.EIO: "the disk reports an error (I/O error); check the disk and its connection",
    errno.EBUSY: "is used by another program; close that",
    errno.ETXTBSY: "is used by another program; close that",
    errno.ENXIO: "is a device or a FIFO that nobody serves; give a file",
    errno.ENODEV: "is a device that is not there; give a file",
    getattr(errno, "ESTALE", -1): "is on a network disk that was disconnected; mount it again",
}
_HELD_ON_WINDOWS = (32, 33)
"""Windows' ERROR_SHARING_VIOLATION and ERROR_LOCK_VIOLATION, which Python gives as EACCES."""
_LONGEST_PATH = 260
"""Characters of a path on Windows, unless it is set to allow longer ones."""
_TOO_LONG = (
    f"the path has {_LONGEST_PATH} characters or more, which Windows does not find; choose shorter "
    "folders, or let Windows have long paths (LongPathsEnabled in its registry)"
)
_MEMORY = (
    "close other programs, or use less: smaller or fewer frames (video_data.resolution, "
    "wan_config.max_frames), a batch of 1, memory.gradient_checkpointing"
)
_DEVICE_MEMORY = (
    "let `onewan plan RUN.yaml` say what fits, and change the memory section: fewer "
    "memory.resident_blocks, memory.offload_inputs: true, memory.keep_attention: no, more "
    "memory.feed_forward_chunks, memory.weights: fp8 or nf4 (memory.vram is a limit that you may "
    "have set); or use smaller or fewer frames (video_data.resolution, wan_config.max_frames) and "
    "a batch of 1"
)
_TEMPORARY = re.compile(r"\.(?:tmp|replaced)-[0-9a-f]{8}-[0-9]+-[0-9a-f]{8}-")


def guarded(command: Callable[[], int]) -> int:
    """Run `command`; returns its exit status, or that of the error which left it."""
    try:
        status = command()
        # Here and not at Python's exit, where an error could only be printed.
        with stdout() as file:
            file.flush()
    except Interrupted:  # the progress display has shown what was saved
        return 130
    except KeyboardInterrupt:
        complain("onewan: stopped")
        return 130
    except BrokenPipeError:  # the reader of the output has exited: `onewan schema | head`
        return 1
    except OnewanError as error:
        for line in (f"onewan: {error.message}", *(f"  {line}" for line in error.details)):
            complain(_TEMPORARY.sub("", line))  # a file is known to the user by its final name
        return 1
    except Exception as error:  # noqa: BLE001  (the process boundary: nobody else reports it)
        if (line := fixable_line(error)) is not None:
            complain(f"onewan: {line}{_log_of(error)}")
            return 1
        complain(f"onewan: {_defect(error)}")
        return DEFECT_STATUS
    finally:
        drop_unwritable()
    return status


def fixable_line(error: BaseException) -> str | None:
    """The line about an error that the system, a library or the memory of a machine caused and the
    user can fix; None if it is a defect."""
    for cause in _chain(error):
        if (line := _memory_line(cause)) is not None:
            return line
        if (text := _system_error(cause)) is not None:
            name = _file_of(error)
            return f"{name}: {text}" if name else text
    return None


def _system_error(error: BaseException) -> str | None:
    """What is wrong and what to do, if this is an error of the operating system."""
    number = None
    if isinstance(error, OSError):
        if str(error.strerror).startswith(("is ", "has ")):  # of `onewan.files.check_input`
            return f"{error.strerror}; correct the path"
        number = error.errno
        if getattr(error, "winerror", None) in _HELD_ON_WINDOWS:
            number = errno.EBUSY
        # Windows says of a path that is too long that it does not exist.
        if IS_WINDOWS and number == errno.ENOENT and len(str(error.filename)) >= _LONGEST_PATH:
            return _TOO_LONG
    # Some libraries raise errors of their own class, with the system's number in the message.
    elif found := re.search(r"\(os error ([0-9]+)\)", str(error)):
        number = int(found[1])
    if number is None:
        return None
    return _SYSTEM_ERRORS.get(number, f"{os.strerror(number)}; check the file and its disk")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, its cause, the cause of that, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _file_of(error: BaseException) -> str | None:
    """The file that the error is about, under its final name."""
    for cause in _chain(error):
        if isinstance(cause, OSError) and isinstance(cause.filename, str | bytes | os.PathLike):
            return _TEMPORARY.sub("", os.fsdecode(cause.filename))
    return None


def _memory_line(error: BaseException) -> str | None:
    # Without torch's classes, which a command without torch must not wait for.
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or "HIP out of memory" in text:
        return f"not enough memory on the device ({text.splitlines()[0][:200]}); {_DEVICE_MEMORY}"
    memory = isinstance(error, MemoryError) or "can't allocate memory" in text
    if memory or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return f"not enough memory; {_MEMORY}"
    return None


def _log_of(error: BaseException) -> str:
    log = vars(error).get("log_file")
    return "" if log is None else f" (details are in {log})"


def _defect(error: Exception) -> str:
    """The line about a defect. Its traceback is in the log of the run, or is written to a file."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    what = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
    log = vars(error).get("log_file")
    try:
        if log is None:
            handle, log = tempfile.mkstemp(prefix="onewan-error-", suffix=".txt")
            with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write("".join(traceback.format_exception(error)))
    except OSError:
        log = "no file, since none can be written"
    return (
        f"this is a defect of onewan, not of your settings or files: {what}: {str(error)[:300]}; "
        f"please report it, with the command and the traceback, which is in {log}"
    )
