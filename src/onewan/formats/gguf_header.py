"""Reads the header of a GGUF file: its key-value pairs, and where each tensor is.

The reader of the `gguf` package keeps every element of every array as an object of its own, which
takes 10 s for the vocabulary of a text encoder and has no bound for a hostile file. Here long
arrays are skipped, and every count is checked against the file's size before it is used. Types and
sizes of blocks come from the package, and so does dequantizing.

Source: the specification of GGUF (``docs/gguf.md`` of ggml), versions 2 and 3, little-endian.
"""

from __future__ import annotations

import json
import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""Codes of `struct` by the number of a value's type."""
_STRING, _ARRAY = 8, 9

_MOST_TENSORS = 100_000
_MOST_STRINGS = 2_000_000
"""Of a file's arrays together. UMT5's vocabulary has 256,384."""
_MOST_TEXT = 64 << 20
"""Bytes of the names and strings of a header together, but for those in long arrays."""
_LONGEST_SHOWN_ARRAY = 64
_MOST_AXES = 8


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor as the header describes it."""

    shape: tuple[int, ...]
    """In PyTorch's order; that of the values, not of the packed bytes."""
    type: str
    """GGUF's name of the type, such as ``Q8_0``."""
    offset: int
    """Of its first byte in the file."""
    bytes: int


class GgufHeader:
    """The header of the file at `path`; ValueError says what is wrong with it."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            self._data: Any = data
            self._size = len(data)
            self._position = 4  # after the magic number
            self._strings = self._text = 0
            version = self._scalar("I")
            if version not in (2, 3):
                raise ValueError(f"its version is {version}, and only 2 and 3 are supported")
            num_tensors, num_pairs = self._scalar("Q"), self._scalar("Q")
            if num_tensors > _MOST_TENSORS or num_pairs > _MOST_TENSORS:
                raise ValueError(f"its header counts {num_tensors} tensors and {num_pairs} entries")
            self.metadata: dict[str, str] = {}
            """Key-value pairs as text: arrays as JSON, long ones as their number of elements."""
            for _ in range(num_pairs):
                name = self._string()
                self.metadata[name] = self._value(self._scalar("I"))
            self.tensors = self._tensors(num_tensors)
            del self._data

    def _tensors(self, count: int) -> dict[str, GgufTensor]:
        described: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name, axes = self._string(), self._scalar("I")
            if name in described or axes > _MOST_AXES:
                raise ValueError(f"{name!r} is described twice, or has {axes} axes")
            sides = self._unpack(f"{axes}Q")
            # GGUF lists the fastest axis first.
            described[name] = tuple(sides[::-1]), self._scalar("I"), self._scalar("Q")
        alignment = self.metadata.get("general.alignment", "32")
        if not alignment.isdecimal() or len(alignment) > 6 or not int(alignment):
            raise ValueError(f"general.alignment is {alignment[:20]}")
        start = self._position + -self._position % int(alignment)
        return {
            name: self._tensor(name, shape, type_number, start + offset)
            for name, (shape, type_number, offset) in described.items()
        }

    def _tensor(
        self, name: str, shape: tuple[int, ...], type_number: int, offset: int
    ) -> GgufTensor:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            type_ = GGMLQuantizationType(type_number)
            block, block_bytes = GGML_QUANT_SIZES[type_]
        except (ValueError, KeyError):
            raise ValueError(f"{name!r} has the unknown type {type_number}") from None
        if (shape[-1] if shape else 1) % block:
            raise ValueError(f"{name!r} is {list(shape)}, not in blocks of {block}")
        length = prod(shape) // block * block_bytes
        if offset + length > self._size:
            raise ValueError(
                f"{name!r} should end at byte {offset + length}, and the file has {self._size}"
            )
        return GgufTensor(shape, type_.name, offset, length)

    # -------------------------------------------------------------------------------- values

    def _unpack(self, codes: str) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{codes}")
        start = self._advance(layout.size)
        return layout.unpack_from(self._data, start)

    def _advance(self, count: int) -> int:
        """Skip `count` bytes; returns the position before."""
        start, self._position = self._position, self._position + count
        if self._position > self._size:
            raise ValueError(f"its header points to byte {self._position} of {self._size}")
        return start

    def _scalar(self, code: str) -> Any:
        return self._unpack(code)[0]

    def _string(self) -> str:
        length = self._scalar("Q")
        self._text += length
        if self._text > _MOST_TEXT:
            raise ValueError(f"its header has strings of {self._text} bytes")
        start = self._advance(length)
        return self._data[start : start + length].decode("utf-8")

    def _value(self, kind: int) -> str:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise ValueError(f"its header has a value of the unknown type {kind}")
        return json.dumps(self._scalar(_SCALARS[kind]))

    def _skip_strings(self, count: int) -> None:
        length_at, position = struct.Struct("<Q").unpack_from, self._position
        for _ in range(count):  # up to millions, so without calls of methods
            position += 8 + length_at(self._data, position)[0]
            if position > self._size:
                break
        self._position = position
        self._advance(0)

    def _array(self) -> str:
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind in _SCALARS:
            code = _SCALARS[kind]
            if count <= _LONGEST_SHOWN_ARRAY:
                return json.dumps(self._unpack(f"{count}{code}"))
            self._advance(count * struct.calcsize(f"<{code}"))
        elif kind == _STRING:
            self._strings += count
            if self._strings > _MOST_STRINGS:
                raise ValueError(f"its header has arrays of {self._strings} strings")
            if count <= _LONGEST_SHOWN_ARRAY:
                return json.dumps([self._string() for _ in range(count)], ensure_ascii=False)
            self._skip_strings(count)
        else:
            raise ValueError(f"its header has an array of the unsupported type {kind}")
        return f"{count} values"
