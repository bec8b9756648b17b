"""The forms in which the matrix of a `QuantizedLinear` is stored, and how each is read and made.

==================  ============================================  =================================
form                tensors, for a matrix [out, in]               value
==================  ============================================  =================================
``F8_E4M3``,        int8 [out, in]; scale float32: none, one,     element times scale
``F8_E5M2``         [out, 1], or [out, blocks of a row, 1]
``int8``            int8 [out, in]; scale float32 [out, 1]        element times scale
``nf4``             int8 [out, in / 2]; scale float32             level of the element times scale
                    [out * in / 64]; levels float32 [16]
GGUF's types        int8 [out, bytes of a row]; levels float32    as in the `gguf` package
                    [16] for IQ4
==================  ============================================  =================================

Values are computed in float32 and rounded once, to the type that is asked for. Reading works in
groups of rows, so beside the result it takes temporary memory for `GROUP` values only, and uses
nothing but ordinary PyTorch operators, so that it works on every device with the same bits.

``nf4`` is the 4-bit NormalFloat of QLoRA (arXiv 2305.14314, appendix E) with blocks of 64 values,
packed as in bitsandbytes, without its quantization of the scales. ``int8`` is symmetric.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from onewan.devices import is_host
from onewan.dtypes import FP8, from_safetensors_name
from onewan.formats.finite import all_finite
from onewan.model.gguf_forms import DECODERS, DECODERS_WITH_LEVELS, IQ4_LEVELS

GROUP = 1 << 23
"""Values that are converted at a time on a device. 32 MiB in float32: large enough that launching
the kernels takes a small part of the time, and small beside an expanded matrix of A14B (140 MB)."""

GROUP_ON_CPU = 1 << 18
"""The same on the CPU. 1 MiB, which stays in its cache; and larger temporary blocks between the
weights of a model that is being loaded would leave holes in the heap."""

NF4_BLOCK = 64
"""Values that share a scale in ``nf4``."""

_NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

Stored = tuple[Tensor, Tensor | None, Tensor | None]
"""(bytes as int8 [out, bytes of a row]; scale; levels) of a matrix. int8 instead of the type in the
file, since PEFT would create adapters in an 8-bit floating type, and transformers' T5 casts the
activations in front of ``wo`` to the type of its weight unless that is int8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageForm:
    """One form of storage."""

    expand: Callable[[Tensor, Tensor | None, Tensor | None, Tensor], None]
    """Writes the values of some rows (bytes, their scale, levels) into the last argument,
    [rows, in], of any floating type."""
    unit: tuple[int, int] = (1, 1)
    """The smallest group of values that takes whole bytes: (values, bytes)."""
    pack: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    """(elements, scale) of values, float32 [rows, in]; None for forms that only files have."""
    levels: tuple[float, ...] | None = None
    """The values that an element can stand for, where they are not a formula."""


