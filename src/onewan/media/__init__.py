"""Files <-> frames: inspect a media file, read frames at given times, write a video.

Hides PyAV and Pillow: containers, seeking, codecs, broken timestamps, colors, rotation, damage.
All pixels are numpy arrays, upright RGB uint8 [H, W, 3], and every fault of a file is one
`DataError` that names it. Times are in the video stream's own clock in seconds, as in the file, so
the first frame need not be at 0.

Colors: pixels are converted to RGB by the matrix (BT.601, 709, 2020) and range that the stream is
tagged with, at any bit depth, or by its size where it has no tags; HDR is brought to SDR (`hdr`),
wide primaries to those of BT.709 (`gamut`); interlaced frames are deinterlaced. What was assumed or
changed is in `MediaInfo.notes`.

Never imports torch, never holds more than two full-size frames, and never decodes beyond the last
requested frame (of interlaced video, four and one more).

Damage: FFmpeg's decoders are told to raise errors instead of concealing what they can't decode,
the checksums of PNG are compared, JPEG and GIF are read by two decoders, and `cut_off` compares the
sizes in a container's headers with the file. Formats without checksums leave damage that no decoder
can tell from a picture: most of it in VP9, WebP and HEVC, some in H.264, JPEG and GIF.

`kinds` has the file extensions, `faults` the one boundary to the libraries' exceptions, `probe`
inspects files, `read` selects frames by time; `video_stream` opens files, seeks and converts times,
`video_frames` decodes and converts to RGB, with `colors`, `hdr`, `gamut` and `deinterlace`; `still`
reads and fits images, `write` writes videos, `contact_sheet` draws small frames of many clips on a
page.
"""

from onewan.media.deinterlace import FieldOrder, field_order
from onewan.media.kinds import (
    IMAGE_SUFFIXES,
    UNREAD_IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    extension,
)
from onewan.media.probe import (
    PROBE_VERSION,
    MediaInfo,
    describe,
    keyframe_near,
    probe,
    probe_header,
)
from onewan.media.read import read_frames
from onewan.media.still import RGB, WHITE, Fit, fit_image, read_image
from onewan.media.write import check_video_name, write_video

__all__ = [
    "IMAGE_SUFFIXES",
    "PROBE_VERSION",
    "RGB",
    "UNREAD_IMAGE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "WHITE",
    "FieldOrder",
    "Fit",
    "MediaInfo",
    "check_video_name",
    "describe",
    "extension",
    "field_order",
    "fit_image",
    "keyframe_near",
    "probe",
    "probe_header",
    "read_frames",
    "read_image",
    "write_video",
]
