"""The inputs of the comparison with VideoX-Fun's pipelines."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from onewan.arithmetic.condition_shares import Given
from onewan.variants import VariantName
from tests.support.named_weights import named_tensor

FRAMES, SIZE = 9, (32, 48)

CASES: Mapping[str, tuple[VariantName, Given, bool, bool]] = {
    "inp.none": ("fun-inp-a14b", "none", False, False),
    "inp.first": ("fun-inp-a14b", "first", False, False),
    "inp.both": ("fun-inp-a14b", "both", False, False),
    "inp.last": ("fun-inp-a14b", "last", False, False),
    "control.nothing": ("fun-control-a14b", "none", False, False),
    "control.control": ("fun-control-a14b", "none", True, False),
    "control.reference": ("fun-control-a14b", "none", True, True),
    "control.all": ("fun-control-a14b", "both", True, True),
}
"""Variant, given frames, whether there is a control video, whether a reference image."""


def fun_pixels() -> dict[str, Tensor]:
    """A clip, a control video and a reference image: [1, 3, F, H, W] in [-1, 1]."""
    shapes = {"clip": FRAMES, "control": FRAMES, "reference": 1}
    return {
        name: named_tensor(name, (1, 3, frames, *SIZE)).clamp(-2, 2) / 2
        for name, frames in shapes.items()
    }
