"""JSON, names and messages of files of unknown origin, read and shown within bounds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from onewan.errors import CheckpointError
from onewan.files import read_input

_LARGEST_JSON = 32 << 20
"""Bytes. The largest JSON file of a Wan model, the tokenizer's, has 17 MB."""

_MAX_LENGTH = 100
"""Characters of a name that a message shows."""


def parse_json(text: str) -> Any:
    """The data in a JSON text of a file from elsewhere. ValueError if it is not JSON, is nested too
    deep, or holds a number that is not finite (``NaN``, ``1e999``)."""

    def number(text: str) -> float:
        if not isfinite(value := float(text)):
            raise ValueError(f"it holds {text[:40]}, which is not a finite number")
        return value

    try:
        return json.loads(text, parse_float=number, parse_constant=number)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model; CheckpointError if there is none."""
    try:
        data = parse_json(read_input(path, _LARGEST_JSON).decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: is missing; the model's folder is incomplete, download it again"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: is not readable JSON ({error}); download it again"
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{path}: holds a {type(data).__name__}, not a JSON object; download it again"
        )
    return data


def named(names: Sequence[str], separator: str = ", ") -> str:
    """The first three of `names`, shortened, with an ellipsis if there are more."""
    first = [n if len(n) <= _MAX_LENGTH else f"{n[:_MAX_LENGTH]}..." for n in names[:3]]
    return separator.join(first) + (f"{separator}..." if len(names) > 3 else "")


def first_line(error: BaseException) -> str:
    """The first line of a library's error message, at most 200 characters, to quote in ours; of a
    system's error without its number and the path, which our message names."""
    system = error.strerror if isinstance(error, OSError) else None
    text = system or str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
