"""Which clips are held out of training to validate on: by content, not by name or order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from onewan.arithmetic.clip_timesteps import ClipTimesteps
from onewan.data.clip import Clip
from onewan.data.report import ClipProblem
from onewan.seeds import derive_seed

_DEFAULT_FRACTION = 0.1
_LEAST_FILES = 20
"""Of fewer files a tenth is one or none, which says little, and training needs all of them."""


def default_fraction(files: int) -> float:
    """The fraction of so many files that is held out where a run file names none."""
    return _DEFAULT_FRACTION if files >= _LEAST_FILES else 0.0


def exclude_validation_clips(
    clips: Sequence[Clip], validation_clips: Sequence[Clip], digests: Mapping[Path, str]
) -> tuple[list[Clip], list[ClipProblem]]:
    """The `clips` whose content is not validated on, and a problem for each file that is in both.

    `digests` are those of the files' content by path. A copy under another name is excluded too,
    since the loss on a clip that was trained on says nothing about other clips.
    """
    validated: dict[str, list[Clip]] = {}
    for clip in validation_clips:
        validated.setdefault(digests[clip.path], []).append(clip)

    def is_validated(clip: Clip) -> bool:
        return any(_overlap(clip, other) for other in validated.get(digests[clip.path], ()))

    remaining = [clip for clip in clips if not is_validated(clip)]
    in_both = dict.fromkeys(clip.path for clip in clips if is_validated(clip))
    return remaining, [
        ClipProblem(
            path=path,
            reason="is in validation.sources too (as "
            f"{validated[digests[path]][-1].name}), so it is held out of training; remove it from "
            "one of them",
        )
        for path in in_both
    ]


def split_validation_clips(
    clips: Sequence[Clip], fraction: float | None, seed: int, digests: Mapping[Path, str]
) -> tuple[tuple[Clip, ...], tuple[Clip, ...]]:
    """(training clips, validation clips): `fraction` of the files, rounded, at least one. None is a
    tenth of 20 files or more, and nothing of fewer.

    `digests` are those of the files' content by path. Files are ranked by a hash of the seed and
    their content, and those of the lowest ranks are held out. So the choice does not depend on
    names and order, and adding or removing a file moves at most one other file between the two.
    All clips of a file, and files of equal content, stay together, and the first of these files is
    validated on; of alternative spans the first. Prior-preservation clips (``target: base``) are
    not chosen, since validation measures how well the data are learned. At least one other file
    always remains for training, so with fewer than two of them none is held out; and where sources
    have timesteps of their own, one of each kind, so that no expert is left without clips.
    """
    eligible: dict[str, list[Clip]] = {}
    for clip in clips:
        if not clip.is_prior:
            eligible.setdefault(digests[clip.path], []).append(clip)
    if fraction is None:
        fraction = default_fraction(len(eligible))
    if not fraction or len(eligible) < 2:
        return tuple(clips), ()
    # Halves are rounded up; `round` would round them to the even neighbor.
    number = min(max(1, int(fraction * len(eligible) + 0.5)), len(eligible) - 1)
    # "held_out" is part of the name of the draw: another one would change every existing split.
    ranked = sorted(eligible, key=lambda digest: (derive_seed(seed, "held_out", digest), digest))
    kinds_of = _timesteps(clips, digests)
    remaining = Counter(kind for kinds in kinds_of.values() for kind in kinds)
    chosen = set[str]()
    for digest in ranked:
        if len(chosen) < number and all(remaining[kind] > 1 for kind in kinds_of[digest]):
            chosen.add(digest)
            remaining.subtract(kinds_of[digest])
    training = tuple(clip for clip in clips if digests[clip.path] not in chosen)
    held_out = list[Clip]()
    for digest in eligible:
        if digest in chosen:
            first, *_ = same_content = eligible[digest]
            # Each span once: the file may be in several sources.
            spans = {
                (clip.start, clip.frames): clip
                for clip in reversed(same_content)
                if clip.path == first.path and clip.take == 0
            }
            held_out += sorted(spans.values(), key=lambda clip: (clip.start, clip.frames))
    return training, tuple(held_out)


def _timesteps(clips: Sequence[Clip], digests: Mapping[Path, str]) -> dict[str, set[ClipTimesteps]]:
    """The timesteps at which each content is trained."""
    found: dict[str, set[ClipTimesteps]] = {}
    for clip in clips:
        found.setdefault(digests[clip.path], set()).add(clip.timesteps)
    return found


def _overlap(first: Clip, second: Clip) -> bool:
    """Whether two clips of one content may have frames in common."""
    (start, end), (other_start, other_end) = first.part or (0.0, None), second.part or (0.0, None)
    return (end is None or other_start < end) and (other_end is None or start < other_end)
