"""What the user should know about the clips of one file, as text for the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import inf
from typing import NamedTuple

from onewan.arithmetic.buckets import size_without_limit
from onewan.data.clip import SAME_RATE, Clip, ClipPlanner
from onewan.data.spans import Strategy
from onewan.media.colors import UNTAGGED

_NOTED_SECONDS = 1.0
"""What is not used of a video is mentioned from here on: a clip has 4n+1 frames, so that nearly
each has some left over."""
_PLACES: dict[Strategy, str] = {
    "uniform": "from its middle",
    "middle": "from its middle",
    "head": "from its beginning",
    "random": "from a random place",
    "keyframe": "from the scene or key frame nearest to its middle on",
}


class ClipNote(NamedTuple):
    """Something about the clips of one file."""

    about: str
    """What it is about, in a word or two for a table."""
    text: str


def clip_notes(planner: ClipPlanner, clips: Sequence[Clip], speed: float = 1.0) -> list[ClipNote]:
    """How the `clips` of one file, planned with `speed`, differ from the file, and from what the
    run file asks for."""
    clip = clips[0]
    notes = [ClipNote(_about(text), text) for text in clip.media_notes]
    if clip.fields is not None:
        which = "top" if clip.fields == "top_first" else "bottom"
        text = f"deinterlaced, with the {which} field first, as the run file says"
        notes.append(ClipNote("deinterlaced", text))
    elif clip.interlaced:
        notes.append(ClipNote("deinterlaced", "interlaced video, deinterlaced"))
    width, height = clip.source_size
    if clip.size[0] > width or clip.size[1] > height:
        text = f"scaled up from {width}x{height} to {clip.size[0]}x{clip.size[1]}"
        notes.append(ClipNote("scaled up", text))
    wanted = size_without_limit(
        width, height, planner.resolutions, planner.size_multiple, planner.max_resolution
    )
    if wanted is not None:
        limit = "x".join(map(str, planner.max_resolution))
        text = (
            f"trained at {clip.size[0]}x{clip.size[1]} instead of {wanted[0]}x{wanted[1]}, "
            f"since video_data.max_resolution is {limit}"
        )
        notes.append(ClipNote("size limit", text))
    if clip.kind == "video":
        notes += [
            *(ClipNote("slow", text) for text in _rate_notes(clip, planner.fps / speed)),
            *(ClipNote("in part", text) for text in _unused_notes(planner.frame_strategy, clips)),
            *(ClipNote("short", text) for text in _length_notes(planner, clips)),
        ]
    return notes


def _about(text: str) -> str:
    """What a note of `onewan.media` is about."""
    return "untagged" if text.startswith(UNTAGGED) else "colors"


def taken(clips: Sequence[Clip]) -> str:
    """What is taken of a video whose clips are `clips`: "87 frames at 30 fps -> 45 at 16 fps, 2.8 s
    of 2.9 s"."""
    clip = clips[0]
    # Variants have the span of the clip that they stand for.
    clips = [each for each in clips if each.variation is None]
    counts = sorted(Counter(each.frames for each in clips).items())
    if any(each.take for each in clips):
        what = " and ".join(f"one of {n} spans of {frames}" for frames, n in counts)
        each_pass = " in each pass"
    elif len(clips) == 1:
        what, each_pass = str(clip.frames), ""
    else:
        what = " and ".join(f"{n} clip{'s' * (n > 1)} of {frames}" for frames, n in counts)
        each_pass = ""
    frames = round(clip.source_seconds * clip.source_fps)
    return (
        f"{frames} frame{'s' * (frames != 1)} at {clip.source_fps:.4g} fps -> {what} at "
        f"{clip.fps:.4g} fps{each_pass}, {used_seconds(clips):.1f} s of "
        f"{clip.source_seconds:.1f} s"
    )


def used_seconds(clips: Sequence[Clip]) -> float:
    """How much of a video its `clips` cover, s; what several of them cover counts once."""
    total, covered = 0.0, -inf
    for clip in sorted(clips, key=lambda clip: clip.start):
        end = clip.start + clip.frames / clip.fps
        total += max(0.0, end - max(clip.start, covered))
        covered = max(covered, end)
    # The last frame of a clip may stand for a little more than the file has.
    return min(total, clips[0].source_seconds)


def _rate_notes(clip: Clip, wanted: float) -> list[str]:
    if clip.frames == 1 or clip.source_fps >= SAME_RATE * wanted:
        return []
    slow = f"{clip.source_fps:.4g} fps is less than the {wanted:.4g} that are trained on"
    if clip.fps >= SAME_RATE * wanted:
        return [f"{slow}, so some frames come twice (see video_data.slow_video)"]
    return [
        f"{slow}, so it is taken at its own rate and seems {wanted / clip.fps:.2f} times as fast "
        "(see video_data.slow_video)"
    ]


def _unused_notes(strategy: Strategy, clips: Sequence[Clip]) -> list[str]:
    used, clip = used_seconds(clips), clips[0]
    if clip.source_seconds - used < _NOTED_SECONDS:
        return []
    if clip.takes > 1:
        where = f"in {clip.takes} spans, one in each pass,"
    elif len(clips) > 1:
        where = f"in {len(clips)} clips"
    else:
        where = _PLACES.get(strategy, "in one clip")
    remedy = (
        ""
        if strategy in ("chunks", "sliding", "all")
        else " (wan_config.frame_sample_strategy: all makes clips of all of it)"
    )
    return [f"{clip.source_seconds:.1f} s long; {used:.1f} s {where} are used{remedy}"]


def _length_notes(planner: ClipPlanner, clips: Sequence[Clip]) -> list[str]:
    found = {clip.frames for clip in clips}
    missing = [length for length in planner.lengths if length not in found]
    if not missing:
        return []
    what = "the file" + (", each of its scenes" if planner.avoid_cuts else "")
    reason = f"{what} or video_data.max_duration is too short for more"
    frames, fps = max(found), clips[0].fps
    if frames in planner.lengths:  # so the longer ones are missing
        which = ", ".join(map(str, missing))
        return [f"no clip of {which} frames at {fps:.4g} fps: {reason}"]
    return [
        f"{frames} frame{'s' * (frames > 1)} at {fps:.4g} fps instead of {planner.lengths[0]}: "
        f"{reason}"
    ]
