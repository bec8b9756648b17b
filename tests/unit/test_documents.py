"""Text files of people: which encodings are read, and what is said about the others."""

from __future__ import annotations

import codecs

import pytest

from onewan.documents import decode_text, decode_text_or_cp1252

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


@pytest.mark.parametrize(
    "text",
    [
        "café",
        "Ein Mädchen läuft über die Straße \u2013 schnell",
        "l\u2019été, une créée",
        "50 % of 80 €",
        "¿Qué?",
    ],
)
def test_windows_1252_is_recognized(text: str) -> None:
    assert decode_text_or_cp1252(text.encode("cp1252")) == (text, True)


@pytest.mark.parametrize(
    "data",
    [
        "кот бежит".encode("cp1251"),
        "猫が走る".encode("shift-jis"),
        "一只小猫在跑".encode("gbk"),
        "żółw".encode("cp1250"),
        "γάτα".encode("cp1253"),
        "café and ".encode() + b"caf\xe9",  # UTF-8 with a broken byte
        b"caf\xe9\x00",
        b"\x81\x8d\x8f",
        bytes(range(256)),
    ],
)
def test_what_is_not_clearly_windows_1252_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        decode_text_or_cp1252(data)


def test_utf_8_is_read_as_that() -> None:
    assert decode_text_or_cp1252("café".encode()) == ("café", False)
