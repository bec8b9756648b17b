"""The list of a run's clips in its folder: what was trained on, one JSON object a line.

The first line counts, the others are a clip or a file that could not be used each. The list is that
of the last process that trained the run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onewan.data.clip import Clip, count_clips
from onewan.data.report import DatasetReport
from onewan.files import replacing


def write_clip_list(path: Path, report: DatasetReport) -> None:
    """Write the clips of `report`, those that are held out, and the files that can't be used.

    OSError if it can't be written.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for line in _lines(report):
            file.write(json.dumps(line) + "\n")


def clip_data(clip: Clip, *, is_held_out: bool) -> dict[str, Any]:
    """What is taken of a clip's file, as plain data."""
    image, control = clip.conditions.image, clip.conditions.control
    return {
        "name": clip.name,
        "path": str(clip.path),
        "kind": clip.kind,
        "start": clip.start,
        "end": clip.times()[-1],
        "fps": clip.fps,
        "frames": clip.frames,
        "width": clip.size[0],
        "height": clip.size[1],
        "source_width": clip.source_size[0],
        "source_height": clip.source_size[1],
        "source_seconds": clip.source_seconds,
        "source_fps": clip.source_fps,
        "alternatives": clip.takes,
        "captions": list(clip.captions),
        "held_out": is_held_out,
        "fields": clip.fields,
        "mask": None if clip.mask is None else clip.mask.path.name,
        "condition_image": None if image is None else image.path.name,
        "condition_frame": clip.conditions.frame,
        "control": None if control is None else control.path.name,
        "timesteps": [clip.timesteps.t_min, clip.timesteps.t_max],
    }


def _lines(report: DatasetReport) -> Iterator[dict[str, Any]]:
    yield {
        "line": "counts",
        "clips": count_clips(report.clips),
        "listed": len(report.clips) + len(report.validation_clips),
        "held_out": len(report.validation_clips),
        "left_out": len(report.problems),
        "contact_sheet": [str(page) for page in report.contact_sheet_pages],
    }
    for is_held_out, clips in ((False, report.clips), (True, report.validation_clips)):
        for clip in clips:
            yield {"line": "clip", **clip_data(clip, is_held_out=is_held_out)}
    for problem in report.problems:
        yield {"line": "left out", "path": str(problem.path), "reason": problem.reason}
