"""Videos that begin within an open group of pictures, as cutting without encoding makes them.

A group is open if some of its pictures refer to the group before it: its key frame is then no
instantaneous refresh (IDR) of H.264. Where the group before was cut away, commands about its
pictures are left, which FFmpeg's decoder takes for damage if it is to report damage.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain

import av
from av.video.stream import VideoStream

_IDR = 5
"""nal_unit_type of ITU-T H.264, table 7-1."""


def tolerate_open_start(
    stream: VideoStream, packets: Iterable[av.Packet]
) -> tuple[bool, Iterator[av.Packet]]:
    """Whether the first of `packets`, all packets of the file, begin an open group of H.264; and
    the packets from its key frame on.

    If so, the decoder, which must not have begun, is told to make up for what is missing, and does
    not find all damage any more.
    """
    packets = iter(packets)
    first = next((each for each in packets if each.size and each.is_keyframe), None)
    context = stream.codec_context
    is_open = (
        first is not None
        and context.name == "h264"
        and _IDR not in _nal_types(bytes(first), context.extradata or b"")
    )
    if is_open:
        context.options = {**context.options, "err_detect": "crccheck"}
    return is_open, packets if first is None else chain([first], packets)


def _nal_types(data: bytes, extradata: bytes) -> Iterator[int]:
    if extradata[:1] != b"\1":  # as in MPEG-TS: behind start codes
        yield from (match[1][0] & 31 for match in re.finditer(rb"\x00\x00\x01(.)", data, re.DOTALL))
        return
    # As in MP4 and Matroska: behind their lengths (ISO/IEC 14496-15, AVCDecoderConfigurationRecord)
    size, position = (extradata[4] & 3) + 1, 0
    while position + size < len(data):
        yield data[position + size] & 31
        position += size + int.from_bytes(data[position : position + size], "big")
