"""Bytes of frozen weights in each form of storage, and of optimizer state for trained weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal, TypeAlias

from onewan.config.optimizer import (
    AdafactorOptimizer,
    AdamMiniOptimizer,
    AdamW8bitOptimizer,
    AdamWLowBitOptimizer,
    AdamWOffloadOptimizer,
    CameOptimizer,
    CustomOptimizer,
    LionOptimizer,
    MuonOptimizer,
    Optimizer,
    ProdigyOptimizer,
    ProdigyPlusOptimizer,
    SgdOptimizer,
)

Shape: TypeAlias = tuple[int, ...]
Storage = Literal["float32", "bfloat16", "float16", "fp8", "int8", "nf4"]

_NF4_BLOCK = 64
"""Weights that share one float32 scale in bitsandbytes' nf4 (``absmax``)."""
_EIGHT_BIT_BLOCK = 256
"""Values of 8-bit optimizer state that share one float32 scale, in bitsandbytes and torchao."""
_FOUR_BIT_BLOCK = 128
"""The same for torchao's 4-bit state."""
_EIGHT_BIT_FROM = 4096
"""Weights with fewer values keep float32 state, in bitsandbytes and torchao."""
_ADAM = 8  # bytes: two float32 moments


def matrix_bytes(storage: Storage, shape: tuple[int, int]) -> float:
    """Bytes of a linear layer's weight, (outputs, inputs), with its scales."""
    outputs, inputs = shape
    elements = outputs * inputs
    if storage in ("bfloat16", "float16"):
        return 2.0 * elements
    if storage == "float32":
        return 4.0 * elements
    if storage == "nf4":
        return elements / 2 + 4 * elements / _NF4_BLOCK + 4 * 16  # and the 16 levels
    return elements + 4.0 * outputs  # one byte a weight, one float32 scale a row


@dataclass(frozen=True, slots=True, kw_only=True)
class StateBytes:
    """Bytes of the optimizer state of some weights."""

    device: int
    host: int = 0
    is_estimate: bool = False
    """Whether the optimizer is one whose state is not known exactly."""


def state_bytes(choice: Optimizer, shapes: Iterable[Shape]) -> StateBytes:
    """The state that `choice` keeps for weights of these shapes.

    Tested against the state of the real optimizers after one step. For an optimizer that
    `optimizer.class_path` names, that of AdamW is assumed.
    """
    shapes = list(shapes)
    total = sum(prod(shape) for shape in shapes)
    if isinstance(choice, AdamWOffloadOptimizer):
        # Float32 copies of weights and gradients, and both moments, all in host memory.
        return StateBytes(device=0, host=16 * total)
    estimate = isinstance(choice, CustomOptimizer | ProdigyPlusOptimizer | AdamMiniOptimizer)
    bytes_ = sum(_state_of(choice, shape) for shape in shapes)
    return StateBytes(device=round(bytes_), is_estimate=estimate)


def _state_of(choice: Optimizer, shape: Shape) -> float:
    """Bytes of the state of one weight."""
    elements = prod(shape)
    is_matrix = len(shape) >= 2
    factors = 4 * (shape[0] + elements // shape[0]) if is_matrix else 4 * elements
    if isinstance(choice, AdamW8bitOptimizer | AdamWLowBitOptimizer):
        if elements < _EIGHT_BIT_FROM:
            return _ADAM * elements
        bits = choice.bits if isinstance(choice, AdamWLowBitOptimizer) else "8"
        scales = 8 * elements / (_EIGHT_BIT_BLOCK if bits != "4" else _FOUR_BIT_BLOCK)
        # torchao keeps a table of levels for each weight.
        levels = 8 * 2 ** int(bits) if type(choice) is AdamWLowBitOptimizer and bits != "fp8" else 0
        return (1 if bits == "4" else 2) * elements + scales + levels
    if isinstance(choice, AdafactorOptimizer):
        return factors
    if isinstance(choice, CameOptimizer):
        # The first moment, and two factored statistics of matrices.
        return 4 * elements + (2 * factors if is_matrix else factors)
    if isinstance(choice, ProdigyPlusOptimizer):
        # z, and the second moment; its estimate of the rate uses every eleventh value.
        second = factors if choice.factored and is_matrix else 4 * elements
        return 4 * elements + second + 8 * elements / 11
    if isinstance(choice, ProdigyOptimizer):
        return 2 * _ADAM * elements  # and the initial weights, and the sum for the estimate
    if isinstance(choice, MuonOptimizer):
        return 4 * elements if is_matrix else _ADAM * elements
    if isinstance(choice, LionOptimizer | AdamMiniOptimizer):
        return 4 * elements
    if isinstance(choice, SgdOptimizer):
        return 4 * elements if choice.momentum else 0
    return _ADAM * elements  # AdamW, its schedule-free form, and an unknown optimizer
