"""Contact sheets: pages with a card for each clip, which has a few small frames and lines of text.

Hides Pillow's drawing, the layout and the choice of fonts. All cards of a sheet are equally large,
whatever the shapes of their frames. A page is drawn at a time, so memory does not grow with the
number of clips.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from onewan.errors import one_line

_BOX = (208, 176)
"""Width and height in pixels into which each frame is fitted."""
_PAGE_WIDTH, _PAGE_HEIGHT = 2048, 2200
"""At most, in pixels: three columns of landscape clips, more of portrait ones."""
_MARGIN, _GAP, _PADDING = 24, 16, 10
_FRAME_GAP = 4
_HEADING_SIZE, _TITLE_SIZE, _TEXT_SIZE = 24, 17, 15
_LINE_HEIGHT = 21
_MAX_CHARACTERS = 400
"""Of a line; far more than a card has room for."""
_PAGE_COLOR, _CARD_COLOR, _SLOT_COLOR = "#e4e6ea", "#ffffff", "#f1f2f4"
_INK, _GRAY = "#16181d", "#5b616e"
_MASKED_OUT = np.array([200, 30, 60], np.float32)
"""What covers the parts of a frame that a loss mask leaves out."""

_FONTS = (
    # Latin, Greek and Cyrillic letters: Linux, Windows, macOS; then Chinese, Japanese and Korean.
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "LiberationSans-Regular.ttf",
    "segoeui.ttf",
    "arial.ttf",
    "Arial.ttf",
    "NotoSansCJK-Regular.ttc",
    "msyh.ttc",
    "YuGothM.ttc",
    "malgun.ttf",
    "Arial Unicode.ttf",
)
"""Fonts of the system for letters that Pillow's own font lacks; it has ASCII only."""

