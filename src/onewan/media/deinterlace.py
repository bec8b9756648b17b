"""Interlaced frames -> whole ones, by FFmpeg's bwdif filter.

A frame of interlaced video holds two fields, of which every second line is one, taken half a frame
apart. Shown as it is stored, all that moves has combs. The filter rebuilds the missing lines of
each frame's first field from its neighbors in space and time, and keeps the frame rate.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction

from av.error import BlockingIOError as NeedsAnotherError
from av.error import EOFError as NoneLeftError
from av.filter import Graph
from av.video.frame import VideoFrame


def deinterlaced(
    frames: Iterable[tuple[float, VideoFrame]],
) -> Iterator[tuple[float, VideoFrame]]:
    """`frames` with their times (s), in the same number and order; flagged ones deinterlaced.

    From the first frame that is flagged as interlaced on, each comes when its successor is read.
    """
    filtered: _Filter | None = None
    for time, frame in frames:
        if filtered is not None and not filtered.takes(frame):
            yield from filtered.rest()
            filtered = None
        if filtered is None and not frame.interlaced_frame:
            yield time, frame
            continue
        filtered = filtered or _Filter(frame)
        yield from filtered.add(time, frame)
    if filtered is not None:
        yield from filtered.rest()


class _Filter:
    """A filter graph for frames of one size and format, and the times of those inside it."""

    def __init__(self, frame: VideoFrame) -> None:
        self._shape = (frame.width, frame.height, frame.format.name)
        self._times = deque[float]()
        self._graph = Graph()
        nodes = [
            # A clock is required; the filter puts out the frames in order, one for each, so that
            # their own times are used.
            self._graph.add_buffer(
                width=frame.width,
                height=frame.height,
                format=frame.format,
                time_base=Fraction(1, 1000),
            ),
            self._graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced"),
            self._graph.add("buffersink"),
        ]
        self._graph.link_nodes(*nodes).configure()

    def takes(self, frame: VideoFrame) -> bool:
        return (frame.width, frame.height, frame.format.name) == self._shape

    def add(self, time: float, frame: VideoFrame) -> Iterator[tuple[float, VideoFrame]]:
        self._times.append(time)
        self._graph.push(frame)
        yield from self._ready()

    def rest(self) -> Iterator[tuple[float, VideoFrame]]:
        self._graph.push(None)
        yield from self._ready()

    def _ready(self) -> Iterator[tuple[float, VideoFrame]]:
        while self._times:
            try:
                frame = self._graph.pull()
            except (NeedsAnotherError, NoneLeftError):
                return
            assert isinstance(frame, VideoFrame)
            yield self._times.popleft(), frame
