"""Changing captions in tables: only the bytes of the cells that change are others afterwards.

csv, tsv and jsonl are changed as text, so that quoting, the order of columns, line breaks and
numbers stay as the program wrote them that made the table; what comes out is parsed again and
compared before anyone writes it. parquet is not changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from onewan.data.sources.item import CaptionCell
from onewan.data.sources.rows import Row, parse_rows
from onewan.data.sources.table import CAPTIONS, captions_of
from onewan.errors import DataError

EDITED_TABLES = frozenset({"csv", "tsv", "jsonl", "ndjson"})
"""Extensions of the tables whose captions can be changed here, lower case, without the dot."""


@dataclass(frozen=True, slots=True)
class TableText:
    """The text of a table, and its rows."""

    file: Path
    text: str
    rows: Mapping[int, Row]
    """By number."""
    columns: list[str]
    """Of a csv or tsv file."""
    delimiter: str | None
    """Of a csv or tsv file; None for jsonl."""

    @staticmethod
    def of(file: Path, text: str) -> TableText:
        """Of the `text` of `file`; DataError, which names it, if it is no table."""
        found = parse_rows(file, text)
        rows = {row.number: row for row in found.rows}
        return TableText(file, text, rows, found.columns, found.delimiter)

    def find(self, cell: CaptionCell, identity: str) -> CaptionCell:
        """`cell` where it is now: other rows may have been added or taken out before it. DataError
        if its row, all of which but its captions is `identity`, is not there any more, or twice."""
        own = self.rows.get(cell.number)
        if own is not None and row_identity(own) == identity:
            return cell
        same = [row.number for row in self.rows.values() if row_identity(row) == identity]
        if len(same) == 1:
            return replace(cell, number=same[0])
        raise DataError(
            f"{self.file}: its row {cell.number} is another one now, since the table was changed "
            "by another program; load the data again"
        )

    def caption(self, cell: CaptionCell) -> str:
        """The captions in `cell`, one a line; DataError if they can't be read."""
        row = self.rows.get(cell.number)
        try:
            if row is None:
                raise ValueError("is gone; load the data again")
            text = "\n".join(captions_of(row.values.get(cell.column, "")))
            text.encode()
        except UnicodeEncodeError:
            reason = "has a part of a character; write it again with the program that wrote it"
            raise DataError(f"{self.file}: row {cell.number} {reason}") from None
        except ValueError as error:
            raise DataError(f"{self.file}: {cell.column} of row {cell.number} {error}") from None
        return text

    def changed(self, captions: Mapping[CaptionCell, str]) -> str:
        """The text with other captions, one a line, in some cells, at most one of a row; DataError
        if that can't be done without changing anything else."""
        cells = {cell.number: cell for cell in captions}
        values = {cell.number: _value(text, self.delimiter) for cell, text in captions.items()}
        pieces, position = list[str](), 0
        for number, (start, end) in self._spans(cells):
            pieces += [self.text[position:start], self._written(values[number], start)]
            position = end
        text = "".join([*pieces, self.text[position:]])
        # The surest way to know that nothing else has changed.
        wanted = [
            {**row.values, cells[number].column: values[number]} if number in cells else row.values
            for number, row in self.rows.items()
        ]
        if [row.values for row in parse_rows(self.file, text).rows] != wanted:
            raise DataError(
                f"{self.file}: the caption can't be put into this table without changing other "
                "cells; edit it with the program that wrote it"
            )
        return text

    def _written(self, value: str | list[str], start: int) -> str:
        """`value` as it is written into the cell that begins at `start`."""
        if self.delimiter is None:
            # Letters beyond ASCII as the rest of the file has them.
            return json.dumps(value, ensure_ascii=self.text.isascii() and "\\u" in self.text)
        assert isinstance(value, str)
        plain = not any(sign in value for sign in (self.delimiter, '"', "\n", "\r"))
        was_quoted = self.text.startswith('"', start)
        return value if plain and not was_quoted else '"' + value.replace('"', '""') + '"'

    def _spans(self, cells: Mapping[int, CaptionCell]) -> Iterator[tuple[int, tuple[int, int]]]:
        """Where in the text `cells` are, by the number of their row, in its order."""
        if self.delimiter is None:
            start = 0
            for number, line in enumerate(self.text.split("\n"), start=1):
                if number in cells:
                    yield number, _json_span(line, cells[number].column, start)
                start += len(line) + 1
            return
        for number, spans in _csv_cells(self.text, self.delimiter):
            if number in cells:
                column = self.columns.index(cells[number].column)
                yield number, spans[column] if column < len(spans) else spans[-1]


def row_identity(row: Row) -> str:
    """What tells a row from others of its table: all but its captions."""
    rest = {name: value for name, value in row.values.items() if name not in CAPTIONS}
    return json.dumps(rest, sort_keys=True)


def _value(text: str, delimiter: str | None) -> str | list[str]:
    """Captions, one a line, as the value of a cell: one as a text, several as a list."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if len(lines) <= 1 and not text.lstrip().startswith("["):
        return lines[0] if lines else ""
    return lines if delimiter is None else json.dumps(lines, ensure_ascii=False)


def _csv_cells(text: str, delimiter: str) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """The places of the cells of each row, with the line that it begins at."""
    pattern = re.compile(rf'"(?:[^"]|"")*"|[^{re.escape(delimiter)}\r\n]*')
    line_break = "\n" if "\n" in text else "\r"
    position, line = 0, 1
    while position < len(text):
        first, cells = line, list[tuple[int, int]]()
        while True:
            found = pattern.match(text, position)
            assert found is not None  # it matches nothing, too
            cells.append(found.span())
            line += found[0].count(line_break)
            position = found.end()
            if not text.startswith(delimiter, position):
                break
            position += 1
        yield first, cells
        # Here is a line break, or something that no csv has here, as `changed` will find.
        position += 2 if text.startswith("\r\n", position) else 1
        line += 1


def _json_span(line: str, column: str, start: int) -> tuple[int, int]:
    """Where the value of `column` is in a line with a JSON object, which begins at `start`."""
    decoder = json.JSONDecoder()
    whole = json.loads(line)
    for match in re.finditer(rf"{re.escape(json.dumps(column))}\s*:\s*", line):
        try:
            _, end = decoder.raw_decode(line, match.end())
            marked = json.loads(f"{line[: match.end()]}null{line[end:]}")
        except ValueError:  # within another text
            continue
        if marked == {**whole, column: None}:
            return start + match.end(), start + end
    raise DataError(f"the column {column} is not where it is looked for")
