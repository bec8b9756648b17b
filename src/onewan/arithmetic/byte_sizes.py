"""Amounts of memory as text: "24GB" to bytes, and bytes to "24.0 GB"."""

from __future__ import annotations

import re

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
AMOUNT = r"^ *([0-9]{1,15}(?:\.[0-9]{1,9})?) ?((?:[kmgtKMGT][iI]?)?[bB]) *$"
"""Regular expression of an amount: the number and the unit."""


def parse_bytes(text: str) -> int:
    """Bytes of an amount such as "24GB" (decimal), "24GiB" (binary) or "0.5 GB"; ValueError if
    `text` is none, or less than a byte."""
    found = re.search(AMOUNT, text)
    unit = found and _UNITS.get(found[2].upper())
    if not found or not unit:
        raise ValueError(f"must be an amount of memory such as 24GB or 24GiB, got {text!r}")
    amount = int(float(found[1]) * unit)
    if amount < 1:
        raise ValueError(f"must be an amount of memory above 0, such as 24GB, got {text!r}")
    return amount


def as_byte_size(value: str) -> str:
    """`value` itself, for the schema; ValueError if it is no amount of memory."""
    parse_bytes(value)
    return value


def format_bytes(amount: float) -> str:
    """`amount` bytes in GB with one digit after the point; MB or kB below 0.1 GB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(amount) >= 0.1 * size:
            return f"{amount / size:.1f} {unit}"
    return f"{amount:.0f} B"
