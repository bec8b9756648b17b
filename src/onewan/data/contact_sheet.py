"""The contact sheet of a data set: a few frames of each clip as it is trained, to look at.

Chooses the clips and frames and keeps the sheet up to date; `onewan.media.contact_sheet` draws it,
and `PreviewSource` has the frames, which the cache keeps from the time when a clip is encoded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from onewan.data.clip import Clip
from onewan.data.keys import entry_key
from onewan.data.report import count
from onewan.files import replacing
from onewan.media.contact_sheet import (
    Card,
    Layout,
    draw_page,
    frames_with_mask,
    preview_indices,
    small_frame,
)
from onewan.runs.layout import displayed

PREVIEW_VERSION = 1
"""Incremented when the frames of previews change."""
_SHEET_VERSION = 1
"""Incremented when sheets are drawn in another way."""
MAX_CLIPS = 400
"""Clips on the sheet of a data set; of a larger one, so many at equal distances."""
_FRAMES = 3
_JPEG_QUALITY = 90


class PreviewSource(Protocol):
    """Where a contact sheet gets the frames of clips from."""

    def preview_key(self, clip: Clip) -> str:
        """A hash of everything that the preview depends on, the loss mask included."""
        ...

    def preview(self, clip: Clip) -> Preview:
        """Raises DataError if the clip's file can't be read."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Preview:
    """Small frames of a clip, as it is trained."""

    frames: np.ndarray
    """uint8 RGB [n, h, w, 3]: those of `preview_indices`."""
    conditions: np.ndarray | None = None
    """uint8 RGB [n, h, w, 3]: the condition image, unless it is the first frame, and the control
    video at `preview_indices` (`onewan.data.decode.condition_frames`)."""
    mask: np.ndarray | None
    """[F, h, w] from 0 to 1: the loss mask of each latent cell; None if the clip has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContactSheet:
    """The pages of a contact sheet on disk."""

    pages: tuple[Path, ...]
    clips: int
    """Number of clips on them."""
    of_clips: int
    """Number of clips of the data set."""

    def __str__(self) -> str:
        first, *others = self.pages
        more = f" to {others[-1].name}" if others else ""
        some = (
            f" (with {self.clips} of {self.of_clips} clips)" if self.clips < self.of_clips else ""
        )
        return f"contact sheet, to see what is trained: {displayed(first)}{more}{some}"


def preview_frames(frames: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Frames of one size, uint8 RGB [H, W, 3] each, made small: [n, h, w, 3]."""
    return np.stack([small_frame(frame) for frame in frames])


