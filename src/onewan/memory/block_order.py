"""Which blocks of a transformer are streamed, and which stay on the device. Imports no torch."""

from __future__ import annotations


def streamed_blocks(total: int, resident: int) -> tuple[int, ...]:
    """The indices, ascending, of the blocks of `total` that are streamed if `resident` ones stay.

    They are spread over the depth, so that loads and computations alternate. The order of
    preference reverses the bits of the index: of two sets one contains the other, so that another
    number of resident blocks reloads only the difference. From three streamed blocks of 30 or 40
    on, the largest distance between neighbours is at most twice the smallest. ValueError if
    `resident` is not between 0 and `total`.
    """
    if not 0 <= resident <= total:
        raise ValueError(f"{resident} resident blocks: a transformer has 0 to {total}")
    bits = max(total - 1, 0).bit_length()
    preferred = sorted(range(total), key=lambda index: _reversed_bits(index, bits))
    return tuple(sorted(preferred[: total - resident]))


def _reversed_bits(value: int, bits: int) -> int:
    return int(f"{value:0{bits}b}"[::-1], 2) if bits else 0
