"""Clips for tests of the data: `clip` without a file, `planner` for small videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onewan.data.clip import Clip, ClipPlanner


def clip(name: str, **fields: Any) -> Clip:
    """A clip that says it is the file `name`, with `fields` of `Clip`."""
    defaults: dict[str, Any] = {
        "captions": ("a test",),
        "kind": "video",
        "start": 0.0,
        "fps": 16.0,
        "frames": 5,
        "size": (64, 64),
        "source_size": (64, 64),
        "repeats": 1,
    }
    return Clip(path=Path(name), name=name, **(defaults | fields))


def planner(**fields: Any) -> ClipPlanner:
    """A planner of clips of 17 frames at 16 fps of about 64x64 pixels, or as `fields` say."""
    defaults: dict[str, Any] = {
        "seed": 7,
        "fps": 16.0,
        "max_frames": 17,
        "max_duration": 10.0,
        "frame_strategy": "uniform",
        "resolutions": (64 * 64,),
        "min_resolution": (32, 32),
        "max_resolution": (1024, 1024),
        "video_formats": ("mp4", "avi", "mov", "webm"),
        "size_multiple": 16,
        "temporal_compression": 4,
    }
    return ClipPlanner(**(defaults | fields))
