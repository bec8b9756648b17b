"""Whether a video file is cut off, by the sizes that its own container records.

Demuxers read as far as a file goes, so a download that has stopped passes as a shorter clip. MP4,
MOV, Matroska (WebM) and AVI record how long the file or its last part is, and a GIF consists of
blocks of known sizes. Other containers, such as MPEG-TS, are streams that may end anywhere. Only
the headers of the parts are read, so the time does not depend on the length of the file, except
for a GIF.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_EBML, _SEGMENT = 0x1A45DFA3, 0x18538067
_SLACK = 16
"""Bytes that may be missing: some writers count the header of a chunk or its padding twice."""

_MP4_FIRST_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"})


def cut_off_reason(path: Path) -> str | None:
    """How the file is incomplete, such as "is cut off: ..."; None if nothing shows that it is."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(12)
        if start.startswith(b"GIF8"):
            return None if _gif_is_complete(file, size) else "is cut off: it ends within a frame"
        if start[:4] == b"RIFF" and start[8:11] == b"AVI":
            ends = _riff_ends(file, size)
        elif int.from_bytes(start[:4], "big") == _EBML:
            ends = _matroska_ends(file)
        elif start[4:8] in _MP4_FIRST_BOXES:
            ends = _mp4_ends(file, size)
        else:
            return None
        promised = max(ends, default=0)
    if promised <= size + _SLACK:
        return None
    return f"is cut off: its header promises {promised} bytes and it has {size}"


def _mp4_ends(file: BinaryIO, size: int) -> Iterator[int]:
    """The end of each top-level box, up to the first that is not one of the usual names."""
    position = 0
    while position < size:
        file.seek(position)
        header = file.read(16)
        length, name = int.from_bytes(header[:4], "big"), header[4:8]
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        # 0 is a box up to the end of the file. Cameras write data of their own behind the last box.
        if length < 8 or not name.isalpha():
            return
        if name in {b"mdat", b"moov", b"moof"}:
            yield position + length
        position += length


def _riff_ends(file: BinaryIO, size: int) -> Iterator[int]:
    """The end of each RIFF chunk; an AVI beyond 1 GB has several."""
    position = 0
    while position < size:
        file.seek(position)
        header = file.read(8)
        length = int.from_bytes(header[4:], "little")
        # 0 and the largest numbers stand for "unknown" in a file that was written as a stream.
        if header[:4] != b"RIFF" or not 0 < length < 0xFFFFFF00:
            return
        yield position + 8 + length
        position += 8 + length + length % 2


def _matroska_ends(file: BinaryIO) -> Iterator[int]:
    """The end of the segment, which holds all of the content."""
    file.seek(4)
    header_length = _ebml_length(file)
    if header_length is None:
        return
    file.seek(header_length, os.SEEK_CUR)
    if int.from_bytes(file.read(4), "big") == _SEGMENT and (length := _ebml_length(file)):
        yield file.tell() + length


def _ebml_length(file: BinaryIO) -> int | None:
    """The length of an element, after its identifier; None if it is unknown, as in a stream."""
    first = file.read(1)
    # The number of leading zero bits is the number of bytes that follow.
    count = 8 - first[0].bit_length() if first else 8
    rest = file.read(count)
    if count > 7 or len(rest) < count:
        return None
    value = int.from_bytes(bytes([first[0] & (0x7F >> count)]) + rest, "big")
    return None if value == (1 << 7 * (count + 1)) - 1 else value


def _gif_is_complete(file: BinaryIO, size: int) -> bool:
    """Whether no block of a GIF reaches beyond its end. The mark at the end may be missing."""
    file.seek(10)
    _skip_color_table(file, file.read(3)[:1])
    while kind := file.read(1):
        if kind == b"\x21":  # an extension: a label and blocks
            file.seek(1, os.SEEK_CUR)
        elif kind == b"\x2c":  # a picture: position, size, flags, color table, code size, blocks
            _skip_color_table(file, file.read(9)[8:])
            file.seek(1, os.SEEK_CUR)
        else:  # the mark at the end, or bytes that are no block, which the decoder judges
            return True
        while length := file.read(1):
            if length == b"\0":
                break
            file.seek(length[0], os.SEEK_CUR)
        else:
            return False
    return file.tell() <= size


def _skip_color_table(file: BinaryIO, flags: bytes) -> None:
    if flags and flags[0] & 0x80:
        file.seek(3 << (flags[0] & 7) + 1, os.SEEK_CUR)
