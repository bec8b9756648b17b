"""A table of clips: each row names a media file and says what else is known about it.

Hides what the columns mean and which programs call them what: Hugging Face's ``file_name`` and
``text``, musubi-tuner's ``video_path``, DiffSynth's ``video`` and ``prompt``, and data-juicer's
samples, in which special tokens say what text belongs to which of several files
(``data_juicer/utils/mm_utils.py``, ``docs/DJ_format``).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from onewan.data.conditions import ConditionChoice
from onewan.data.report import ClipProblem, ClipWarning
from onewan.data.sources.contents import SourceContents
from onewan.data.sources.folder import unusable_reason
from onewan.data.sources.item import CaptionCell, SourceItem, Split
from onewan.data.sources.place import Place, clip_name, first_few
from onewan.data.sources.rows import Row, read_rows
from onewan.documents import format_value
from onewan.errors import DataError
from onewan.media import IMAGE_SUFFIXES, extension

PATHS = ("path", "file_name", "video_path", "image_path", "video", "image", "file")
"""Columns that name the media file; of several, the first one counts."""
CAPTIONS = ("captions", "caption", "text", "prompt")
"""Columns with the caption, or with several."""
_JUICER = ("videos", "images")
"""data-juicer's columns, each a list of files."""
_NUMBERS = ("start", "end", "weight", "repeats")
_OTHERS = (*_NUMBERS, "mask", "split", "condition", "control")
_SPLITS: Mapping[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "validation",
}
_TOKEN = re.compile(r"<__dj__(\w+)>|<\|__dj__eoc\|>")
_END_OF_CHUNK = "<|__dj__eoc|>"


@dataclass(slots=True)
class TableReader:
    """Reads the rows of tables into `contents`."""

    place: Place
    video_formats: Sequence[str]
    use_masks: bool
    contents: SourceContents
    folder: Path | None = None
    """Names of clips are relative to it; None: to the folder of the table."""

    def read(self, table: Path, *, split: Split | None = None) -> None:
        """Add the rows of `table`; `split` is that of rows that say none. What can't be used is a
        problem of `table`, with the line."""
        try:
            found = read_rows(table)
        except DataError as error:
            self.contents.problems.append(ClipProblem.from_error(table, error))
            return
        if not found.rows and not found.wrong:
            self.contents.problems.append(ClipProblem(path=table, reason="has no rows"))
        if found.is_cp1252:
            text = "is in Windows-1252, not UTF-8, and was read as that"
            self.contents.warnings.append(ClipWarning(path=table, text=text))
        items, wrong, masks = list[SourceItem](), list(found.wrong), 0
        for row in found.rows:
            if found.has_decimal_commas:
                _use_points(row.values)
            origin = f"{table.name}, {row.place}"
            for given in _samples(row):
                if isinstance(given, str):
                    item = given
                else:
                    # A sample of several files shares its text with the others.
                    number = row.number if given is row.values else None
                    item = _RowReader(given, origin, self, table, number).item(split)
                if isinstance(item, str):
                    wrong.append(f"{row.place}: {item}")
                    continue
                masks += bool(item.masks)
                items.append(item if self.use_masks else replace(item, masks=()))
        # By name, so that the order of the rows does not matter.
        items.sort(key=lambda item: (item.name.split("/"), item.start))
        self.contents.items += items
        self.contents.problems += [ClipProblem(path=table, reason=line) for line in wrong]
        self._add_notes(table, found.rows, items)
        if masks and not self.use_masks:
            files = "1 mask is" if masks == 1 else f"{masks} masks are"
            self.contents.note(f"{files} not used (video_data.masks is false): {table.name}")

    def _add_notes(self, table: Path, rows: Sequence[Row], items: Sequence[SourceItem]) -> None:
        columns = list(dict.fromkeys(column for row in rows for column in row.values))
        # Rows of jsonl may have different columns.
        used = {_first(names, row.values) for row in rows for names in (PATHS, CAPTIONS)}
        known = {*used, *_JUICER, *_OTHERS}
        if others := [column for column in columns if column not in known]:
            these = "this column is" if len(others) == 1 else "these columns are"
            self.contents.note(f"{table.name}: {these} not used: {first_few(others, 8)}")
        parts = {(item.path, item.start, item.end) for item in items}
        if again := len(items) - len(parts):
            rows_are = "1 row names" if again == 1 else f"{again} rows name"
            self.contents.note(f"{table.name}: {rows_are} what another row names too")


