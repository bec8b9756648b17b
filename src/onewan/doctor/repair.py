"""Safe repairs: captions that are in another encoding than UTF-8, which are written as UTF-8.

The original stays beside the file as a backup. What a file was encoded in is a guess, which the
user is shown with the text before anything is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onewan.config.schema import ResolvedRun
from onewan.data.buckets import clip_sources
from onewan.data.sources.copies import Copies
from onewan.data.sources.read import SourceReader, source_problem
from onewan.documents import decode_text_or_cp1252
from onewan.files import check_input, replacing
from onewan.runs.layout import unused

_MOST_BYTES = 1 << 20
"""Of a caption file, as the trainer reads them."""
_SHOWN_BEFORE, _SHOWN_AFTER = 30, 40
"""Characters around the first one that is not ASCII."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """A caption file, and what its text would be in UTF-8."""

    path: Path
    encoding: str
    """The one that it seems to be in, such as "Windows-1252"."""
    text: str

    @property
    def excerpt(self) -> str:
        """The text around its first character that is not ASCII, or its beginning."""
        first = next((i for i, letter in enumerate(self.text) if not letter.isascii()), 0)
        start, end = max(0, first - _SHOWN_BEFORE), first + _SHOWN_AFTER
        excerpt = " ".join(self.text[start:end].split())
        return f"{'...' if start else ''}{excerpt}{'...' if end < len(self.text) else ''}"

    def apply(self) -> Path:
        """Write the text as UTF-8; returns the backup, a copy of the file as it was. OSError."""
        backup = unused(self.path.with_name(f"{self.path.name}.bak"))
        data = self.path.read_bytes()
        with replacing(backup) as temporary:
            temporary.write_bytes(data)
        with replacing(self.path) as temporary:
            temporary.write_bytes(self.text.encode("utf-8"))  # line breaks stay as they are
        return backup


def possible_repairs(config: ResolvedRun) -> list[Repair]:
    """The caption files of the run's clips that are not UTF-8 and can be made so."""
    cache = config.video_data.cache_dir
    reader = SourceReader(
        config.video_data.supported_formats,
        use_masks=False,
        copies=Copies(cache, make=False),
    )
    sources = clip_sources((*config.video_data.sources, *config.validation.sources), config)
    found = dict.fromkeys(
        text
        for source in sources
        if isinstance(source.path, Path) and source_problem(source, "") is None
        for item in reader.read(source).items
        for text in item.texts
        # Not copies of what is in archives, which would be made again.
        if not text.is_relative_to(cache)
    )
    return [repair for file in found if (repair := _repair(file)) is not None]


def _repair(path: Path) -> Repair | None:
    try:
        if check_input(path).stat().st_size > _MOST_BYTES:
            return None
        data = path.read_bytes()
    except OSError:  # reported with its clip
        return None
    try:
        text, is_cp1252 = decode_text_or_cp1252(data)
    except ValueError:
        return _from_utf_16(path, data)
    return Repair(path=path, encoding="Windows-1252", text=text) if is_cp1252 else None


def _from_utf_16(path: Path, data: bytes) -> Repair | None:
    """The repair of a text in UTF-16 without the byte order mark that would say so."""
    if b"\0" not in data:
        return None
    # The high bytes of most characters are NUL.
    is_little = data[1::2].count(0) > data[::2].count(0)
    encoding, order = ("utf-16-le", "little") if is_little else ("utf-16-be", "big")
    try:
        return Repair(path=path, encoding=f"UTF-16 ({order}-endian)", text=data.decode(encoding))
    except UnicodeDecodeError:
        return None
