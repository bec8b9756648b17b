"""What is taken of each clip's file, in words: as a table for a terminal, and of one clip."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from onewan.arithmetic.clip_timesteps import ALL_TIMESTEPS
from onewan.data.augment import Variation
from onewan.data.clip import Clip
from onewan.data.clip_views import crop_of
from onewan.data.report import count
from onewan.doctor.finding import Finding

TABLE_ROWS = 40
"""Clips in the table on the terminal."""
_NAME_WIDTH = 36


def taken(clip: Clip) -> str:
    """What is taken of a clip's file, in words."""
    if clip.kind == "image":
        return "image"
    return f"{clip.start:.2f} to {clip.times()[-1]:.2f} s"


def conditions(clip: Clip) -> str:
    """What a model is given of a clip besides its frames and captions, in words; "" for nothing."""
    image, control = clip.conditions.image, clip.conditions.control
    texts = list[str]()
    if image is not None:
        texts.append(f"condition image {image.path.name}")
    elif clip.conditions.frame:
        texts.append(f"frame {clip.conditions.frame + 1} as condition image")
    if control is not None:
        texts.append(f"control video {control.path.name}")
    return ", ".join(texts)


def timesteps(clip: Clip) -> str:
    """At which timesteps a clip is trained, in words; "" if its source says nothing of them."""
    low, high = clip.timesteps.t_min, clip.timesteps.t_max
    own = f"timesteps {low:g} to {high:g}"
    return own if (low, high) != (ALL_TIMESTEPS.t_min, ALL_TIMESTEPS.t_max) else ""


def origin(clip: Clip) -> str:
    """What the clip's file is, in words."""
    size = f"{clip.source_size[0]}x{clip.source_size[1]}"
    if clip.kind == "image":
        return size
    return f"{size}, {clip.source_seconds:.2f} s, {clip.source_fps:.4g} fps"


def clip_facts(clip: Clip, *, is_held_out: bool) -> dict[str, str]:
    """What is taken of the clip's file and how it is trained, in words by name."""
    left, top, across, down = (f"{100 * part:.1f} %" for part in crop_of(clip))
    frames = f", {clip.frames} frames at {clip.fps:.4g} fps" if clip.frames > 1 else ""
    facts = {
        "File": f"{clip.path} ({origin(clip)})",
        "Taken": f"{taken(clip)}{frames}",
        "Trained at": f"{clip.size[0]}x{clip.size[1]}",
        "Crop": f"{across} of the width and {down} of the height, from {left} left and {top} top",
        "Changed": _changes(clip.variation) if clip.variation else "",
        "Each pass": f"one of {clip.takes} such clips" if clip.takes > 1 else "",
        "Repeats": f"{clip.repeats} in each epoch" if clip.repeats > 1 else "",
        "Loss weight": f"{clip.loss_weight:g}" if clip.loss_weight != 1 else "",
        "Timesteps": timesteps(clip),
        "Given": conditions(clip),
        "Validation": "held out, not trained on" if is_held_out else "",
    }
    return {name: value for name, value in facts.items() if value}


def _changes(variation: Variation) -> str:
    """What is different in a variant, in words."""
    factors = {
        "brightness": variation.brightness,
        "contrast": variation.contrast,
        "saturation": variation.saturation,
    }
    texts = ["mirrored"] if variation.mirrored else []
    texts += [f"{name} {factor:.2f}" for name, factor in factors.items() if factor != 1]
    texts += [f"hue turned by {variation.hue:.3f}"] if variation.hue else []
    return ", ".join(texts) or "another crop"


def findings_by_path(findings: Sequence[Finding]) -> dict[Path, list[Finding]]:
    """The findings about each file."""
    groups: dict[Path, list[Finding]] = {}
    for finding in findings:
        if finding.path is not None:
            groups.setdefault(finding.path, []).append(finding)
    return groups


def clip_table(
    clips: Sequence[Clip], about: Mapping[Path, Sequence[Finding]], held_out: Collection[Clip]
) -> Iterator[str]:
    """A line for each of the first clips: what is taken of it, what else belongs to it, and the
    kinds of the findings `about` its file."""
    shown = clips[:TABLE_ROWS]
    rows = [("clip", "taken", "frames", "fps", "trained at", "file", "notes")]
    rows += [_row(clip, about.get(clip.path, ()), clip in held_out) for clip in shown]
    widths = [max(_width(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (
            cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)
        )
        yield "  ".join(cells).rstrip()
    if others := len(clips) - len(shown):
        yield f"and {count(others, 'other')}, which --json lists"


def _row(clip: Clip, notes: Sequence[Finding], is_held_out: bool) -> tuple[str, ...]:
    own = (
        "held out" if is_held_out else "",
        "" if clip.mask is None else "mask",
        "condition image" if clip.conditions.has_own_image else "",
        "" if clip.conditions.control is None else "control video",
        timesteps(clip),
    )
    kinds = dict.fromkeys((*filter(None, own), *(note.kind for note in notes)))
    name = clip.name
    if len(name) > _NAME_WIDTH:
        name = f"...{name[3 - _NAME_WIDTH :]}"
    return (
        name,
        taken(clip),
        str(clip.frames),
        "" if clip.kind == "image" else f"{clip.fps:.4g}",
        f"{clip.size[0]}x{clip.size[1]}",
        origin(clip),
        ", ".join(kinds),
    )


def _width(text: str) -> int:
    """Columns that `text` takes on a terminal: Chinese, Japanese and Korean letters take two."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(unicodedata.combining(letter) > 0 for letter in text)