def expanded(form: str, stored: Stored, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values [out, in] of a matrix `stored` in `form`, on its device, rounded to `dtype`."""
    rows, columns = shape_of(form, stored)
    result = torch.empty(rows, columns, dtype=dtype, device=stored[0].device)
    for group in _groups_of_rows(rows, columns, result.device):
        _expand(form, stored, group, result[group])
    return result


def packed(form: str, values: Tensor) -> Stored:
    """`values` [out, in], of any floating type, in `form`. The scale is not finite if a value is
    not. Each group of rows is computed in float32, with the same bits whatever the groups are."""
    return _packed(form, values.shape, lambda group: values[group].float())


def repacked(form: str, stored: Stored, new_form: str) -> Stored:
    """A matrix `stored` in `form` in `new_form`; its values are expanded by groups of rows."""
    rows, columns = shape_of(form, stored)

    def values(group: slice) -> Tensor:
        result = torch.empty(min(group.stop, rows) - group.start, columns)
        _expand(form, stored, group, result)
        return result

    return _packed(new_form, (rows, columns), values)


def _expand(form: str, stored: Stored, group: slice, out: Tensor) -> None:
    weight, scale, levels = stored
    _FORMS[form].expand(weight[group], _part(scale, group, len(weight)), levels, out)


def _packed(form: str, shape: tuple[int, ...], values: Callable[[slice], Tensor]) -> Stored:
    """A matrix of `shape` in `form`; `values` returns some of its rows, float32 on the CPU."""
    kind, (rows, columns) = _FORMS[form], shape
    assert kind.pack is not None
    in_unit, bytes_of_unit = kind.unit
    weight = torch.empty(rows, columns // in_unit * bytes_of_unit, dtype=torch.int8)
    scales: list[Tensor] = []
    for group in _groups_of_rows(rows, columns, weight.device):
        weight[group], scale = kind.pack(values(group))
        scales.append(scale)
    return weight, torch.cat(scales), levels_of(form)


def can_be_packed(form: str, shape: tuple[int, ...]) -> bool:
    """Whether a matrix of `shape` can be stored in `form`. All of Wan 2.2's can."""
    rows, columns = shape
    return form != "nf4" or (columns % 2 == 0 and rows * columns % NF4_BLOCK == 0)


def is_finite(form: str, stored: Stored) -> bool:
    """Whether no value is NaN or infinite. Not for GGUF, whose scales lie within the blocks: True,
    since a check would take expanding all weights."""
    weight, scale, _ = stored
    if scale is not None and not all_finite(scale):
        return False
    return form not in FP8 or all_finite(weight.view(from_safetensors_name(form)))


def shape_of(form: str, stored: Stored) -> tuple[int, int]:
    """(outputs, inputs) of a matrix."""
    rows, bytes_of_row = stored[0].shape
    in_unit, bytes_of_unit = _FORMS[form].unit
    return rows, bytes_of_row // bytes_of_unit * in_unit


def gguf_form_exists(gguf_type: str, columns: int) -> bool:
    """Whether a matrix of this type of GGUF can be expanded on every device. The `gguf` package
    decodes more types, on the CPU only; and in a flattened tensor blocks cross the ends of rows."""
    form = _FORMS.get(gguf_type)
    return form is not None and columns % form.unit[0] == 0


def levels_of(form: str) -> Tensor | None:
    """What the elements of a matrix in `form` stand for, float32 on the CPU; None if a formula says
    it."""
    levels = _FORMS[form].levels
    return None if levels is None else torch.tensor(levels)


def _groups_of_rows(rows: int, columns: int, device: torch.device) -> Sequence[slice]:
    # No block of `nf4` lies in two groups.
    unit = NF4_BLOCK // gcd(NF4_BLOCK, columns)
    size = GROUP_ON_CPU if is_host(device) else GROUP
    step = max(1, size // columns // unit) * unit
    return [slice(start, start + step) for start in range(0, rows, step)]


def _part(scale: Tensor | None, rows: slice, count: int) -> Tensor | None:
    """The part of a scale for some of `count` rows. It is of the whole matrix, or its first axis
    runs over the rows, or over the blocks of all of them."""
    if scale is None or scale.numel() == 1:
        return scale
    return scale[rows.start * len(scale) // count : rows.stop * len(scale) // count]


# ---------------------------------------------------------------------------------------- the forms


def _expand_elements(
    elements: Tensor, scale: Tensor | None, levels: Tensor | None, out: Tensor
) -> None:
    del levels
    if scale is None:
        out.copy_(elements)
        return
    # `out` may be narrower: the product is float32 and rounded when it is stored. PyTorch
    # multiplies no fp8 by float32, so that is converted first.
    values = elements.float() if elements.is_floating_point() else elements
    if scale.numel() == 1:
        torch.mul(values, scale.reshape(()), out=out)
    elif scale.ndim == 3:
        blocks = (len(values), scale.shape[1], -1)
        torch.mul(values.reshape(blocks), scale, out=out.view(blocks))
    else:
        torch.mul(values, scale, out=out)


def _fp8_form(name: str, **options: Any) -> StorageForm:
    dtype = from_safetensors_name(name)

    def expand(weight: Tensor, scale: Tensor | None, levels: Tensor | None, out: Tensor) -> None:
        _expand_elements(weight.view(dtype), scale, levels, out)

    return StorageForm(expand=expand, **options)


def _scaled_rows(values: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """(values over the scale, within `largest`; scale [rows, 1], which maps it to the row's largest
    magnitude)."""
    scale = values.abs().amax(1, keepdim=True) / largest
    # A row of zeros has the scale 0. The clamp matters where a denormal scale is imprecise.
    divisor = torch.where(scale > 0, scale, 1)
    return (values / divisor).clamp_(-largest, largest), scale


def _pack_fp8(values: Tensor) -> tuple[Tensor, Tensor]:
    elements, scale = _scaled_rows(values, torch.finfo(torch.float8_e4m3fn).max)
    return elements.to(torch.float8_e4m3fn).view(torch.int8), scale


def _pack_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    elements, scale = _scaled_rows(values, 127)
    return elements.round_().to(torch.int8), scale


def _pack_nf4(values: Tensor) -> tuple[Tensor, Tensor]:
    blocks = values.reshape(-1, NF4_BLOCK)
    scale = blocks.abs().amax(1)
    # As bitsandbytes computes it, down to the floor that keeps the reciprocal finite.
    relative = (blocks * (1 / scale.clamp(min=1e-38)).unsqueeze(1)).clamp_(-1, 1)
    # The index of the nearest level. `torch.bucketize` gives the same, in three times the time.
    levels = torch.tensor(_NF4_LEVELS)
    codes = torch.zeros_like(relative, dtype=torch.uint8)
    for middle in ((levels[:-1] + levels[1:]) / 2).tolist():
        codes += relative > middle
    codes = codes.reshape(len(values), -1)
    return (codes[:, ::2] << 4 | codes[:, 1::2]).view(torch.int8), scale


def _expand_nf4(weight: Tensor, scale: Tensor | None, levels: Tensor | None, out: Tensor) -> None:
    assert scale is not None and levels is not None
    # One look-up for each byte: the two levels that its halves stand for, the high half first.
    pairs = torch.cartesian_prod(levels, levels)
    values = pairs.index_select(0, weight.view(torch.uint8).flatten().int())
    blocks = (-1, NF4_BLOCK)
    torch.mul(values.view(blocks), scale.unsqueeze(1), out=out.view(blocks))


def _gguf_form(name: str) -> StorageForm:
    in_block, bytes_of_block = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    has_levels = name in DECODERS_WITH_LEVELS

    def expand(weight: Tensor, scale: Tensor | None, levels: Tensor | None, out: Tensor) -> None:
        del scale
        blocks = weight.view(torch.uint8).reshape(-1, bytes_of_block)
        if levels is None:
            values = DECODERS[name](blocks)
        else:
            values = DECODERS_WITH_LEVELS[name](blocks, levels)
        out.copy_(values.reshape(out.shape))

    levels = tuple(float(level) for level in IQ4_LEVELS) if has_levels else None
    return StorageForm(expand=expand, unit=(in_block, bytes_of_block), levels=levels)


_FORMS = {
    "F8_E4M3": _fp8_form("F8_E4M3", pack=_pack_fp8),
    "F8_E5M2": _fp8_form("F8_E5M2"),
    "int8": StorageForm(expand=_expand_elements, pack=_pack_int8),
    "nf4": StorageForm(expand=_expand_nf4, unit=(2, 1), pack=_pack_nf4, levels=_NF4_LEVELS),
    **{name: _gguf_form(name) for name in (*DECODERS, *DECODERS_WITH_LEVELS)},
}
