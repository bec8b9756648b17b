"""The strips in which the VAE encodes what does not fit as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Strip(NamedTuple):
    """A part of the longer side of a picture, in latent cells."""

    inner: range
    """What is taken of it."""
    outer: range
    """What is computed: `inner` with its margins, as far as the picture goes."""


def strips_of(cells: int, number: int, margin: int) -> Iterator[Strip]:
    """`cells` in `number` strips of about one size, or in as many as there are cells."""
    number = min(number, cells)
    for index in range(number):
        inner = range(index * cells // number, (index + 1) * cells // number)
        yield Strip(inner, range(max(0, inner[0] - margin), min(cells, inner[-1] + 1 + margin)))


def widest_strip(cells: int, number: int, margin: int) -> int:
    """The cells of the widest strip, margins included."""
    return max(len(strip.outer) for strip in strips_of(cells, number, margin))
