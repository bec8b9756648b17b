"""Text files of people: which encodings are read, and what is said about the others."""

from __future__ import annotations

import codecs

import pytest

from onewan.documents import decode_text

TEXT = "a fox \u00e9 \u65e5\u672c\r\nand a dog\n"


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        codecs.BOM_UTF8 + TEXT.encode(),
        codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    ],
)
def test_utf_8_and_what_a_byte_order_mark_names_are_read(data: bytes) -> None:
    assert decode_text(data) == TEXT


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (
            "caf\u00e9".encode("cp1252"),
            "is not UTF-8 text (byte 3, in Windows-1252 '\u00e9'); save it as UTF-8",
        ),
        (b"a\x81b", "is not UTF-8 text (byte 1); save it as UTF-8"),
        (
            codecs.BOM_UTF16_LE + b"a\0b",
            "is not UTF-16 text (byte 4), which its byte order mark says; save it as UTF-8",
        ),
        (
            "a\nfox".encode("utf-16-le"),
            "contains the character NUL (line 1), as UTF-16 without a byte order mark does; "
            "save it as UTF-8",
        ),
    ],
)
def test_other_encodings_are_refused_with_the_place(data: bytes, problem: str) -> None:
    with pytest.raises(ValueError) as raised:
        decode_text(data)
    assert str(raised.value) == problem
