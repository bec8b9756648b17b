"""Interlaced video whose stream does not say so: it is found, and deinterlaced on demand."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import get_args

import av
import numpy as np
import pytest
from PIL import Image

from onewan.media import FieldOrder, field_order, probe, read_frames

ORDERS: tuple[FieldOrder, ...] = get_args(FieldOrder)
STEP = 3
"""Pixels by which the picture moves from one field to the next."""


def moving(fields: int, *, sideways: bool = True) -> Iterator[np.ndarray]:
    """A gray picture of soft shapes that moves to the left, or up: uint8 [96, 160, 3] for each
    field. Without colors, which a frame in 4:2:0 can't keep apart by its fields."""
    random = np.random.default_rng(0)
    shapes = Image.fromarray(random.integers(0, 255, (20, 30), np.uint8))
    picture = np.asarray(shapes.resize((600, 400), Image.Resampling.BICUBIC).convert("RGB"))
    for number in range(fields):
        left, top = (STEP * number, 0) if sideways else (0, number)
        yield picture[top : top + 96, left : left + 160]


def woven(fields: Iterator[np.ndarray], order: FieldOrder) -> Iterator[np.ndarray]:
    """Frames of two fields each."""
    later = 1 if order == "top_first" else 0
    for first, second in zip(fields, fields, strict=True):
        frame = first.copy()
        frame[later::2] = second[later::2]
        yield frame


def write(path: Path, frames: Iterator[np.ndarray]) -> Path:
    """A video at 25 fps that is said to be progressive, nearly without loss."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"qp": "4"})
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def combs(frame: np.ndarray) -> float:
    """How much every second line differs from its neighbors, in levels."""
    lines = frame[8:-8].astype(float)
    return float(np.abs(lines[1:-1] - (lines[:-2] + lines[2:]) / 2).mean())


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_woven_fields_is_found(tmp_path: Path, order: FieldOrder) -> None:
    path = write(tmp_path / "a.mp4", woven(moving(60), order))
    assert not probe(path).interlaced
    for time in (0.0, 0.4, 5.0):
        assert field_order(path, time) == order
    few = write(tmp_path / "b.mp4", islice(woven(moving(60), order), 2))
    assert field_order(few, 0.0) == order


@pytest.mark.parametrize("sideways", [True, False])
def test_progressive_video_has_no_combs(tmp_path: Path, sideways: bool) -> None:
    frames = moving(30, sideways=sideways)
    assert field_order(write(tmp_path / "a.mp4", frames), 0.0) is None
    still = write(tmp_path / "b.mp4", (next(moving(1)) for _ in range(30)))
    assert field_order(still, 0.0) is None


def test_film_with_two_woven_frames_in_five_is_found(tmp_path: Path) -> None:
    """3:2 pulldown: the fields of four pictures become five frames, two of which are woven."""
    pictures = islice(moving(100), 0, None, 4)  # 24 a second
    fields = [p for index, p in enumerate(pictures) for _ in range(2 + index % 2)]
    path = write(tmp_path / "a.mp4", woven(iter(fields[: len(fields) // 2 * 2]), "top_first"))
    assert field_order(path, 0.0) == "top_first"


def test_real_clips_have_no_combs(clips: Path) -> None:
    """One of them moves slowly up and down, which FFmpeg's own threshold takes for combs."""
    for path in sorted((clips / "good").iterdir()):
        if path.suffix in (".mp4", ".mov", ".avi", ".webm"):
            assert field_order(path, 0.5) is None, path.name
    flagged = clips / "field" / "int_h264.mp4"
    if flagged.exists():
        assert field_order(flagged, 0.0) is None, "what is flagged is deinterlaced anyway"


@pytest.mark.parametrize("order", ORDERS)
def test_all_frames_are_deinterlaced_by_the_given_order(tmp_path: Path, order: FieldOrder) -> None:
    fields = list(moving(40))
    path = write(tmp_path / "a.mp4", woven(iter(fields), order))
    numbers = list(range(3, 15))
    times = [number / 25 for number in numbers]
    as_stored, shown = read_frames(path, times), read_frames(path, times, fields=order)
    other = read_frames(path, times, fields=next(each for each in ORDERS if each != order))
    for number, before, after, wrong in zip(numbers, as_stored, shown, other, strict=True):
        assert combs(before) > 4 * combs(after) and combs(after) < 1
        # The frame is the picture at the time of its first field.
        difference = np.abs(after.astype(float) - fields[2 * number])[8:-8, 8:-8].mean()
        assert difference < 4
        assert (
            difference < 0.5 * np.abs(wrong.astype(float) - fields[2 * number])[8:-8, 8:-8].mean()
        )
