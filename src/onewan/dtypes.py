"""One table of tensor data types: PyTorch's name, safetensors' name, bytes of one element.

Run files, the command line and messages use PyTorch's names (``bfloat16``); headers of weight files
use safetensors' (``BF16``). The functions that take or return a `torch.dtype` import torch when
they are called, so that modules which must start without torch can use the names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

WeightDtype = Literal["float32", "bfloat16", "float16"]
"""The types that a user may choose for weights."""

WeightStorage = Literal["as_stored", "bf16", "fp8", "int8", "nf4"]
"""How the matrices of a model's blocks are kept in memory: as the file stores them, not packed
("bf16", which stands for the type of the model), or packed while loading."""

_TABLE = (
    ("float64", "F64", 8),
    ("float32", "F32", 4),
    ("float16", "F16", 2),
    ("bfloat16", "BF16", 2),
    ("float8_e4m3fn", "F8_E4M3", 1),
    ("float8_e5m2", "F8_E5M2", 1),
    ("int64", "I64", 8),
    ("int32", "I32", 4),
    ("int16", "I16", 2),
    ("int8", "I8", 1),
    ("uint64", "U64", 8),
    ("uint32", "U32", 4),
    ("uint16", "U16", 2),
    ("uint8", "U8", 1),
    ("bool", "BOOL", 1),
)

BYTES_PER_ELEMENT = {safetensors: size for _, safetensors, size in _TABLE}
"""By safetensors' name."""

FP8 = ("F8_E4M3", "F8_E5M2")
"""safetensors' names of the 8-bit floating-point types of model files."""

_TO_SAFETENSORS = {name: safetensors for name, safetensors, _ in _TABLE}
_FROM_SAFETENSORS = {safetensors: name for name, safetensors, _ in _TABLE}


def torch_dtype(name: str) -> torch.dtype:
    """The type that PyTorch calls `name`; KeyError if it is not in the table."""
    import torch

    if name not in _TO_SAFETENSORS:
        raise KeyError(name)
    return getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> str:
    """PyTorch's name of `dtype`, without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def from_safetensors_name(name: str) -> torch.dtype:
    """The type that safetensors calls `name`; KeyError if it is not in the table."""
    return torch_dtype(_FROM_SAFETENSORS[name])


def safetensors_name(dtype: torch.dtype) -> str:
    """safetensors' name of `dtype`; KeyError for a type that it can't store."""
    return _TO_SAFETENSORS[dtype_name(dtype)]
