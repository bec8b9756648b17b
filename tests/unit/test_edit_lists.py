"""What a file's header says about its timeline and shape: edit lists, times before 0, changes."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from onewan.errors import DataError
from onewan.media import Fit, probe, probe_header, read_frames
from tests.support.numbered_video import SIZE, number_of, write_numbered

BEFORE_ZERO = {"avoid_negative_ts": "disabled"}
"""MP4's muxer then writes an edit list that begins at 0."""
TIMES = [k / 25 for k in range(-10, 90)]


def numbers_at(path: Path, times: list[float]) -> list[int]:
    return [number_of(frame) for frame in read_frames(path, times)]


def set_edits(path: Path, edits: list[tuple[float, float | None]]) -> Path:
    """Replaces the edit list of an MP4 whose index comes last: (length, start in the media) in s;
    a start of None is a pause."""
    data = bytearray(path.read_bytes())
    movie, media = (
        struct.unpack_from(">I", data, data.index(name) + 16)[0] for name in (b"mvhd", b"mdhd")
    )
    start = data.index(b"elst") - 4
    (old,) = struct.unpack_from(">I", data, start)
    box = struct.pack(">I4sII", 16 + 12 * len(edits), b"elst", 0, len(edits))
    for length, begin in edits:
        place = -1 if begin is None else round(begin * media)
        box += struct.pack(">IiI", round(length * movie), place, 1 << 16)
    for name in (b"moov", b"trak", b"edts"):
        position = data.index(name) - 4
        (size,) = struct.unpack_from(">I", data, position)
        struct.pack_into(">I", data, position, size + len(box) - old)
    data[start : start + old] = box
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("key_frame_every", [20, 250])
@pytest.mark.parametrize("b_frames", [0, 3])
@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
def test_frames_before_the_edit_list_are_not_shown(
    tmp_path: Path, name: str, b_frames: int, key_frame_every: int
) -> None:
    path = write_numbered(
        tmp_path / name, TIMES, key_frame_every, b_frames=b_frames, muxer=BEFORE_ZERO
    )
    info = probe(path)
    assert (info.start, info.last) == pytest.approx((0.0, 3.56))
    header = probe_header(path)
    assert (header.start, header.last) == pytest.approx((0.0, 3.56), abs=0.02)
    assert numbers_at(path, [-1.0, 0.0, 0.04]) == [10, 10, 11]
    for first in (0, 1, 9, 30, 77):
        wanted = [(first + k) / 25 for k in range(10)]
        assert numbers_at(path, wanted) == list(range(10 + first, 20 + first))


def test_times_before_zero_are_kept_where_they_are_shown(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "a.ts", TIMES, muxer=BEFORE_ZERO)
    info = probe(path)
    assert (info.start, info.last) == pytest.approx((-0.4, 3.56), abs=1e-4)
    assert numbers_at(path, [info.start + k / 25 for k in range(15)]) == list(range(15))


@pytest.mark.parametrize("b_frames", [0, 3])
@pytest.mark.parametrize(
    ("edits", "shown"),
    [
        # One part that ends early; two parts; the later part first; a pause and a part.
        ([(2.0, 0.4)], [(0.0, 10, 50)]),
        ([(1.0, 0.4), (1.0, 2.4)], [(0.0, 10, 25), (1.0, 60, 25)]),
        ([(1.0, 2.4), (1.0, 0.4)], [(0.0, 60, 25), (1.0, 10, 25)]),
        ([(0.48, None), (1.0, 0.4)], [(0.48, 10, 25)]),
    ],
)
@pytest.mark.parametrize("key_frame_every", [20, 250])
def test_all_parts_of_an_edit_list_are_shown(
    tmp_path: Path,
    key_frame_every: int,
    edits: list[tuple[float, float | None]],
    shown: list[tuple[float, int, int]],
    b_frames: int,
) -> None:
    path = write_numbered(
        tmp_path / "a.mp4", TIMES, key_frame_every, b_frames=b_frames, muxer=BEFORE_ZERO
    )
    # With B-frames, the first frame of the media is delayed by two frames.
    delay = 0.08 if b_frames else 0.0
    set_edits(path, [(a, None if b is None else b + delay) for a, b in edits])
    timeline = [
        (start + k / 25, number + k) for start, number, count in shown for k in range(count)
    ]
    if b_frames:
        # The same frames, but FFmpeg's times of a later part are up to two frames off.
        with av.open(str(path)) as container:
            decoded = [
                (frame.time, number_of(frame.to_ndarray(format="rgb24")))
                for frame in container.decode(video=0)
            ]
        assert [number for _, number in decoded] == [number for _, number in timeline]
        assert max(abs(a - b) for (a, _), (b, _) in zip(decoded, timeline, strict=True)) <= 0.081
        timeline = decoded
    info = probe(path)
    assert (info.start, info.last) == pytest.approx((timeline[0][0], timeline[-1][0]), abs=2e-3)
    # With B-frames within a part, since there the times of two parts overlap.
    for first in (0, 3, 10, 30, 38) if b_frames else (0, 3, 20, 24, len(timeline) - 5):
        part = timeline[first : first + 12] or timeline[-12:]
        assert numbers_at(path, [time + 1e-3 for time, _ in part]) == [n for _, n in part]


def write_changing(path: Path, shapes: list[tuple[tuple[int, int], Fraction]]) -> Path:
    """A transport stream of one second for each (size, sample aspect ratio)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        (stream.width, stream.height), stream.pix_fmt = SIZE, "yuv420p"
        for part, (size, aspect) in enumerate(shapes):
            encoder = av.CodecContext.create("libx264", "w")
            (encoder.width, encoder.height), encoder.pix_fmt = size, "yuv420p"
            encoder.time_base = Fraction(1, 25)
            encoder.sample_aspect_ratio = aspect
            encoder.options = {"tune": "zerolatency"}
            for number in range(25):
                picture = np.full((size[1], size[0], 3), 8 * number, np.uint8)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = 25 * part + number, Fraction(1, 25)
                for packet in encoder.encode(frame):
                    packet.stream = stream
                    container.mux(packet)
    return path


def test_a_change_of_shape_is_an_error_within_the_span_only(tmp_path: Path) -> None:
    square, wide = (SIZE, Fraction(1)), (SIZE, Fraction(4, 3))
    path = write_changing(tmp_path / "a.ts", [square, wide])
    start = probe(path).start
    for fit in (None, Fit(64, 32)):
        assert len(read_frames(path, [start, start + 0.8], fit)) == 2
        with pytest.raises(DataError, match=r"a\.ts: its shape changes at \d\.\d\d s; split"):
            read_frames(path, [start, start + 1.8], fit)


def test_frames_of_another_size_with_the_same_shape_are_scaled(tmp_path: Path) -> None:
    path = write_changing(tmp_path / "a.ts", [((128, 64), Fraction(1)), ((64, 32), Fraction(1))])
    start = probe(path).start
    assert read_frames(path, [start, start + 1.8], Fit(64, 32)).shape == (2, 32, 64, 3)
    with pytest.raises(DataError, match="its frame size changes"):
        read_frames(path, [start, start + 1.8])
