"""Where the captions of clips are written, and reading and changing them there.

Each caption has one place: a text file beside its clip or a cell of a table. What is read comes
with a digest, and is changed only if the place has this digest still, so that nobody overwrites
what another program, or another page, has written meanwhile.
"""

from __future__ import annotations

import codecs
import hashlib
import shutil
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

from onewan.config.schema import ResolvedRun
from onewan.data.buckets import clip_sources
from onewan.data.caption_table import EDITED_TABLES, TableText, row_identity
from onewan.data.captions import caption_path
from onewan.data.sources.copies import Copies
from onewan.data.sources.item import CaptionCell, SourceItem
from onewan.data.sources.read import SourceReader, source_problem
from onewan.documents import decode_text, decode_text_or_cp1252
from onewan.errors import DataError
from onewan.files import read_input, replacing
from onewan.media import extension

_MAX_BYTES = 1 << 20
"""Of a caption file, as the trainer reads them."""
_MAX_TABLE_BYTES = 64 << 20
"""Of a table whose captions are changed here: it is written as a whole for each change."""


@dataclass(frozen=True, slots=True)
class TextFile:
    """A caption file beside a clip, which need not exist yet."""

    path: Path


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table."""

    cell: CaptionCell
    identity: str
    """What tells its row from others: see `onewan.data.caption_table.row_identity`."""

    @property
    def path(self) -> Path:
        """The table."""
        return self.cell.table


Place: TypeAlias = TextFile | Cell


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A caption that is not changed here."""

    why: str
    """Where it is, and what to do instead."""


class Origin(NamedTuple):
    """Where a media file comes from."""

    source: Path | str
    """The path of its source, the first one that names it."""
    place: Place | Elsewhere
    """Where its captions are written."""


class Written(NamedTuple):
    """What a place says."""

    text: str | None
    """Captions, one a line, with the line break "\\n"; None if there is no such file."""
    digest: str
    """Of what is written there."""


class CaptionConflictError(DataError):
    """The caption was changed by another program since it was read."""

    def __init__(self, place: Place, current: Written) -> None:
        super().__init__(
            f"{place.path}: the caption was changed meanwhile, in another tab or by another program"
        )
        self.current = current


def place_of(item: SourceItem, cache: Path) -> Place | Elsewhere:
    """Where the captions of `item` are written; `cache` has the copies of what is in archives and
    on other machines."""
    if item.captions is None:
        if len(item.texts) > 1:
            names = ", ".join(text.name for text in item.texts)
            return Elsewhere(f"there are {len(item.texts)} caption files ({names}); keep one")
        path = item.texts[0] if item.texts else caption_path(item.path)
        if path.is_relative_to(cache):
            return Elsewhere("the caption is in an archive or on another machine; change it there")
        return TextFile(path)
    if item.cell is None:
        where = f" ({item.origin})" if item.origin else ""
        return Elsewhere(f"the caption is not one file or cell of its own{where}; change it there")
    table = item.cell.table
    if table.is_relative_to(cache):
        return Elsewhere(f"the caption is in a table on another machine ({item.origin})")
    if extension(table) not in EDITED_TABLES:
        return Elsewhere(
            f"the caption is in {item.origin}; change it with the program that wrote that"
        )
    return Cell(item.cell, "")


def origins(config: ResolvedRun) -> dict[tuple[Path, str], Origin]:
    """The origins of the run's media files, by path and name of the item (see `Clip.item_name`),
    also of files that can't be used. Reads no media file."""
    cache = config.video_data.cache_dir
    reader = SourceReader(
        config.video_data.supported_formats, use_masks=False, copies=Copies(cache, make=False)
    )
    found, tables = dict[tuple[Path, str], Origin](), _Tables()
    for source in clip_sources((*config.video_data.sources, *config.validation.sources), config):
        if isinstance(source.path, Path) and source_problem(source, "") is not None:
            continue
        with suppress(DataError):  # reported with the clips
            for item in reader.read(source).items:
                place = tables.identified(place_of(item, cache))
                key = (item.path, item.name)
                if found.setdefault(key, Origin(source.path, place)).place != place:
                    why = "several rows or sources have a caption for this clip; change it there"
                    found[key] = found[key]._replace(place=Elsewhere(why))
    return found


class _Tables:
    """The tables that were read, to tell their rows from one another."""

    def __init__(self) -> None:
        self._tables = dict[Path, TableText | Elsewhere]()

    def identified(self, place: Place | Elsewhere) -> Place | Elsewhere:
        """`place` with the identity of its row."""
        if not isinstance(place, Cell):
            return place
        if place.path not in self._tables:
            try:
                self._tables[place.path] = _table(place.path)[0]
            except DataError as error:
                self._tables[place.path] = Elsewhere(str(error))
        table = self._tables[place.path]
        if isinstance(table, Elsewhere):
            return table
        row = table.rows.get(place.cell.number)
        return replace(place, identity=row_identity(row)) if row else Elsewhere("its row is gone")


