"""Clips -> clips with the variants that their source asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from onewan.data.clip import Clip, alternatives


def with_variants(
    clips: Iterable[Clip], digests: Mapping[Path, str], seed: int
) -> tuple[Clip, ...]:
    """`clips` with the variants of each behind it, as alternatives to it.

    `digests` are those of the files' content by path: variants are drawn by content, so that a
    renamed file has the same ones.
    """
    found = list[Clip]()
    for group in alternatives(clips):
        augmentation = group[0].augmentation
        if augmentation is None:
            found += group
            continue
        variations = augmentation.variations(seed, digests[group[0].path])
        # The clips as they are come first: validation takes the first alternative.
        members = list(group)
        for number, variation in enumerate(variations, start=1):
            members += [
                replace(clip, variation=variation, name=f"{clip.name}, variant {number}")
                for clip in group
            ]
        found += [replace(clip, take=take, takes=len(members)) for take, clip in enumerate(members)]
    return tuple(found)
