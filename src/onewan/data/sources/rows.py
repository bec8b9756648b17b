"""Tables in files: csv, tsv, jsonl and parquet -> rows of values with the place of each.

Knows no columns: what they mean is the business of `table`. Nothing in a table is ever run as code.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast

from onewan.documents import decode_text_or_cp1252
from onewan.errors import DataError
from onewan.files import check_input, read_input

TABLE_SUFFIXES = frozenset({"csv", "tsv", "jsonl", "ndjson", "parquet"})
"""Extensions of tables, lower case, without the dot."""

_MAX_BYTES = 1 << 30
_LONGEST_VALUE = 1 << 20
"""Characters; as much as a caption file may have."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table."""

    number: int
    """The line that it begins at, from 1; its own number in a file that is no text."""
    values: dict[str, Any]
    """By column; null and what a row does not have are left out."""
    is_line: bool = True
    """Whether the file is a text."""

    @property
    def place(self) -> str:
        """For messages: "line 5", or "row 5" of a file that is no text."""
        return f"{'line' if self.is_line else 'row'} {self.number}"


@dataclass(slots=True)
class Rows:
    """The rows of a table, and those that can't be read."""

    rows: list[Row] = field(default_factory=list[Row])
    wrong: list[str] = field(default_factory=list[str])
    """A line for each row that can't be read, which begins with its place."""
    is_cp1252: bool = False
    """Whether the file was read as Windows-1252, as some spreadsheet programs write csv."""
    columns: list[str] = field(default_factory=list[str])
    """Of csv and tsv, in their order."""
    delimiter: str | None = None
    """Between the values of csv and tsv."""

    @property
    def has_decimal_commas(self) -> bool:
        """Whether numbers may have a comma as decimal sign: the separator is a semicolon."""
        return self.delimiter == ";"


def read_rows(file: Path) -> Rows:
    """The rows of the table in `file`, by its extension. DataError, which names it, if it can't be
    read at all."""
    kind = file.suffix.lower().removeprefix(".")
    try:
        if kind == "parquet":
            return _parquet_rows(check_input(file))
        text, is_cp1252 = decode_text_or_cp1252(read_input(file, _MAX_BYTES))
    except OSError as error:
        raise DataError(f"{file}: can't be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{file}: {error}") from error
    found = parse_rows(file, text)
    found.is_cp1252 = is_cp1252
    return found


def parse_rows(file: Path, text: str) -> Rows:
    """The rows in the `text` of `file`, by its extension, which is not that of parquet. DataError,
    which names the file, if it can't be read at all."""
    kind = file.suffix.lower().removeprefix(".")
    try:
        if kind in ("jsonl", "ndjson"):
            return _json_rows(text)
        return _csv_rows(text, "\t" if kind == "tsv" else None)
    except (ValueError, csv.Error) as error:
        raise DataError(f"{file}: {error}") from error


def _csv_rows(text: str, delimiter: str | None) -> Rows:
    lines = text.splitlines(keepends=True) if "\n" not in text else text.split("\n")
    header = lines[0] if lines else ""
    if delimiter is None:
        # A spreadsheet program writes semicolons where the decimal sign is a comma.
        delimiter = ";" if ";" in header and "," not in header else ","
    reader = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, strict=True)
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_VALUE))
    columns = [column.strip() for column in next(reader, [])]
    if twice := sorted({c for c in columns if c and columns.count(c) > 1}):
        raise ValueError(f"line 1: has the column {', '.join(twice)} twice; rename one")
    found = Rows(columns=columns, delimiter=delimiter)
    for number, values in _numbered(reader):
        if not any(value.strip() for value in values):
            continue
        if len(values) != len(columns):
            found.wrong.append(
                f"line {number}: has {len(values)} values, and the header {len(columns)} columns; "
                'put a value that contains the separator into "quotes"'
            )
            continue
        named = {c: v.strip() for c, v in zip(columns, values, strict=True) if c}
        found.rows.append(Row(number, named))
    return found


def _numbered(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """The rows of a csv reader with the line that each begins at."""
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # A quotation mark that is not closed takes all that follows, so there is no next row.
            raise ValueError(f"line {first}: is no valid csv ({error})") from None
        yield first, row


def _json_rows(text: str) -> Rows:
    found = Rows()
    # Not `splitlines`, which also splits within texts, such as at U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            found.wrong.append(f"line {number}: is no valid JSON ({reason})")
            continue
        if not isinstance(values, dict):
            found.wrong.append(f"line {number}: is no JSON object; write {{...}} in each line")
            continue
        named = {k: v for k, v in cast("dict[str, Any]", values).items() if v is not None}
        found.rows.append(Row(number, named))
    return found


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _parquet_rows(file: Path) -> Rows:
    try:
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(
            f'{file}: reading parquet needs pyarrow; pip install "onewan[tables]"'
        ) from None
    import pyarrow  # pyright: ignore[reportMissingImports]

    found = Rows()
    try:
        with parquet.ParquetFile(file) as opened:
            # Files of the Hugging Face hub may hold the media themselves, which are not read.
            names = [f.name for f in opened.schema_arrow if not pyarrow.types.is_struct(f.type)]
            number = 0
            for batch in opened.iter_batches(columns=names):
                for values in cast("list[dict[str, Any]]", batch.to_pylist()):
                    number += 1
                    named = {k: v for k, v in values.items() if not _is_null(v)}
                    found.rows.append(Row(number, named, is_line=False))
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}: can't be read as parquet ({error})") from error
    return found


def _is_null(value: object) -> bool:
    # pandas writes a missing text as null, and a missing number as NaN.
    return value is None or (isinstance(value, float) and math.isnan(value))
