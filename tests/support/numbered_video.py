"""Videos whose frames carry their number as a picture, at given times."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import av
import numpy as np

TICK = Fraction(1, 90_000)
"""The clock of the videos, s."""
SIZE = (64, 32)
_SQUARE = 16
_BITS = SIZE[0] * SIZE[1] // _SQUARE**2 * 2
_COLUMNS = SIZE[0] // _SQUARE

RATES = {
    "12": Fraction(12),
    "23.976": Fraction(24_000, 1001),
    "25": Fraction(25),
    "29.97": Fraction(30_000, 1001),
    "50": Fraction(50),
    "60": Fraction(60),
}


def steady(rate: Fraction, seconds: float) -> list[float]:
    """The times of frames at a constant rate, as the clock rounds them; s."""
    return [_rounded(index / rate) for index in range(round(seconds * rate))]


def variable(seconds: float) -> list[float]:
    """The times of frames between 1/60 and 1/10 s apart, s."""
    draw = np.random.default_rng(5)
    gaps = [Fraction(int(gap), 1000) for gap in draw.integers(17, 100, round(seconds * 17))]
    return [
        time for each in accumulate(gaps, initial=Fraction(0)) if (time := _rounded(each)) < seconds
    ]


def write_numbered(
    path: Path,
    times: Sequence[float],
    key_frame_every: int = 24,
    *,
    b_frames: int = 0,
    muxer: dict[str, str] | None = None,
) -> Path:
    """Write a video whose frame k, at ``times[k]``, shows k, with a caption file beside it.

    `muxer` are options of FFmpeg's muxer.
    """
    with av.open(str(path), "w", options=muxer or {}) as container:
        options = {"preset": "ultrafast", "crf": "20", "tune": "zerolatency", "bf": str(b_frames)}
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.time_base = TICK
        stream.codec_context.gop_size = key_frame_every
        ticks = [round(Fraction(time) / TICK) for time in times]
        # The last frame lasts as long as the one before it: the header's rate depends on it.
        gaps = dict(zip(ticks, [*np.diff(ticks), ticks[-1] - ticks[-2]], strict=True))
        for number, tick in enumerate([*ticks, None]):
            frame = None
            if tick is not None:
                frame = av.VideoFrame.from_ndarray(numbered_picture(number), format="rgb24")
                frame.pts, frame.time_base = tick, TICK
            for packet in stream.encode(frame):
                assert packet.time_base == TICK
                packet.duration = int(gaps[packet.pts or 0])
                container.mux(packet)
    path.with_suffix(".txt").write_text("numbers", encoding="utf-8")
    return path


def number_of(pixels: np.ndarray) -> int:
    """The number that a frame shows."""
    number = 0
    for square in range(_BITS // 2):
        row, column = divmod(square, _COLUMNS)
        inner = pixels[row * 16 + 4 : row * 16 + 12, column * 16 + 4 : column * 16 + 12]
        # Two bits in each square, as one of four grays.
        number |= round(float(inner.mean()) / 85) << 2 * square
    return number


def are_nearest(numbers: Sequence[int], times: Sequence[float], wanted: Sequence[float]) -> bool:
    """Whether the frames `numbers`, of those at `times`, are the nearest to the instants `wanted`;
    of two that are equally far, either."""
    all_times = np.array(times)
    distances = np.abs(all_times[None] - np.array(wanted)[:, None])
    found = distances[np.arange(len(wanted)), list(numbers)]
    return bool(np.all(found <= distances.min(axis=1) + 1e-6))


def numbered_picture(number: int) -> np.ndarray:
    """The picture that shows `number`: RGB uint8 [H, W, 3]."""
    pixels = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    for square in range(_BITS // 2):
        row, column = divmod(square, _COLUMNS)
        pixels[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = (
            number >> 2 * square & 3
        ) * 85
    return pixels


def _rounded(time: Fraction) -> float:
    return float(round(time / TICK) * TICK)
