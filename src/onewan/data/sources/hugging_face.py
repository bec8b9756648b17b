"""A data set folder of the Hugging Face hub: tables with ``file_name`` beside the files.

https://huggingface.co/docs/datasets/video_load: ``metadata.csv``, ``.jsonl`` or ``.parquet`` at the
top or in a folder of each split, with a path relative to the table in each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onewan.data.report import ClipProblem
from onewan.data.sources.contents import SourceContents
from onewan.data.sources.place import Listing, Place, first_few
from onewan.data.sources.table import TableReader, split_of_folder
from onewan.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, extension

TABLE_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def tables_of(listing: Listing) -> list[Path]:
    """The tables of such a data set among the files of a folder; empty if it is none."""
    return [path for path in listing.paths if path.name in TABLE_NAMES]


def read_hugging_face(
    place: Place, listing: Listing, video_formats: Sequence[str], *, use_masks: bool
) -> SourceContents:
    """The rows of all tables below the folder; those in a folder of a split are for that split."""
    contents = SourceContents([], list(listing.problems), list(listing.warnings))
    tables = tables_of(listing)
    failed = place.fetch(tables)
    contents.problems += [ClipProblem(path=path, reason=why) for path, why in failed.items()]
    reader = TableReader(place, video_formats, use_masks, contents, listing.folder)
    for table in tables:
        if table in failed:
            continue
        reader.read(table, split=split_of_folder(table.relative_to(listing.folder).parent))
    named = {item.path for item in contents.items}
    named |= {path for item in contents.items for path in item.masks}
    media = [path for path in listing.paths if extension(path) in IMAGE_SUFFIXES | VIDEO_SUFFIXES]
    if others := [path.name for path in media if path not in named]:
        number, where = f"{len(others)} of {len(media)} files", f"in {place.label}"
        contents.note(f"{number} {where} are clips of none of its tables: {first_few(others)}")
    return contents
