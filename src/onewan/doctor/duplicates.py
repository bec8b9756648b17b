"""Clips that are in a data set twice: by their content, and by what they look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onewan.doctor.pixels import HASH_BITS

_ALIKE = 4 / HASH_BITS
"""Share of the bits of two hashes that may differ. Other scenes differ in half of them; another
size, compression or a light correction of colors changes a few."""
_ROWS = 256
"""Hashes that are compared with all others at a time; bounds the memory."""
_ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


def same_content(digests: Sequence[str]) -> dict[int, int]:
    """For each index of a digest that came before: that earlier index."""
    first: dict[str, int] = {}
    return {
        index: first[digest]
        for index, digest in enumerate(digests)
        if first.setdefault(digest, index) != index
    }


def alike(hashes: Mapping[int, bytes]) -> dict[int, int]:
    """For each index of a hash that is nearly the same as an earlier one: the first such index.

    Hashes of another length, those of images among videos, are not compared.
    """
    found: dict[int, int] = {}
    for length in {len(value) for value in hashes.values()}:
        indices = sorted(index for index, value in hashes.items() if len(value) == length)
        table = np.stack([np.frombuffer(hashes[index], np.uint8) for index in indices])
        limit = int(_ALIKE * 8 * length)
        for start in range(0, len(table), _ROWS):
            rows = table[start : start + _ROWS]
            before = table[: start + len(rows)]
            distance = np.zeros((len(rows), len(before)), np.uint16)
            for column in range(length):
                distance += _ONES[rows[:, column, None] ^ before[None, :, column]]
            near = distance <= limit
            # Only with those before it, so that of two one is named.
            near &= np.arange(len(before))[None] < (start + np.arange(len(rows)))[:, None]
            for row in np.flatnonzero(near.any(axis=1)):
                found[indices[start + row]] = indices[int(near[row].argmax())]
    return found
