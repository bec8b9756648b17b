"""One boundary to the libraries that parse media: their exceptions become `DataError`."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from av.error import FFmpegError, InvalidDataError
from PIL import Image, UnidentifiedImageError

from onewan.documents import shortened
from onewan.errors import DataError, OnewanError

DAMAGE_REMEDY = "copy or download it again, or take it out"
"""What the user can do about a damaged file, as the end of a message."""

_LITTLE = 16
"""Bytes that no video or image has fewer than."""
_TEXT_BYTES = 512
"""Bytes at the beginning of a file that are examined to recognize a text file."""


@contextmanager
def faults_of(path: Path, kind: str) -> Iterator[None]:
    """Whatever a library raises while it reads `path` becomes a `DataError` that names the file.

    `kind` is what the file should be: "video" or "image". On damaged or hostile files PyAV and
    Pillow raise nearly every class of exception, not only their own: of the standard library's
    `struct.error`, `MemoryError`, `UnicodeDecodeError`, `AttributeError` and `ZeroDivisionError`
    have been seen. So nothing but a list of clips that can't be used may depend on the class.
    """
    try:
        yield
    except OnewanError:
        raise
    except Exception as error:  # any of them, see above; the cause is kept
        raise DataError(f"{path}: {_reason(path, kind, error)}") from error


def error_reason(error: Exception) -> str:
    """The error in one line, without the path and the error number that FFmpeg adds."""
    text = error.strerror if isinstance(error, OSError | FFmpegError) else None
    lines = (text or str(error)).splitlines()
    # A message alone, such as "4", says nothing if the class is not one that reports damage.
    expected = isinstance(error, OSError | FFmpegError | SyntaxError | EOFError)
    if not lines or not expected:
        return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return lines[0]


def _reason(path: Path, kind: str, error: Exception) -> str:
    """What is wrong with `path` and what to do, without the path."""
    if isinstance(error, PermissionError):
        return f"can't be opened ({error_reason(error)}); allow reading it, or take it out"
    if isinstance(error, MemoryError):
        return (
            f"needs more memory than there is to read this {kind}; make it smaller, or take it out"
        )
    if isinstance(error, Image.DecompressionBombError):
        # Pillow's message has their number.
        found = re.search(r"\((\d+) pixels\)", str(error))
        claimed = f" ({int(found[1]) / 1e6:,.0f} million)" if found else ""
        return f"claims more pixels than any image has{claimed}; {DAMAGE_REMEDY}"
    if isinstance(error, UnidentifiedImageError):  # its message is only the path
        why = _not_media(path)
        return f"is not an image that can be read{f' ({why})' if why else ''}; {DAMAGE_REMEDY}"
    if isinstance(error, InvalidDataError) and kind == "video" and _is_mp4(path):
        return (
            "begins as an MP4 or MOV, but its index (moov) is missing or damaged: it is truncated; "
            + DAMAGE_REMEDY
        )
    what = "a video that FFmpeg can read" if kind == "video" else "an image that can be read"
    return f"is not {what} ({_not_media(path) or error_reason(error)}); {DAMAGE_REMEDY}"


def _not_media(path: Path) -> str | None:
    """What the file is, if it is certainly neither a video nor an image; else None."""
    try:
        with path.open("rb") as file:
            begin = file.read(_TEXT_BYTES)
    except OSError:
        return None
    if len(begin) < _LITTLE:
        return f"it has only {len(begin)} byte{'' if len(begin) == 1 else 's'}"
    try:
        # Incremental, since the last character may be cut.
        text = codecs.getincrementaldecoder("utf-8")().decode(begin)
    except UnicodeDecodeError:
        return None
    is_text = all(letter.isprintable() or letter.isspace() for letter in text)
    return f"it is a text: '{shortened(' '.join(text.split()))}'" if is_text else None


def _is_mp4(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8)[4:] == b"ftyp"
