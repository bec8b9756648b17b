"""The values of GGUF's packed types, by ordinary operators on the device that the bytes are on.

Own code, since diffusers' decoders create their constants on the host at each call. Copying those
to the device makes the host wait for it, once for each layer and use. Constants here are plain
numbers, or `levels`, which the layer keeps beside its bytes.

The layouts are those of ggml's ``block_q4_K`` and so on (``ggml-common.h``); tests compare the
values bit-exact with the `gguf` package's. Shapes: n blocks, each of 32 or 256 values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the 4-bit elements of ``IQ4_NL`` and ``IQ4_XS`` stand for."""


def _half(data: Tensor) -> Tensor:
    """Bytes [n, 2] as float16, in float32: [n, 1]."""
    return data.view(torch.float16).float()


def _fields(data: Tensor, bits: int) -> Tensor:
    """The fields of `bits` bits of each byte in `data` [n, k, m], lowest first: [n, k, f, m]."""
    mask = (1 << bits) - 1
    return torch.stack([data >> shift & mask for shift in range(0, 8, bits)], 2)


def _signed(unsigned: Tensor, offset: int) -> Tensor:
    return unsigned.view(torch.int8) - offset


def _one_bits(data: Tensor) -> Tensor:
    """The bits of the bytes [n, 4] as integers, the lowest first: [n, 32]."""
    return _fields(data.unsqueeze(2), 1).flatten(1)


def _q4_0(blocks: Tensor) -> Tensor:
    d, q = blocks.split([2, 16], 1)
    return _half(d) * _signed(_fields(q.unsqueeze(1), 4).flatten(1), 8)


def _q4_1(blocks: Tensor) -> Tensor:
    d, m, q = blocks.split([2, 2, 16], 1)
    return _half(d) * _fields(q.unsqueeze(1), 4).flatten(1) + _half(m)


def _q5_0(blocks: Tensor) -> Tensor:
    d, high, low = blocks.split([2, 4, 16], 1)
    q = _fields(low.unsqueeze(1), 4).flatten(1) | _one_bits(high) << 4
    return _half(d) * _signed(q, 16)


def _q5_1(blocks: Tensor) -> Tensor:
    d, m, high, low = blocks.split([2, 2, 4, 16], 1)
    q = _fields(low.unsqueeze(1), 4).flatten(1) | _one_bits(high) << 4
    return _half(d) * q + _half(m)


def _q8_0(blocks: Tensor) -> Tensor:
    d, q = blocks.split([2, 32], 1)
    return _half(d) * q.view(torch.int8)


def _q2_k(blocks: Tensor) -> Tensor:
    scales, q, d, smallest = blocks.split([16, 64, 2, 2], 1)
    factor = (_half(d) * (scales & 15)).unsqueeze(2)
    offset = (_half(smallest) * (scales >> 4)).unsqueeze(2)
    return factor * _fields(q.unflatten(1, (2, 32)), 2).reshape(-1, 16, 16) - offset


def _q3_k(blocks: Tensor) -> Tensor:
    high, low, packed, d = blocks.split([32, 64, 12, 2], 1)
    of_four, of_two = packed.split([8, 4], 1)
    scales = _fields(of_four.unsqueeze(1), 4).flatten(1)
    scales = scales | _fields(of_two.unsqueeze(1), 2).flatten(1) << 4
    factor = (_half(d) * _signed(scales, 32)).unsqueeze(2)
    # The third bit is stored inverted: a value without it is smaller by 4.
    third = _fields(high.unsqueeze(1), 1).reshape(-1, 16, 16)
    q = _fields(low.unflatten(1, (2, 32)), 2).reshape(-1, 16, 16) | third << 2
    return factor * _signed(q, 4)


def _scales_and_offsets(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 6-bit scales and offsets [n, 8] of Q4_K and Q5_K, from their 12 bytes."""
    scales, offsets, rest = packed.split([4, 4, 4], 1)
    more_scales = (rest & 15) | (scales >> 6 << 4)
    more_offsets = (rest >> 4) | (offsets >> 6 << 4)
    return torch.cat([scales & 63, more_scales], 1), torch.cat([offsets & 63, more_offsets], 1)


def _q4_k(blocks: Tensor) -> Tensor:
    d, smallest, packed, q = blocks.split([2, 2, 12, 128], 1)
    scales, offsets = _scales_and_offsets(packed)
    values = _fields(q.unflatten(1, (4, 32)), 4).reshape(-1, 8, 32)
    factor, offset = _half(d) * scales, _half(smallest) * offsets
    return factor.unsqueeze(2) * values - offset.unsqueeze(2)


def _q5_k(blocks: Tensor) -> Tensor:
    d, smallest, packed, high, low = blocks.split([2, 2, 12, 32, 128], 1)
    scales, offsets = _scales_and_offsets(packed)
    values = _fields(low.unflatten(1, (4, 32)), 4).reshape(-1, 8, 32)
    values = values | _fields(high.unsqueeze(1), 1).reshape(-1, 8, 32) << 4
    factor, offset = _half(d) * scales, _half(smallest) * offsets
    return factor.unsqueeze(2) * values - offset.unsqueeze(2)


def _q6_k(blocks: Tensor) -> Tensor:
    low, high, scales, d = blocks.split([128, 64, 16, 2], 1)
    q = _fields(low.unflatten(1, (2, 64)), 4).flatten(1)
    q = q | _fields(high.unflatten(1, (2, 32)), 2).flatten(1) << 4
    factor = (_half(d) * scales.view(torch.int8)).unsqueeze(2)
    return factor * _signed(q, 32).unflatten(1, (16, 16))


def _levels(levels: Tensor, elements: Tensor) -> Tensor:
    return levels.index_select(0, elements.flatten().int()).view(elements.shape)


def _iq4_nl(blocks: Tensor, levels: Tensor) -> Tensor:
    d, q = blocks.split([2, 16], 1)
    return _half(d) * _levels(levels, _fields(q.unsqueeze(1), 4).flatten(1))


def _iq4_xs(blocks: Tensor, levels: Tensor) -> Tensor:
    d, high, low, q = blocks.split([2, 2, 4, 128], 1)
    scales = _fields(low.unsqueeze(2), 4).flatten(1) | _fields(high.unsqueeze(2), 2).flatten(1) << 4
    factor = (_half(d) * _signed(scales, 32)).unsqueeze(2)
    return factor * _levels(levels, _fields(q.unflatten(1, (8, 16)), 4).reshape(-1, 8, 32))


DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
"""By GGUF's name: blocks, uint8 [n, bytes], to float32 values in the order of the matrix."""

DECODERS_WITH_LEVELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
"""The same for types whose elements stand for `IQ4_LEVELS`, the second argument, float32 [16]."""
