"""Contact sheets: which clips and frames they show, where on the page, and when they are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.clips import clip as make_clip

from onewan.data.clip import Clip
from onewan.data.companions import Companion
from onewan.data.conditions import Conditions
from onewan.data.contact_sheet import (
    MAX_CLIPS,
    ContactSheet,
    Preview,
    clips_to_show,
    preview_frames,
    preview_indices,
    write_contact_sheet,
)
from onewan.media.contact_sheet import (
    Card,
    Layout,
    draw_page,
    small_frame,
    small_size,
    with_mask,
)

LANDSCAPE, PORTRAIT = (832, 480), (480, 832)


def plain(size: tuple[int, int], level: int) -> np.ndarray:
    """A frame of `size` (width, height) in one gray level."""
    return np.full((size[1], size[0], 3), level, np.uint8)


# --- Frames and their place ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "indices"), [(1, (0,)), (5, (0, 2, 4)), (17, (0, 8, 16)), (81, (0, 40, 80))]
)
def test_the_first_middle_and_last_frame_are_shown(frames: int, indices: tuple[int, ...]) -> None:
    assert preview_indices(frames) == indices


@pytest.mark.parametrize("size", [LANDSCAPE, PORTRAIT, (512, 512), (64, 48), (1280, 320)])
def test_small_frames_keep_their_shape(size: tuple[int, int]) -> None:
    width, height = small_size(*size)
    assert (width == 208 and height <= 176) or (height == 176 and width <= 208)
    assert width / height == pytest.approx(size[0] / size[1], rel=0.01)
    assert small_frame(plain(size, 90)).shape == (height, width, 3)
    assert (small_frame(plain(size, 90)) == 90).all()


def test_what_a_mask_leaves_out_is_covered_cell_by_cell() -> None:
    mask = np.array([[0.0, 1.0], [0.5, 1.0]])
    shown = with_mask(plain((20, 10), 100), mask).astype(int)
    assert (shown[:, 10:] == 100).all()
    assert (shown[:5, :10] == (160, 58, 76)).all()  # six tenths of the color
    assert (shown[5:, :10] == (130, 79, 88)).all()


def test_cards_are_equally_large_and_frames_lie_in_their_middle() -> None:
    cards = [
        Card(
            frames=tuple(small_frame(plain(size, level + i)) for i in range(3)),
            title="a clip",
            lines=("one", "two"),
        )
        for size, level in ((LANDSCAPE, 40), (PORTRAIT, 80), (LANDSCAPE, 120), (PORTRAIT, 160))
    ]
    layout = Layout.of([LANDSCAPE, PORTRAIT], frames=3, lines=3)
    assert layout.columns == 3 and layout.cards_per_page == 21
    page = np.asarray(draw_page(cards, layout, "fox")).astype(int)
    assert page.shape[0] < 2200 and page.shape[1] <= 2048
    width, height = layout.card
    corners = [(24 + column * (width + 16), 72) for column in range(3)] + [(24, 72 + height + 16)]
    for card, (left, top) in zip(cards, corners, strict=True):
        for index, frame in enumerate(card.frames):
            x = left + 10 + index * (208 + 4) + 208 // 2
            y = top + 10 + 176 // 2
            assert (page[y, x] == frame[0, 0]).all()
            half = frame.shape[1] // 2
            assert (page[y, x - half] == frame[0, 0]).all()
            assert (page[y, x + half - 1] == frame[0, 0]).all()
            assert half == 104 or (page[y, x - half - 2] != frame[0, 0]).all()


@pytest.mark.parametrize(
    "title",
    [
        "a_very_long_name_" * 30 + "0012.mp4",
        "caf\u00e9 \u65e5\u672c \u0416.mp4",
        "\udce9\u202egpj.mp4\n",
        "",
    ],
)
def test_any_name_stays_within_its_card(title: str) -> None:
    frame = small_frame(plain(LANDSCAPE, 90))
    layout = Layout.of([LANDSCAPE], frames=3, lines=1)
    cards = [Card(frames=(frame,) * 3, title=title, lines=()), Card(frames=(), title="", lines=())]
    page = np.asarray(draw_page(cards, layout, "fox")).astype(int)
    width, height = layout.card
    text = page[72 + height - 31 : 72 + height - 5]
    assert bool(title.strip()) == (text[:, 24 : 24 + width].min() < 100)
    assert (text[:, 24 + width - 8 : 24 + width - 4] == 255).all()
    assert text[:, 24 + width + 2 :].min() > 200


# --- The clips of a data set ---------------------------------------------------------------------


class GraySource:
    """A `PreviewSource` of gray frames, which counts what is asked of it."""

    def __init__(self) -> None:
        self.drawn = list[str]()

    def preview_key(self, clip: Clip) -> str:
        return clip.name

    def preview(self, clip: Clip) -> Preview:
        self.drawn.append(clip.name)
        frames = [plain(clip.size, 90)] * len(preview_indices(clip.frames))
        return Preview(frames=preview_frames(frames), mask=None)


def clips(number: int) -> list[Clip]:
    return [make_clip(f"{n:05}.mp4", size=LANDSCAPE) for n in range(number)]


def sheet_of(
    folder: Path, shown: Sequence[Clip], source: GraySource, held_out: Sequence[Clip] = ()
) -> ContactSheet:
    return write_contact_sheet(
        folder,
        "fox",
        source,
        shown,
        held_out=held_out,
        of_clips=len(shown),
        temporal_compression=4,
    )


def test_a_clip_in_two_sources_is_shown_once_and_large_data_sets_in_part() -> None:
    few = clips(3)
    twice = [*few, replace(few[1], repeats=2)]
    assert [clip.name for clip in clips_to_show(twice)] == [clip.name for clip in few]
    many = clips(5 * MAX_CLIPS)
    assert clips_to_show(many) == many[::5]


def test_a_sheet_is_drawn_again_only_if_something_on_it_has_changed(tmp_path: Path) -> None:
    source, shown = GraySource(), clips(4)
    sheet = sheet_of(tmp_path, shown, source)
    assert str(sheet) == (
        f"contact sheet, to see what is trained: {tmp_path / 'contact_sheet_fox.jpg'}"
    )
    assert source.drawn == [clip.name for clip in shown]
    (page,) = sheet.pages
    before = page.read_bytes()
    assert sheet_of(tmp_path, shown, source) == sheet and len(source.drawn) == 4

    for change in ({"captions": ("another",)}, {"start": 1.0}, {"repeats": 2}):
        sheet_of(tmp_path, [replace(shown[0], **change), *shown[1:]], source)
        assert page.read_bytes() != before
    sheet_of(tmp_path, shown, source, held_out=shown[:1])
    assert page.read_bytes() != before
    sheet_of(tmp_path, shown, source)
    assert page.read_bytes() == before
    drawn = len(source.drawn)
    page.write_bytes(before[:100])
    sheet_of(tmp_path, shown, source)
    assert page.read_bytes() == before and len(source.drawn) == drawn + 4


def test_many_clips_take_several_pages_and_surplus_ones_are_removed(tmp_path: Path) -> None:
    source = GraySource()
    sheet = sheet_of(tmp_path, clips(60), source)
    names = ["contact_sheet_fox.jpg", "contact_sheet_fox.2.jpg", "contact_sheet_fox.3.jpg"]
    assert [page.name for page in sheet.pages] == names
    assert str(sheet).endswith("contact_sheet_fox.jpg to contact_sheet_fox.3.jpg")
    heights = [Image.open(page).height for page in sheet.pages]
    assert heights[0] == heights[1] > heights[2]
    few = sheet_of(tmp_path, clips(2), source)
    assert sorted(file.name for file in tmp_path.iterdir()) == names[:1] == [few.pages[0].name]


def test_conditions_come_behind_the_frames_of_their_clip(tmp_path: Path) -> None:
    class WithConditions(GraySource):
        def preview(self, clip: Clip) -> Preview:
            own = clip.conditions.has_own_image
            added = [plain(clip.size, 40)] * (own + 3 * bool(clip.conditions.control))
            conditions = preview_frames(added) if added else None
            return replace(super().preview(clip), conditions=conditions)

    image, control = (
        Companion(path=Path(name), is_image=name.endswith("png"))
        for name in ("start.png", "depth.mp4")
    )
    shown = [
        replace(clips(1)[0], name="a.mp4"),
        replace(clips(1)[0], name="b.mp4", conditions=Conditions(image=image, control=control)),
    ]
    (page,) = sheet_of(tmp_path, shown, WithConditions()).pages
    # Two cards below each other, with room for the three frames, the image and three of the video.
    with Image.open(page) as opened:
        pixels = np.asarray(opened.convert("L")).astype(int)
    width, _ = small_size(*LANDSCAPE)
    left, top = 24 + 10, 2 * 24 + 24 + 10
    centers = [left + index * (width + 4) + width // 2 for index in range(7)]
    levels = [pixels[top + 20, x] for x in centers]
    assert [abs(level - 90) < 10 for level in levels] == [True] * 3 + [False] * 4
    below = pixels[top + 200 :]
    dark = [int((abs(below[:, x] - 40) < 10).sum()) for x in centers]
    assert [rows > 100 for rows in dark] == [False] * 3 + [True] * 4
