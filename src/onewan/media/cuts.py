"""Changes of scene in a video.

By the content detector of PySceneDetect (BSD-3) if it is installed (`onewan[cuts]`), and else by
the score of FFmpeg's `select` filter. Both get small frames from our own reader, since the times of
the cuts have to be those at which clips are read: PySceneDetect's readers do not know edit lists,
and count frames where a file's rate varies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from av.error import BlockingIOError as NothingYet
from av.error import EOFError as NothingMore
from av.filter import Graph
from av.video.frame import VideoFrame

from onewan.media.animation import animation_frames
from onewan.media.kinds import IMAGE_SUFFIXES, extension
from onewan.media.open_gop import tolerate_open_start
from onewan.media.video_frames import decode_frames
from onewan.media.video_stream import open_video

_SIDE = 128
"""Larger side of the frames that are compared, pixels: enough to tell scenes, quick to compare."""
_FFMPEG_SCORE = 0.3
"""Of FFmpeg's scene score, 0 to 1: from 0.3 to 0.5 by the documentation of its filter `select`."""
_FRAME = Fraction(1, 25)
"""The clock of the small frames, in which each takes one tick; s."""


class Cut(NamedTuple):
    """A change of scene."""

    before: float
    """Time of the last frame of the scene that ends, s."""
    after: float
    """Time of the first frame of the scene that begins, s."""


@cache
def cut_detector() -> str:
    """The name of the detector that `find_cuts` uses."""
    has_library = find_spec("scenedetect") is not None and find_spec("cv2") is not None
    return "PySceneDetect" if has_library else "FFmpeg's scene score"


def find_cuts(path: str | Path) -> tuple[Cut, ...]:
    """The changes of scene in a video or an animated image, in the order of time.

    Decodes the whole file. Raises `DataError` if it is damaged.
    """
    path = Path(path)
    if extension(path) not in IMAGE_SUFFIXES:
        with open_video(path, threads=0) as (container, stream):
            _, packets = tolerate_open_start(stream, container.demux(stream))
            return _cuts_of(decode_frames(path, stream, packets))
    return _cuts_of(
        (time, VideoFrame.from_image(image.convert("RGB")))
        for time, image in animation_frames(path)
    )


def _cuts_of(frames: Iterable[tuple[float, VideoFrame]]) -> tuple[Cut, ...]:
    times = list[float]()
    detect = _by_pyscenedetect if cut_detector() == "PySceneDetect" else _by_ffmpeg
    indices = list(detect(_small_frames(frames, times)))
    return tuple(Cut(times[index - 1], times[index]) for index in indices if index)


def _small_frames(
    frames: Iterable[tuple[float, VideoFrame]], times: list[float]
) -> Iterator[VideoFrame]:
    """The frames made small, each with its index as its time; appends their times to `times`."""
    size: tuple[int, int] | None = None
    for time, frame in frames:
        if size is None:
            scale = min(1.0, _SIDE / max(frame.width, frame.height))
            size = max(2, round(frame.width * scale)), max(2, round(frame.height * scale))
        small = frame.reformat(width=size[0], height=size[1], format="bgr24")
        small.pts, small.time_base = len(times), _FRAME
        times.append(time)
        yield small


def _by_pyscenedetect(frames: Iterable[VideoFrame]) -> Iterator[int]:
    """Indices of the first frames of scenes."""
    # The extra is not installed where types are checked.
    from scenedetect import FrameTimecode  # pyright: ignore[reportMissingImports]
    from scenedetect.detectors import ContentDetector  # pyright: ignore[reportMissingImports]

    # Without a least length of scenes: a clip must not cross the cuts of a quick sequence either.
    detector: Any = ContentDetector(min_scene_len=0)
    for index, frame in enumerate(frames):
        # Frames are counted here, so any rate will do.
        for cut in detector.process_frame(FrameTimecode(index, 25.0), frame.to_ndarray()):
            yield int(cut.frame_num)


def _by_ffmpeg(frames: Iterable[VideoFrame]) -> Iterator[int]:
    """Indices of the first frames of scenes."""
    graph = Graph()
    for frame in frames:
        if not frame.pts:  # the first one
            ends = [
                graph.add_buffer(
                    width=frame.width, height=frame.height, format=frame.format, time_base=_FRAME
                ),
                graph.add("select", f"gt(scene,{_FFMPEG_SCORE})"),
                graph.add("buffersink"),
            ]
            graph.link_nodes(*ends).configure()
        graph.push(frame)
        while True:
            try:
                cut = graph.pull()
            except (NothingYet, NothingMore):
                break
            yield cut.pts or 0