@dataclass(frozen=True, slots=True)
class _RowReader:
    """Reads the values of one row."""

    values: Mapping[str, Any]
    origin: str
    reader: TableReader
    table: Path
    number: int | None
    """Of the row; None if the values are only a part of it."""

    def item(self, split: Split | None) -> SourceItem | str:
        """The item of the row, or all that is wrong with it."""
        wrong = list[str]()

        def take(column: str, read: Any, default: Any) -> Any:
            if self.values.get(column, "") == "":
                return default
            try:
                return read(self.values[column])
            except ValueError as error:
                wrong.append(f"{column} {error}, got {format_value(self.values[column])}")
                return default

        column = _first(PATHS, self.values)
        if not column:
            return f"names no file; give the column {PATHS[0]} a value"
        path = take(column, self._file, self.table)
        start, end = take("start", _seconds, 0.0), take("end", _seconds, None)
        if end is not None and end <= start:
            wrong.append(f"end must be after start ({start:g} s), got {end:g}")
        mask, control = take("mask", self._named, None), take("control", self._named, None)
        condition = take("condition", self._condition, None)
        is_image = isinstance(condition, Path)
        captions_column = _first(CAPTIONS, self.values)
        captions = take(captions_column, captions_of, ("",)) if captions_column else None
        item = SourceItem(
            path=path,
            name=_name(clip_name(path, self.reader.folder or self.table.parent), start, end),
            captions=captions,
            cell=self._cell(captions_column) if captions_column else None,
            texts=() if captions is not None else self._text_files(path),
            masks=(mask,) if mask else (),
            condition_images=(condition,) if is_image else (),
            condition=None if is_image else condition,
            controls=(control,) if control else (),
            start=start,
            end=end,
            repeats=take("repeats", _repeats, 1),
            weight=take("weight", _positive, 1.0),
            split=take("split", _split, split),
            origin=self.origin,
        )
        return "; ".join(wrong) or item

    def _cell(self, column: str) -> CaptionCell | None:
        if self.number is None:
            return None
        return CaptionCell(table=self.table, number=self.number, column=column)

    def _condition(self, value: object) -> ConditionChoice | Path:
        if value in get_args(ConditionChoice):
            return cast("ConditionChoice", value)
        if isinstance(value, str) and extension(Path(value)) in IMAGE_SUFFIXES:
            return self._named(value)
        raise ValueError(
            f"must be {', '.join(get_args(ConditionChoice))} or the path of an image "
            f"({', '.join(sorted(IMAGE_SUFFIXES))})"
        )

    def _named(self, value: object) -> Path:
        if not isinstance(value, str):
            raise ValueError("must be the path of a file")
        return self.reader.place.named(value, self.table)

    def _file(self, value: object) -> Path:
        path = self._named(value)
        if reason := unusable_reason(extension(path), self.reader.video_formats):
            raise ValueError(reason)
        return path

    def _text_files(self, path: Path) -> tuple[Path, ...]:
        """NAME.txt beside a file whose row has no caption."""
        text = path.with_suffix(".txt")
        return (text,) if text.is_file() else ()


def _use_points(values: dict[str, Any]) -> None:
    """Write the numbers of a row with decimal points instead of commas."""
    for column in _NUMBERS:
        if isinstance(value := values.get(column), str):
            values[column] = value.replace(",", ".")


def _samples(row: Row) -> Iterator[Mapping[str, Any] | str]:
    """The rows of one file each that `row` stands for: one, but several in data-juicer's form; or
    what is wrong with it.

    There ``videos`` and ``images`` are lists, and ``text`` consists of chunks; a chunk has a token
    for each of the files that it is about, in the order of the lists.
    """
    lists = {name: iter(row.values[name]) for name in _JUICER if _is_texts(row.values.get(name))}
    if _first(PATHS, row.values) or not lists:
        yield row.values
        return
    rest = {k: v for k, v in row.values.items() if k not in (*_JUICER, "text")}
    text = str(row.values.get("text", ""))
    if "__dj__" not in text:
        text = "<__dj__video>" * len(row.values.get("videos", ())) + text
        text = "<__dj__image>" * len(row.values.get("images", ())) + text
    for chunk in text.split(_END_OF_CHUNK):
        caption = _TOKEN.sub("", chunk).strip()
        for kind in _TOKEN.findall(chunk):
            if file := next(lists.get(f"{kind}s", iter(())), None):
                yield {**rest, "path": file, "text": caption}
    if left := [file for files in lists.values() for file in files]:
        yield f"its text has no token for {first_few(left)}, so that they have no caption"


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in cast("list[object]", value))


def _first(columns: Iterable[str], values: Mapping[str, Any]) -> str:
    """The first of `columns` that has a value, which of a caption may be empty; "" if none has."""
    for column in columns:
        if column in values and (column in CAPTIONS or values[column] != ""):
            return column
    return ""


def _name(name: str, start: float, end: float | None) -> str:
    """The name of the clip: with its part, so that random spans of two parts are two draws."""
    if not start and end is None:
        return name
    return f"{name}@{start:g}-{'' if end is None else f'{end:g}'}"


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError("must be a number")
    try:
        number = float(value)
    except ValueError:
        raise ValueError("must be a number") from None
    if not math.isfinite(number):
        raise ValueError("must be a number")
    return number


def _seconds(value: object) -> float:
    if (number := _number(value)) < 0:
        raise ValueError("must be seconds from the first frame on, 0 or more")
    return number


def _positive(value: object) -> float:
    if (number := _number(value)) <= 0:
        raise ValueError("must be above 0; leave out the row to leave out the clip")
    return number


def _repeats(value: object) -> int:
    number = _number(value)
    if number < 1 or number != int(number):
        raise ValueError("must be a whole number from 1 on")
    return int(number)


def _split(value: object) -> Split:
    if (split := _SPLITS.get(str(value).strip().lower())) is None:
        raise ValueError("must be train or validation")
    return split


def split_of_folder(path: Path) -> Split | None:
    """What the files of a folder are for, by its name or that of one around it, as the Hugging Face
    hub has it."""
    for name in path.parts:
        if split := _SPLITS.get(name.lower()):
            return split
    return None


def captions_of(value: object) -> tuple[str, ...]:
    """The captions in a cell: a text, a list, or in csv a list as JSON; ValueError for others."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return (str(value).strip(),)  # a text that begins with a bracket
    if isinstance(value, str):
        return (" ".join(value.split()),)
    texts = cast("list[object]", value) if isinstance(value, list) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("must be a text or a list of texts")
    return tuple(" ".join(str(text).split()) for text in texts)
