"""Which clips are held out of training, to validate on: by content, not by names or order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from onewan.data.index import Clip, Problem
from onewan.seeds import derive_seed


def without(
    clips: Sequence[Clip], held_out: Sequence[Clip], content: Mapping[Path, str]
) -> tuple[list[Clip], list[Problem]]:
    """The `clips` whose content is not held out, and one problem for each file that is in both.

    `content` are digests by path. A copy under another name is held out as well: a loss on what has
    been trained on says nothing.
    """
    names = {content[clip.path]: clip.name for clip in held_out}
    left = [clip for clip in clips if content[clip.path] not in names]
    in_both = dict.fromkeys(clip.path for clip in clips if content[clip.path] in names)
    return left, [
        Problem(
            path=path,
            reason=f"is in validation.sources too (as {names[content[path]]}), so it is held out "
            "and does not train; take it out of one of them",
        )
        for path in in_both
    ]


def split(
    clips: Sequence[Clip], share: float, seed: int, content: Mapping[Path, str]
) -> tuple[tuple[Clip, ...], tuple[Clip, ...]]:
    """(clips that train, clips that are held out): `share` of the files, rounded, at least one.

    `content` are digests by path. Each file has a rank, a hash of the seed and its content, and
    those of the lowest ranks are held out. So the choice does not depend on names and order, and a
    file that comes or goes moves at most one other file between the two. Files of equal content go
    together, and the first of them is measured. Clips that teach what the base model makes
    (``target: base``) are not chosen: what they show is not what is learned. One file that shows
    what is learned is left to train on, so with fewer than two of them none is held out.
    """
    eligible: dict[str, Clip] = {}
    for clip in clips:
        if not clip.is_prior:
            eligible.setdefault(content[clip.path], clip)
    if not share or len(eligible) < 2:
        return tuple(clips), ()
    number = min(max(1, int(share * len(eligible) + 0.5)), len(eligible) - 1)
    ranked = sorted(eligible, key=lambda digest: (derive_seed(seed, "held_out", digest), digest))
    chosen = set(ranked[:number])
    training = tuple(clip for clip in clips if content[clip.path] not in chosen)
    return training, tuple(clip for digest, clip in eligible.items() if digest in chosen)