class CaptionStore:
    """Reads and changes captions. One process has one of them, whose lock keeps its threads from
    changing a caption at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def read(self, place: Place) -> Written:
        """What `place` says. DataError if it can't be read."""
        return self.read_all([place])[place]

    def read_all(self, places: Iterable[Place]) -> dict[Place, Written]:
        """What all `places` say; each table is read once. DataError if one can't be read."""
        tables, found = dict[Path, TableText](), dict[Place, Written]()
        for place in places:
            if isinstance(place, TextFile):
                found[place] = _read_file(place.path)
                continue
            if place.path not in tables:
                tables[place.path] = _table(place.path)[0]
            found[place] = _read_cell(tables[place.path], place)
        return found

    def write(self, place: Place, text: str | None, digest: str) -> Written:
        """Write `text` to `place`, as the file as a whole was written; None deletes a caption file.
        Returns what is written now.

        CaptionConflictError, with what `place` says, if that has not the `digest` it was read with;
        DataError if it can't be written.
        """
        [result] = self.write_all({place: (text, digest)}).values()
        if isinstance(result, DataError):
            raise result
        return result

    def write_all(
        self, changes: Mapping[Place, tuple[str | None, str]]
    ) -> dict[Place, Written | DataError]:
        """`write` for several places at once, a table with all of its changes; the errors of those
        that were not changed."""
        results = dict[Place, Written | DataError]()
        cells = dict[Path, dict[Cell, tuple[str, str]]]()
        with self._lock:
            for place, (text, digest) in changes.items():
                if isinstance(place, Cell):
                    cells.setdefault(place.path, {})[place] = (text or "", digest)
                    continue
                try:
                    results[place] = _write_file(place, text, digest)
                except DataError as error:
                    results[place] = error
            for table, own in cells.items():
                results |= _write_table(table, own)
        return results


def _read_file(path: Path) -> Written:
    data = _bytes_of(path)
    if data is None:
        return Written(None, "")
    try:
        text, _ = decode_text_or_cp1252(data)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    # As a field of a page shows it: the break behind the last line is not part of the caption.
    shown = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
    return Written(shown, _digest(data))


def _write_file(place: TextFile, text: str | None, digest: str) -> Written:
    path = place.path
    before = _read_file(path)
    if before.digest != digest:
        raise CaptionConflictError(place, before)
    if text == before.text:
        return before
    if text is None:
        try:
            path.resolve().unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable(path, error) from error
        return Written(None, "")
    data = _encoded(path, text, _bytes_of(path) or b"")
    _replace(path, data)
    return _read_file(path)


def _encoded(path: Path, text: str, before: bytes) -> bytes:
    """`text` in the encoding and with the line breaks of the file; UTF-8 if that had another."""
    former, is_cp1252 = decode_text_or_cp1252(before)
    if former.endswith("\n"):
        text += "\n"
    if "\r\n" in former and former.count("\r\n") == former.count("\n"):
        text = text.replace("\n", "\r\n")
    encoding = "utf-8" if is_cp1252 else _encoding(before)
    try:
        data = text.encode(encoding)
    except UnicodeEncodeError:
        raise DataError(f"{path}: the caption has a part of a character; type it again") from None
    if len(data) > _MAX_BYTES:
        raise DataError(f"{path}: the caption is longer than {_MAX_BYTES >> 20} MiB; shorten it")
    if "\0" in text:
        raise DataError(f"{path}: the caption has the character NUL; take it out")
    return data


def _encoding(data: bytes) -> str:
    """The encoding that `documents.decode_text` reads `data` in."""
    if data.startswith(codecs.BOM_UTF8):
        return "utf-8-sig"
    # Python writes the mark, in the order of this machine.
    is_utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return "utf-16" if is_utf_16 else "utf-8"


def _table(path: Path) -> tuple[TableText, bytes]:
    """The table in a file, and its bytes; DataError if it can't be changed here."""
    data = _bytes_of(path, _MAX_TABLE_BYTES)
    if data is None:
        raise DataError(f"{path}: the table is gone; load the data again")
    try:
        return TableText.of(path, decode_text(data)), data
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def _read_cell(table: TableText, place: Cell) -> Written:
    cell = table.find(place.cell, place.identity)
    text = table.caption(cell)
    return Written(text, _digest(f"{place.identity}\n{text}".encode(errors="surrogatepass")))


def _write_table(
    path: Path, changes: Mapping[Cell, tuple[str, str]]
) -> dict[Place, Written | DataError]:
    results = dict[Place, Written | DataError]()
    captions = dict[CaptionCell, str]()
    try:
        table, data = _table(path)
        for place, (text, digest) in changes.items():
            try:
                current = _read_cell(table, place)
                if current.digest != digest:
                    raise CaptionConflictError(place, current)
                results[place] = current
                if text != current.text:
                    captions[table.find(place.cell, place.identity)] = text
            except DataError as error:  # noqa: PERF203  (each has its own reason)
                results[place] = error
        if captions:
            text = table.changed(captions)
            _replace(path, text.encode(_encoding(data)))
            after = _table(path)[0]
            for place, result in results.items():
                if isinstance(result, Written) and isinstance(place, Cell):
                    results[place] = _read_cell(after, place)
    except UnicodeEncodeError:
        error = DataError(f"{path}: the caption has a part of a character; type it again")
        return dict.fromkeys(changes, error)
    except DataError as error:
        return dict.fromkeys(changes, error)
    return results


def _bytes_of(path: Path, limit: int = _MAX_BYTES) -> bytes | None:
    try:
        return read_input(path, limit)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from error


def _replace(path: Path, data: bytes) -> None:
    """Write a file with the permissions that it has; a link stays one."""
    target = path.resolve()
    try:
        with replacing(target) as temporary:
            temporary.write_bytes(data)
            with suppress(OSError):  # a new file, or a file system without permissions
                shutil.copymode(target, temporary)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path}: can't be written ({error.strerror}); check its permissions and the free space"
    )


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