Size = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a contact sheet shows of one clip."""

    frames: tuple[np.ndarray, ...]
    """uint8 RGB [h, w, 3], as `small_frame` returns them."""
    title: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The measures of all pages of a contact sheet, in pixels."""

    slot: Size
    """The room of each frame."""
    frames: int
    """Largest number of frames of a card."""
    lines: int
    """Largest number of lines of a card, its title included."""

    @staticmethod
    def of(sizes: Iterable[Size], *, frames: int, lines: int) -> Layout:
        """The layout for clips of the given `sizes`; at least one."""
        small = [small_size(*size) for size in sizes]
        slot = (max(width for width, _ in small), max(height for _, height in small))
        return Layout(slot=slot, frames=frames, lines=lines)

    @property
    def card(self) -> Size:
        width = self.frames * self.slot[0] + (self.frames - 1) * _FRAME_GAP
        return (
            width + 2 * _PADDING,
            self.slot[1] + _PADDING // 2 + self.lines * _LINE_HEIGHT + 2 * _PADDING,
        )

    @property
    def columns(self) -> int:
        return max(1, (_PAGE_WIDTH - 2 * _MARGIN + _GAP) // (self.card[0] + _GAP))

    @property
    def cards_per_page(self) -> int:
        rows = (_PAGE_HEIGHT - 3 * _MARGIN - _HEADING_SIZE + _GAP) // (self.card[1] + _GAP)
        return self.columns * max(1, rows)


def preview_indices(frames: int) -> tuple[int, ...]:
    """Indices of the first, the middle and the last of `frames` frames, each once."""
    return tuple(dict.fromkeys((0, (frames - 1) // 2, frames - 1)))


def small_size(width: int, height: int) -> Size:
    """The size at which a contact sheet shows frames of this size."""
    scale = min(_BOX[0] / width, _BOX[1] / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def small_frame(frame: np.ndarray) -> np.ndarray:
    """`frame`, uint8 RGB [H, W, 3], at its `small_size`."""
    size = small_size(frame.shape[1], frame.shape[0])
    # Small frames become larger, and their pixels stay to be seen.
    method = Image.Resampling.LANCZOS if size[0] < frame.shape[1] else Image.Resampling.NEAREST
    return np.array(Image.fromarray(frame).resize(size, method))


def with_mask(frame: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`frame`, uint8 [h, w, 3], covered where `mask` ([h', w'], from 0 to 1) is not 1."""
    height, width = frame.shape[:2]
    # Without interpolation, since the loss has one weight in each cell of the mask.
    cells = Image.fromarray(mask.astype(np.float32)).resize(
        (width, height), Image.Resampling.NEAREST
    )
    covered = 0.6 * (1 - np.asarray(cells)[..., None])
    return np.rint(frame * (1 - covered) + _MASKED_OUT * covered).astype(np.uint8)


def frames_with_mask(
    frames: Sequence[np.ndarray], mask: np.ndarray, of_frames: int, temporal: int
) -> list[np.ndarray]:
    """The frames at `preview_indices(of_frames)` of a clip, each with its part of the clip's loss
    mask [F, h, w]; `temporal` frames are one latent frame."""
    # Latent frame 0 encodes frame 0, latent frame k the frames up to k times `temporal`.
    masks = [mask[-(-index // temporal)] for index in preview_indices(of_frames)]
    return [with_mask(frame, part) for frame, part in zip(frames, masks, strict=True)]


def draw_page(cards: Sequence[Card], layout: Layout, heading: str) -> Image.Image:
    """A page with at most `layout.cards_per_page` cards, in rows from left to right."""
    width, height = layout.card
    columns = min(layout.columns, len(cards))
    rows = -(-len(cards) // columns)
    top = 2 * _MARGIN + _HEADING_SIZE
    page = Image.new(
        "RGB",
        (
            # Wide enough for the heading if there are few cards.
            max(2 * _MARGIN + columns * (width + _GAP) - _GAP, _PAGE_WIDTH // 2),
            top + rows * (height + _GAP) - _GAP + _MARGIN,
        ),
        _PAGE_COLOR,
    )
    draw = ImageDraw.Draw(page)
    _write(draw, (_MARGIN, _MARGIN), heading, _HEADING_SIZE, page.width - 2 * _MARGIN, _INK)
    for index, card in enumerate(cards):
        row, column = divmod(index, columns)
        corner = (_MARGIN + column * (width + _GAP), top + row * (height + _GAP))
        _draw_card(page, draw, card, layout, corner)
    return page


def _draw_card(
    page: Image.Image, draw: ImageDraw.ImageDraw, card: Card, layout: Layout, corner: Size
) -> None:
    (left, top), (width, height) = corner, layout.card
    draw.rounded_rectangle((left, top, left + width - 1, top + height - 1), 6, _CARD_COLOR)
    slot_width, slot_height = layout.slot
    for index, frame in enumerate(card.frames):
        x, y = left + _PADDING + index * (slot_width + _FRAME_GAP), top + _PADDING
        draw.rectangle((x, y, x + slot_width - 1, y + slot_height - 1), _SLOT_COLOR)
        # In the middle of its slot.
        offset = (slot_width - frame.shape[1]) // 2, (slot_height - frame.shape[0]) // 2
        page.paste(Image.fromarray(frame), (x + offset[0], y + offset[1]))
    room = width - 2 * _PADDING
    x, y = left + _PADDING, top + _PADDING + slot_height + _PADDING // 2
    _write(draw, (x, y), card.title, _TITLE_SIZE, room, _INK, keeps_end=True)
    for number, line in enumerate(card.lines, start=1):
        _write(draw, (x, y + number * _LINE_HEIGHT), line, _TEXT_SIZE, room, _GRAY)


def _write(
    draw: ImageDraw.ImageDraw,
    place: Size,
    text: str,
    size: int,
    room: int,
    color: str,
    *,
    keeps_end: bool = False,
) -> None:
    """Write the line `text`, shortened to `room` pixels: its end is left out, or its middle."""
    text, font = _drawable(one_line(text)[:_MAX_CHARACTERS], size)
    shown, kept = text, len(text)
    while kept > 1 and font.getlength(shown) > room:
        kept -= 1
        end = kept // 3 if keeps_end else 0
        shown = f"{text[: kept - end].rstrip()}...{text[len(text) - end :].lstrip()}"
    # By its base line, on which all fonts stand.
    draw.text((place[0], place[1] + size), shown, fill=color, font=font, anchor="ls")


def _drawable(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """`text` with question marks for what can't be drawn, and the font that can draw most of it."""
    text = unicodedata.normalize("NFC", text)
    fonts = (None,) if text.isascii() else (None, *_FONTS)
    names = [name for name in fonts if _font(name, size)]
    missing = {name: {c for c in text if not _has_glyph(name, size, c)} for name in names}
    best = min(names, key=lambda name: len(missing[name]))
    font = _font(best, size)
    assert font is not None
    return "".join("?" if c in missing[best] else c for c in text), font


@lru_cache(maxsize=256)
def _font(name: str | None, size: int) -> ImageFont.FreeTypeFont | None:
    """The system's font of this file name, or Pillow's own; None if the system does not have it."""
    try:
        font = ImageFont.load_default(size) if name is None else ImageFont.truetype(name, size)
    except OSError:
        return None
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


@lru_cache(maxsize=4096)
def _has_glyph(name: str | None, size: int, character: str) -> bool:
    # A font draws one sign for all characters that it lacks, such as U+FFFF, which none has.
    return character.isascii() or _drawn(name, size, character) != _drawn(name, size, "\uffff")


def _drawn(name: str | None, size: int, character: str) -> bytes:
    image = Image.new("L", (2 * size, 2 * size))
    ImageDraw.Draw(image).text((0, 0), character, fill=255, font=_font(name, size))
    return image.tobytes()