def clips_to_show(clips: Sequence[Clip]) -> list[Clip]:
    """The clips that the sheet of a data set shows: each once, at most `MAX_CLIPS`."""
    # The same clip may be in two sources.
    keys = ((c.path, c.start, c.fps, c.frames, c.size, c.variation, c.conditions) for c in clips)
    once = list(dict(zip(keys, clips, strict=True)).values())
    if len(once) <= MAX_CLIPS:
        return once
    return [once[i * len(once) // MAX_CLIPS] for i in range(MAX_CLIPS)]


def write_contact_sheet(
    folder: Path,
    name: str,
    source: PreviewSource,
    shown: Sequence[Clip],
    *,
    held_out: Collection[Clip],
    of_clips: int,
    temporal_compression: int,
) -> ContactSheet:
    """Write the contact sheet of the run `name` into `folder`, unless it is there and up to date.

    `shown` are the clips on it, at least one, of the `of_clips` clips of the data set, and
    `held_out` those which are validated on. Raises DataError for a clip that can't be read, and
    OSError.
    """
    facts = [_facts(clip, is_held_out=clip in held_out) for clip in shown]
    layout = Layout.of(
        (clip.size for clip in shown),
        frames=max(_pictures(clip) for clip in shown),
        lines=1 + max(len(lines) for lines in facts),
    )
    number = ceil(len(shown) / layout.cards_per_page)
    pages = tuple(_page(folder, name, page) for page in range(1, number + 1))
    sheet = ContactSheet(pages=pages, clips=len(shown), of_clips=of_clips)
    key = entry_key(
        version=_SHEET_VERSION,
        run=name,
        clips=[[clip.name, source.preview_key(clip)] for clip in shown],
        facts=facts,
        of_clips=of_clips,
    )
    if all(_comment(page) == key for page in pages):
        return sheet
    for index, page in enumerate(pages):
        first = index * layout.cards_per_page
        chosen = slice(first, first + layout.cards_per_page)
        cards = [
            _card(clip, source.preview(clip), lines, temporal_compression)
            for clip, lines in zip(shown[chosen], facts[chosen], strict=True)
        ]
        image = draw_page(cards, layout, _heading(name, sheet, index + 1))
        with replacing(page) as temporary:
            image.save(temporary, "JPEG", quality=_JPEG_QUALITY, comment=key)
    while (former_page := _page(folder, name, number + 1)).exists():  # of more clips
        former_page.unlink()
        number += 1
    return sheet


def _pictures(clip: Clip) -> int:
    """Number of pictures on the card of a clip."""
    frames, conditions = len(preview_indices(clip.frames)), clip.conditions
    return frames + conditions.has_own_image + (frames if conditions.control else 0)


def _page(folder: Path, name: str, number: int) -> Path:
    return folder / f"contact_sheet_{name}{f'.{number}' if number > 1 else ''}.jpg"


def sheets_in(folder: Path) -> Iterator[tuple[Path, set[str]]]:
    """The pages of contact sheets in `folder`, each with the names of the runs that it may be of:
    ``a.2`` is the second page of run ``a``, or the first one of run ``a.2``."""
    for path in sorted(folder.glob("contact_sheet_*.jpg")):
        name = path.stem.removeprefix("contact_sheet_")
        first, _, number = name.rpartition(".")
        yield path, {name, first} if number.isdecimal() and first else {name}


def _comment(page: Path) -> str | None:
    """The key that the page was drawn for; None if there is no such page."""
    try:
        with Image.open(page) as image:
            comment = image.info.get("comment")
    except (OSError, SyntaxError, ValueError):
        return None
    return comment.decode("ascii", errors="replace") if isinstance(comment, bytes) else None


def _heading(name: str, sheet: ContactSheet, number: int) -> str:
    some = f"{sheet.clips} of " if sheet.clips < sheet.of_clips else ""
    pages = len(sheet.pages)
    page = f", page {number} of {pages}" if pages > 1 else ""
    what = "first, middle and last frame of each as it is trained"
    return f"{name}: {some}{count(sheet.of_clips, 'clip')}{page} - {what}"


def _facts(clip: Clip, *, is_held_out: bool) -> list[str]:
    """The lines below the name of a clip."""
    size = f"{clip.size[0]}x{clip.size[1]}"
    if clip.kind == "image":
        span = f"image, {size}"
    else:
        end = clip.times()[-1]
        frames = f"{count(clip.frames, 'frame')} at {clip.fps:g} fps"
        span = f"{clip.start:.2f} to {end:.2f} s, {size}, {frames}"
    notes = [
        "held out for validation" if is_held_out else "",
        f"repeats {clip.repeats}" if clip.repeats > 1 else "",
        "loss mask" if clip.mask else "",
        _condition_note(clip),
        "then its control video" if clip.conditions.control else "",
        "prior preservation" if clip.is_prior else "",
        f"{clip.take + 1} of {clip.takes}, of which each pass has one" if clip.takes > 1 else "",
    ]
    first, *others = clip.captions
    more = f" (and {len(others)} more)" if others else ""
    caption = f"{first or '(no text)'}{more}"
    return [", ".join([span, *filter(None, notes)]), caption]


def _condition_note(clip: Clip) -> str:
    """Which picture behind the frames of a clip is its condition image, or its reference image."""
    conditions = clip.conditions
    what = "reference image" if conditions.as_reference else "condition image"
    if conditions.image is not None:
        return f"then its {what} {conditions.image.path.name}"
    if conditions.has_own_image:
        return f"then its {what}, frame {conditions.frame + 1}"
    return ""


def _card(clip: Clip, preview: Preview, lines: Sequence[str], temporal: int) -> Card:
    frames = list(preview.frames)
    if preview.mask is not None:
        frames = frames_with_mask(frames, preview.mask, clip.frames, temporal)
    frames += [] if preview.conditions is None else list(preview.conditions)
    return Card(frames=tuple(frames), title=clip.name, lines=tuple(lines))
