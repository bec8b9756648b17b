"""Interlaced frames -> whole ones, by FFmpeg's bwdif filter.

A frame of interlaced video holds two fields, of which every second line is one, taken half a frame
apart. Shown as it is stored, all that moves has combs. The filter rebuilds the missing lines of
each frame's first field from its neighbors in space and time, and keeps the frame rate.

Video that was converted without being deinterlaced has combs too, but nothing in it says so;
`field_order` finds that by FFmpeg's idet filter, which compares the fields of neighboring frames.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Literal

from av.error import BlockingIOError as NeedsAnotherError
from av.error import EOFError as NoneLeftError
from av.filter import Graph
from av.filter.context import FilterContext
from av.video.frame import VideoFrame

from onewan.media.video_frames import decode_frames
from onewan.media.video_stream import open_video_at

FieldOrder = Literal["top_first", "bottom_first"]
"""Which field of a frame was taken first: that of lines 0, 2, 4 and so on, or the other one."""

_TICK = Fraction(1, 1000)
"""The clock of the filters, s."""
_PARITY: dict[FieldOrder | None, str] = {
    None: "parity=auto:deint=interlaced",
    "top_first": "parity=tff:deint=all",
    "bottom_first": "parity=bff:deint=all",
}
_LOOKED_AT = 12
"""Frames in which `field_order` looks for combs."""
_COMBS = "intl_thres=1.2"
"""FFmpeg's default of 1.04 takes slow vertical motion of whole frames for combs."""
_FOUND = "lavfi.idet.multiple.current_frame"
"""What idet says of a frame by its neighbors too."""
_NOTED = 0.3
"""Share of these frames that have to have combs: of film at 30 frames per second, two in five."""
_AGREEING = 0.9
"""Share of the frames with combs that have to show the same order of their fields."""


def deinterlaced(
    frames: Iterable[tuple[float, VideoFrame]], fields: FieldOrder | None = None
) -> Iterator[tuple[float, VideoFrame]]:
    """`frames` with their times (s), in the same number and order; flagged ones deinterlaced, or
    all of them, whose `fields` have this order.

    From the first frame that is deinterlaced on, each comes when its successor is read.
    """
    filtered: _Filter | None = None
    for time, frame in frames:
        if filtered is not None and not filtered.takes(frame):
            yield from filtered.rest()
            filtered = None
        if filtered is None and fields is None and not frame.interlaced_frame:
            yield time, frame
            continue
        filtered = filtered or _Filter(frame, _PARITY[fields])
        yield from filtered.add(time, frame)
    if filtered is not None:
        yield from filtered.rest()


def field_order(path: Path, time: float) -> FieldOrder | None:
    """The order of the fields in frames that have the combs of interlaced video although they are
    not flagged as such; None if there are no combs, or too few to be certain.

    Decodes 12 frames from the key frame at or before `time` (s) on. Raises `DataError` if they are
    damaged.
    """
    detector: _CombDetector | None = None
    counts, total = Counter[FieldOrder](), 0
    with open_video_at(path, time, threads=1) as (stream, packets):
        for _, frame in islice(decode_frames(path, stream, packets), _LOOKED_AT):
            if frame.interlaced_frame:
                return None
            if detector is not None and not detector.takes(frame):
                break
            detector = detector or _CombDetector(frame)
            counts.update(detector.add(frame))
            total += 1
    if detector is not None:
        counts.update(detector.add(None))
    combed = sum(counts.values())
    if not combed or combed < _NOTED * total:
        return None
    order, number = counts.most_common(1)[0]
    return order if number >= _AGREEING * combed else None


class _CombDetector:
    """The filter graph that finds combs in frames of one size and format."""

    def __init__(self, frame: VideoFrame) -> None:
        self._shape, self._number = _shape(frame), 0
        graph = Graph()
        self._source = _source(graph, frame)
        idet, split = graph.add("idet", _COMBS), graph.add("split", "2")
        self._source.link_to(idet)
        idet.link_to(split)
        # Filters that let through the frames of one kind, since not all versions of PyAV give the
        # metadata of a frame.
        self._sinks: dict[FieldOrder, FilterContext] = {}
        orders: tuple[tuple[FieldOrder, str], ...] = (("top_first", "tff"), ("bottom_first", "bff"))
        for output, (order, name) in enumerate(orders):
            chosen = graph.add("metadata", f"mode=select:key={_FOUND}:value={name}")
            self._sinks[order] = graph.add("buffersink")
            split.link_to(chosen, output)
            chosen.link_to(self._sinks[order])
        graph.configure()
        self._graph = graph

    def takes(self, frame: VideoFrame) -> bool:
        return _shape(frame) == self._shape

    def add(self, frame: VideoFrame | None) -> dict[FieldOrder, int]:
        """How many more frames with combs are known now, by the order of their fields: of each it
        is known when its successor is added, and None, the end, makes the last one known."""
        if frame is not None:
            frame.pts, frame.time_base = self._number, _TICK
            self._number += 1
        self._source.push(frame)
        return {order: _count(sink) for order, sink in self._sinks.items()}


def _count(sink: FilterContext) -> int:
    """How many frames have come out at `sink`."""
    count = 0
    with suppress(NeedsAnotherError, NoneLeftError):
        while True:
            sink.pull()
            count += 1
    return count


class _Filter:
    """A filter graph for frames of one size and format, and the times of those inside it."""

    def __init__(self, frame: VideoFrame, parity: str) -> None:
        self._shape = _shape(frame)
        self._times = deque[float]()
        self._graph = Graph()
        nodes = [
            # A clock is required; the filter puts out the frames in order, one for each, so that
            # their own times are used.
            _source(self._graph, frame),
            self._graph.add("bwdif", f"mode=send_frame:{parity}"),
            self._graph.add("buffersink"),
        ]
        self._graph.link_nodes(*nodes).configure()

    def takes(self, frame: VideoFrame) -> bool:
        return _shape(frame) == self._shape

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


def _shape(frame: VideoFrame) -> tuple[int, int, str]:
    return frame.width, frame.height, frame.format.name


def _source(graph: Graph, frame: VideoFrame) -> FilterContext:
    """The beginning of a filter graph for frames such as `frame`."""
    return graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=_TICK
    )
