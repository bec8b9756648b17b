"""Videos that were cut without encoding, within an open group of pictures."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import PictureType

from onewan.errors import DataError
from onewan.media import probe, read_frames
from onewan.media.cuts import find_cuts
from tests.support.numbered_video import SIZE, number_of, numbered_picture

FRAMES, FPS, GROUP = 120, 25, 24
NOTE = "cut within an open group of pictures, so that damage of its first seconds may not be found"


def written(path: Path, *, is_open: bool = True) -> Path:
    """A numbered video whose groups of pictures are open; B-frames are references, too."""
    keys = f"open-gop={int(is_open)}:keyint={GROUP}:min-keyint={GROUP}:scenecut=0"
    params = f"{keys}:bframes=3:b-pyramid=normal:repeat-headers=1"
    options = {"crf": "16", "preset": "ultrafast", "x264-params": params}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.colorspace = 1
        for number in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(numbered_picture(number), format="rgb24")
            if number % GROUP == GROUP - 1:  # so that no picture is shown before the key frame
                frame.pict_type = PictureType.P
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def cut(source: Path, path: Path) -> Path:
    """The packets of `source` from its second key frame on."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream, keys = new.add_stream_from_template(old.streams.video[0]), 0
        for packet in old.demux(video=0):
            keys += packet.is_keyframe and bool(packet.size)
            if keys >= 2 and packet.size:
                packet.stream = stream
                new.mux(packet)
    return path


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "ts"])
def test_a_video_that_was_cut_within_an_open_group_is_read(tmp_path: Path, suffix: str) -> None:
    path = cut(written(tmp_path / f"all.{suffix}"), tmp_path / f"cut.{suffix}")
    info = probe(path)
    assert NOTE in info.notes
    times = np.arange(info.start, info.last + 0.5 / FPS, 1 / FPS).tolist()
    numbers = [number_of(frame) for frame in read_frames(path, times)]
    assert numbers == list(range(GROUP, FRAMES))
    for first in (1, 5, GROUP, GROUP + 3, len(times) - 5):
        span = [number_of(frame) for frame in read_frames(path, times[first : first + 5])]
        assert span == numbers[first : first + 5]
    find_cuts(path)


def test_damage_is_still_found_where_the_first_group_is_closed(tmp_path: Path) -> None:
    path = written(tmp_path / "a.mkv")
    assert NOTE not in probe(path).notes
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        place = path.read_bytes().index(bytes(packets[6]))
    data = bytearray(path.read_bytes())
    data[place + 8 : place + 12] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    with pytest.raises(DataError, match="is damaged near"):
        read_frames(path, [k / FPS for k in range(20)])
