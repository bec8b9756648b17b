"""Captions: from the text file beside a clip to the texts that the clip is trained with.

Hides encodings and line breaks, and what a source adds to its captions: prefix, trigger word and
other orders of tags. The results are plain texts, which are encoded and cached like any other.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from onewan.arithmetic.words import contains_word, with_word
from onewan.documents import decode_text_or_cp1252
from onewan.errors import DataError
from onewan.files import read_input
from onewan.seeds import derive_seed

CP1252_NOTE = (
    "is in Windows-1252, not UTF-8, and was read as that; `onewan doctor --fix` converts it"
)
_MAX_BYTES = 1 << 20
"""Far more than the text encoder reads of all captions of a clip."""

# Not `str.splitlines`, which also splits at U+2028, vertical tabs and others: those are inside of
# texts that were copied from web pages and documents.
_LINE_BREAK = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionSettings:
    """How the captions of a source's clips follow from their text files."""

    whole: bool = False
    """Whether a text file is one caption; otherwise each of its lines is one."""
    prefix: str = ""
    """Text in front of each caption."""
    trigger_word: str = ""
    """Added in front of each caption that does not contain it, behind `prefix`."""
    class_word: str = ""
    """Replaces the trigger word in the texts for which the base model's prediction is kept; empty
    if there are none."""
    tag_orders: int = 0
    """Number of orders of the comma-separated tags that a caption is trained in; 0 and 1: as it is
    written."""
    kept_tags: int = 0
    """Number of tags at the beginning that stay where they are."""

    def captions(self, lines: Sequence[str], seed: int) -> tuple[str, ...]:
        """The captions of a clip whose text file has these `lines`; at least one.

        The first one has its tags in the order of the file. Each line gives as many captions as the
        others, some of them equal if it has few tags, so that a draw among all captions is one
        among the lines. The orders depend on the caption and the seed alone.
        """
        texts = [" ".join(lines)] if self.whole or not lines else lines
        orders = [text for line in texts for text in self._orders(line, seed)]
        return tuple(map(self._complete, orders))

    def class_caption(self, caption: str) -> str | None:
        """`caption`, which is complete, with the class word in place of the trigger word; None if
        there is no class word, or no trigger word in it."""
        if not self.class_word or not contains_word(caption, self.trigger_word):
            return None
        return with_word(caption, self.trigger_word, self.class_word)

    def _orders(self, caption: str, seed: int) -> list[str]:
        """`caption` as it is written, and with its tags in other orders."""
        tags = [tag for tag in map(str.strip, caption.split(",")) if tag]
        kept, moved = tags[: self.kept_tags], tags[self.kept_tags :]
        texts = [caption]
        for number in range(1, self.tag_orders):
            order = list(moved)
            random.Random(derive_seed(seed, "tag order", caption, number)).shuffle(order)
            texts.append(", ".join([*kept, *order]))
        return texts

    def _complete(self, caption: str) -> str:
        """`caption` with trigger word and prefix."""
        prefixed = f"{self.prefix} {caption}".strip()
        if self.trigger_word and not contains_word(prefixed, self.trigger_word):
            caption = f"{self.trigger_word}, {caption}" if caption else self.trigger_word
        return f"{self.prefix} {caption}".strip()


def caption_path(media: Path) -> Path:
    """Where the caption of a media file is."""
    return media.with_suffix(".txt")


_FOR_REVIEW = ".caption"


def review_path(media: Path) -> Path:
    """Where a caption of a media file is until it was looked at: training does not read it."""
    return media.with_name(f"{media.stem}{_FOR_REVIEW}.txt")


def reviewed_key(key: str) -> str | None:
    """The path without extension of the media file that NAME.caption.txt belongs to, by its own;
    None if it is not named so."""
    return key.removesuffix(_FOR_REVIEW) if key.endswith(_FOR_REVIEW) else None


class CaptionFile(NamedTuple):
    """What a caption file says."""

    lines: tuple[str, ...]
    """Those that are not empty, without space around them."""
    path: Path
    is_cp1252: bool
    """Whether it was read as Windows-1252, since it is not UTF-8."""


def read_caption_file(media: Path, files: Sequence[Path]) -> CaptionFile:
    """The caption file of a media file.

    `files` are the caption files by its name that were found. DataError, which names the media
    file, if there is none, more than one, or one that can't be read.
    """
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise DataError(f"{media}: has {len(files)} caption files ({names}); keep one")
    # Where none is found there may still be a folder of that name, which is the reason to give.
    file = files[0] if files else caption_path(media)
    try:
        text, is_cp1252 = decode_text_or_cp1252(read_input(file, _MAX_BYTES))
    except FileNotFoundError:
        raise DataError(
            f"{media}: has no caption; write one into {file.name} beside it (an empty file trains "
            "without text), or let `onewan caption` ask a model for it"
        ) from None
    except OSError as error:
        raise DataError(
            f"{media}: its caption file {file.name} can't be read ({error.strerror}); replace "
            "it by a text file that you may read"
        ) from error
    except ValueError as error:
        raise DataError(f"{media}: its caption file {file.name} {error}") from error
    lines = tuple(line.strip() for line in _LINE_BREAK.split(text) if line.strip())
    return CaptionFile(lines, file, is_cp1252)


def several_lines_note(place: str, clips: int, total: int, *, whole: bool) -> str:
    """What is done with captions of several lines, which `clips` of `total` clips of a source
    have."""
    have = "has a caption" if clips == 1 else "have captions"
    if whole:
        taken = "taken as one text each (video_data.captions: whole)"
    else:
        taken = (
            "taken as alternatives; where they are one text, join the lines, or set "
            "video_data.captions: whole"
        )
    return f"{clips} of {total} clips in {place} {have} of several lines, {taken}"
