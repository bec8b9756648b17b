"""The tensors of an adapter on one layer: which kind they are, and whether their shapes fit each
other.

Works on names and shapes from a header; torch is not imported. `onewan.formats.lora` finds the
tensors of each layer by their keys, `onewan.formats.adapter` computes with them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Literal

from onewan.formats.backends import TensorInfo

AdapterKind = Literal["lora", "dora", "loha", "lokr", "oft", "difference"]

# Integers would be another quantization, whose scales no adapter format defines.
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

_CONVOLUTION_AXES = 5
"""Axes of the weight of Wan's only convolution, the patch embedding."""


def kind_of(parts: Mapping[str, object]) -> AdapterKind:
    """The kind of adapter that consists of these tensors."""
    if "lora_A" in parts:
        return "dora" if "magnitude" in parts else "lora"
    families: dict[str, AdapterKind] = {"hada_": "loha", "lokr_": "lokr", "oft_": "oft"}
    for start, kind in families.items():
        if any(part.startswith(start) for part in parts):
            return kind
    return "difference"


def shape_error(parts: Mapping[str, TensorInfo]) -> str | None:
    """What is wrong with the names, types and shapes of one module's tensors; None if nothing."""
    families = {
        re.split(r"[_.]", part)[0] for part in parts if part not in ("alpha", "magnitude", "diff_b")
    }
    if len(families) > 1:
        return f"mixes {' and '.join(sorted(parts))}"
    if not families and "diff_b" not in parts:
        return f"has {' and '.join(sorted(parts))} without weights"
    for part, info in parts.items():
        if info.dtype not in _FLOATS:
            return f"holds {part} as {info.dtype}, which are not weights"
    if "alpha" in parts and parts["alpha"].elements != 1:
        return f"has an alpha of shape {list(parts['alpha'].shape)}, not one value"
    shapes = {part: info.shape for part, info in parts.items()}
    kind = kind_of(parts)
    if kind in ("lora", "dora") or "lora_B" in parts or "lora_B.bias" in parts:
        error = _product_error(shapes, "lora_B", "lora_A", axes=_CONVOLUTION_AXES)
    elif kind == "loha":
        error = _product_error(shapes, "hada_w1_a", "hada_w1_b")
        error = error or _product_error(shapes, "hada_w2_a", "hada_w2_b")
        error = error or _loha_error(shapes)
    elif kind == "lokr":
        error = _lokr_error(shapes)
    elif kind == "oft":
        error = _oft_error(shapes)
    else:
        error = None
    return error or _magnitude_error(shapes)


def _product_error(
    shapes: Mapping[str, tuple[int, ...]], left: str, right: str, *, axes: int = 2
) -> str | None:
    """Why `left` @ `right` is not a product [out, r] @ [r, in]; None if it is. For more `axes`, the
    factors may also be those of a convolution, [out, r, 1, ...] and [r, in, sides of the kernel].
    """
    if missing := [part for part in (right, left) if part not in shapes]:
        return f"has no {' and '.join(missing)}"
    a, b = shapes[left], shapes[right]
    fits = len(a) in (2, axes) and len(b) in (2, axes) and prod(a[2:]) == 1
    if not fits or a[1] != b[0] or 0 in (*a, *b):
        return f"has {right} {list(b)} and {left} {list(a)}, not [r, in] and [out, r]"
    return None


def _loha_error(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    first, second = ([shapes[f"hada_w{n}_a"][0], shapes[f"hada_w{n}_b"][1]] for n in (1, 2))
    return None if first == second else f"has two products of {first} and {second}"


def _lokr_error(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    for factor in ("lokr_w1", "lokr_w2"):
        if factor not in shapes:
            if f"{factor}_a" not in shapes and f"{factor}_b" not in shapes:
                return f"has no {factor}"
            if error := _product_error(shapes, f"{factor}_a", f"{factor}_b"):
                return error
        elif len(shapes[factor]) != 2 or 0 in shapes[factor]:
            return f"has {factor} {list(shapes[factor])}, not a matrix"
    return None


def _oft_error(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    if "oft_blocks" in shapes:
        blocks = shapes["oft_blocks"]
        if len(blocks) != 3 or blocks[1] != blocks[2] or 0 in blocks:
            return f"has oft_blocks {list(blocks)}, not [blocks, size, size]"
        return None
    triangle = shapes["oft_R"]
    if len(triangle) != 2 or not triangle[0] or block_size(triangle[1]) is None:
        return f"has oft_R {list(triangle)}, not [blocks, size * (size - 1) / 2]"
    return None


def block_size(elements: int) -> int | None:
    """The size of a square matrix with this many elements above its diagonal; None if there is no
    such size."""
    # elements = size (size - 1) / 2, solved for size.
    size = round((1 + (1 + 8 * elements) ** 0.5) / 2)
    return size if elements and size * (size - 1) // 2 == elements else None


def _magnitude_error(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why the magnitude is not one value per output, [out] or [out, 1], or per input, [1, in]."""
    magnitude = shapes.get("magnitude")
    if magnitude is None:
        return None
    size = _product_size(shapes)
    if size is None:
        return "has a magnitude without the two factors that it scales"
    out, into = size
    # PEFT writes [out], LyCORIS [out, 1] or, for DoRA by inputs, [1, in].
    if magnitude in ((out,), (out, 1), (1, into)):
        return None
    return f"has a magnitude {list(magnitude)}, which fits neither {out} outputs nor {into} inputs"


def _product_size(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
    """(outputs, inputs) of the product of the factors; None if there are none. The factors have
    been checked."""
    if "lora_A" in shapes:
        return shapes["lora_B"][0], prod(shapes["lora_A"][1:])
    if "hada_w1_a" in shapes:
        return shapes["hada_w1_a"][0], shapes["hada_w1_b"][1]
    if any(part.startswith("lokr_") for part in shapes):
        sides = [
            shapes.get(f"lokr_w{n}") or (shapes[f"lokr_w{n}_a"][0], shapes[f"lokr_w{n}_b"][1])
            for n in (1, 2)
        ]
        return sides[0][0] * sides[1][0], sides[0][1] * sides[1][1]
    return None


def rank_of(parts: Mapping[str, TensorInfo]) -> int | None:
    for part in ("lora_A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if part in parts:
            return parts[part].shape[0]
    return None
