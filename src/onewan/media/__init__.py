"""Files <-> frames: look at a media file, read frames at given times, write a video.

Hides PyAV and Pillow: containers, seeking, codecs, broken timestamps, colours, rotation, damage.
Everything that leaves is numpy, upright RGB uint8 [H, W, 3], and every fault of a file is one
`DataError` that names it. Time is the video stream's own clock in seconds, as the file has it, so a
first frame needn't be at 0.

Colours: pixels become RGB by the matrix (BT.601, 709, 2020) and range that the stream is tagged
with, at any bit depth; PyAV hands both tags to FFmpeg's swscale. A stream without tags counts as
BT.601, limited range, which is FFmpeg's rule and so that of nearly every other reader. Transfer
functions are left alone: HDR footage is not tone-mapped.

Never imports torch, never holds more full-size frames than one, and never decodes what lies behind
the last frame asked for.
"""

from onewan.media.kinds import IMAGE_SUFFIXES, VIDEO_SUFFIXES, extension
from onewan.media.read import MediaInfo, keyframe_near, probe, read_frames
from onewan.media.still import Fit, fit_image, read_image
from onewan.media.write import write_video

__all__ = [
    "IMAGE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "Fit",
    "MediaInfo",
    "extension",
    "fit_image",
    "keyframe_near",
    "probe",
    "read_frames",
    "read_image",
    "write_video",
]
