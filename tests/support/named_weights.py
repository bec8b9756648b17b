"""Tensors whose values follow from their names, so that two programs can have the same weights
without a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from zlib import crc32

import numpy as np
import torch
from torch import Tensor


def named_tensor(name: str, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    """Standard normal float32 values times `scale`.

    NumPy promises that the stream of `RandomState` never changes.
    """
    values = np.random.RandomState(crc32(name.encode())).standard_normal(shape)
    return torch.from_numpy((values * scale).astype(np.float32))


def named_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A weight of each name and shape, of a size that keeps activations near 1.

    Those of the time embedding have the standard deviation of Wan's initialization, 0.02: with
    large ones, the rounding of diffusers' sinusoids (float32, where the official code has float64)
    would show.
    """

    def scale(name: str, shape: tuple[int, ...]) -> float:
        if name.startswith("time_"):
            return 0.02
        inputs = math.prod(shape[1:]) if len(shape) > 1 else 100
        return inputs**-0.5

    return {name: named_tensor(name, shape, scale(name, shape)) for name, shape in shapes.items()}
