"""Readers of the three containers of named tensors: safetensors, PyTorch's zip or pickle, GGUF.

The constructor of each class reads the header; `read` reads one tensor. `onewan.formats.container`
detects which class a file needs, and joins shards.
"""

from __future__ import annotations

import re
import struct
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from onewan.dtypes import (
    BYTES_PER_ELEMENT,
    FP8,
    dtype_name,
    from_safetensors_name,
    safetensors_name,
)
from onewan.errors import CheckpointError
from onewan.formats.gguf_header import GgufHeader
from onewan.formats.pickle_check import check_pickle, holds_more_than_tensors
from onewan.formats.untrusted import first_line, named, parse_json

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_NUMPY_DTYPES = BYTES_PER_ELEMENT.keys() - {"BF16", *FP8}
"""safetensors' types that numpy has, so that reading them needs no torch."""

_GGUF_SHAPE = "comfy.gguf.orig_shape."
"""Prefix of the metadata where ComfyUI-GGUF stores shapes that GGUF can't (more than 4 axes)."""

_LARGEST_HEADER = 20 << 20
"""Bytes of a safetensors header. That of a 14B model has 0.2 MB; LoRA files have workflows and
pictures in it."""

_PICKLE_MAPPING = 256 << 20
"""Bytes read through one mapping of a pickle before a new one is made."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and type of a tensor, from the header."""

    shape: tuple[int, ...]
    """In PyTorch's order; for a quantized GGUF tensor that of its values, not of its bytes."""
    dtype: str
    """safetensors' name (``BF16``, ``F8_E4M3``, ...) or GGUF's (``Q8_0``, ``Q4_K``, ...)."""

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def is_quantized(self) -> bool:
        """Whether this is one of GGUF's packed types, which PyTorch has no dtype for."""
        return self.dtype not in BYTES_PER_ELEMENT


class TensorFileReader(ABC):
    """One file of tensors; its header has been read."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]

    @abstractmethod
    def read(self, name: str, keep_mapped: bool) -> Tensor:
        """See `TensorFile.read`."""
        # Each page of a mapping that was touched counts as resident memory of the process until the
        # mapping's last tensor is freed. Reading through a file in little memory therefore takes a
        # mapping for each tensor. Keeping a model's thousand weights takes one mapping for all,
        # since each spans the whole file (and numpy's keep it open).

    def arrays(self, names: list[str]) -> dict[str, NDArray[Any]]:
        """See `TensorFile.arrays`."""
        tensors = {name: self.read(name, keep_mapped=False) for name in names}
        return {
            name: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
            for name, tensor in tensors.items()
        }


class SafetensorsFile(TensorFileReader):
    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._open: Any = None
        try:
            _check_header_size(path)
            with safe_open(path, framework="np") as file:
                self.metadata = dict(file.metadata() or {})
                # A slice reads the header only; `get_tensor` would read the values.
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                self.tensors = {
                    name: TensorInfo(tuple(reader.get_shape()), reader.get_dtype())
                    for name, reader in slices.items()
                }
        except (SafetensorError, OSError, ValueError, OverflowError, TypeError) as error:
            raise CheckpointError(f"{path}: {_safetensors_problem(path, size, error)}") from error

    def read(self, name: str, keep_mapped: bool) -> Tensor:
        if not keep_mapped:
            with safe_open(self.path, framework="pt") as file:
                return file.get_tensor(name)
        if self._open is None:
            self._open = safe_open(self.path, framework="pt")
        return self._open.get_tensor(name)

    def arrays(self, names: list[str]) -> dict[str, NDArray[Any]]:
        plain = [name for name in names if self.tensors[name].dtype in _NUMPY_DTYPES]
        with safe_open(self.path, framework="np") as file:
            found = {name: file.get_tensor(name) for name in plain}
        return found | super().arrays([name for name in names if name not in found])


def _check_header_size(path: Path) -> None:
    """CheckpointError for a header that no model has: its entries would fill the memory."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if _LARGEST_HEADER < length < path.stat().st_size:
        raise CheckpointError(
            f"{path}: has a header of {length} bytes, more than any model's; give another file"
        )


def _safetensors_problem(path: Path, size: int, error: BaseException) -> str:
    """Why `path`, of `size` bytes, is not a valid safetensors file. The library's own errors do not
    say whether the file is truncated or of another format."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or file.read(1) != b"{":
            file.seek(0)
            return (
                "is not a safetensors, GGUF or PyTorch file (it begins with "
                f"{file.read(12)!r}); give a file of weights"
            )
        file.seek(8)
        if length > size - 8:
            return (
                f"is not a complete safetensors file: should begin with a header of {length} "
                f"bytes, and has {size} bytes in all; copy or download it again"
            )
        try:
            header = parse_json(file.read(length).decode("utf-8"))
            ends = [
                int(entry["data_offsets"][1])
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return (
                f"is not a safetensors file, or its header is damaged ({first_line(error)}); "
                "copy or download it again"
            )
    described = 8 + length + max(ends, default=0)
    if described != size:
        return (
            f"is not a complete safetensors file: has {size} bytes, and its header "
            f"describes {described}; copy or download it again"
        )
    return f"has a damaged header ({first_line(error)}); copy or download it again"


class PickleFile(TensorFileReader):
    """PyTorch's own format (``.pth``, ``.pt``, ``.ckpt``): a dictionary of tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = {}
        # The format before PyTorch 1.6 can't be mapped, nor can a file named .safetensors, which
        # PyTorch would open as what its name says.
        self._mapped = zipfile.is_zipfile(path) and path.suffix.lower() != ".safetensors"
        self._permanent: Mapping[str, Tensor] | None = None
        self._recent: Mapping[str, Tensor] | None = None
        self._bytes_of_recent = 0
        tensors = self._load()
        self.tensors = {
            name: TensorInfo(tuple(tensor.shape), self._dtype(name, tensor))
            for name, tensor in tensors.items()
        }

    def _dtype(self, name: str, tensor: Tensor) -> str:
        try:
            return safetensors_name(tensor.dtype)
        except KeyError:
            raise CheckpointError(
                f"{self.path}: {name} has the type {dtype_name(tensor.dtype)}, which no weights of "
                "models have; give another file"
            ) from None

    def read(self, name: str, keep_mapped: bool) -> Tensor:
        tensors = self._load()
        if keep_mapped:
            self._permanent = tensors
            return tensors[name]
        # Unpickling takes 0.03 s, too long for each tensor, so a mapping is used for 256 MiB.
        self._bytes_of_recent += tensors[name].nbytes
        full = self._bytes_of_recent > _PICKLE_MAPPING
        self._recent = None if full else tensors
        self._bytes_of_recent = 0 if full else self._bytes_of_recent
        return tensors[name]

    def _load(self) -> Mapping[str, Tensor]:
        """All tensors, mapped from the file."""
        loaded = self._recent if self._permanent is None else self._permanent
        if loaded is not None:
            return loaded
        import pickle

        import torch

        try:
            check_pickle(self.path)
            data = self._unpickled()
        except pickle.UnpicklingError as error:
            match = re.search(r"GLOBAL (\S+)", str(error))
            raise holds_more_than_tensors(self.path, match[1] if match else "") from error
        except CheckpointError:
            raise
        except Exception as error:  # a damaged pickle can raise any exception
            raise CheckpointError(
                f"{self.path}: is not a complete PyTorch file ({first_line(error)}); "
                "copy or download it again"
            ) from error
        # Lightning and older trainers nest the weights.
        if isinstance(data, dict) and isinstance(data.get("state_dict"), dict):
            data = data["state_dict"]
        if not isinstance(data, dict) or not all(
            isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in data.items()
        ):
            raise CheckpointError(
                f"{self.path}: holds {type(data).__name__}, not a dictionary of tensors by name; "
                "give another file"
            )
        if wrong := [n for n, t in data.items() if not _has_its_own_values(t)]:
            raise CheckpointError(
                f"{self.path}: {len(wrong)} tensors have no values of their own in the file, such "
                f"as {named(wrong)}; give another file"
            )
        if not self._mapped:
            self._permanent = data
        return data

    def _unpickled(self) -> Any:
        """The unpickled content. With `weights_only` PyTorch creates tensors and plain data only,
        so that no code in the file runs."""
        import torch

        with warnings.catch_warnings():
            # About the version of a damaged pickle; the error that follows says more.
            warnings.simplefilter("ignore", UserWarning)
            if self._mapped:
                return torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            with self.path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)


def _has_its_own_values(tensor: Tensor) -> bool:
    """Whether `tensor` is dense and not larger than what the file has for it: strides of 0 could
    make terabytes of one value."""
    import torch

    plain = tensor.layout is torch.strided and tensor.is_cpu
    return plain and tensor.nbytes <= tensor.untyped_storage().nbytes()


class GgufFile(TensorFileReader):
    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes: Any = None
        header = self._header()
        self.metadata = header.metadata
        self._stored = header.tensors
        self.tensors = {}
        for name, tensor in header.tensors.items():
            shape = tensor.shape
            if text := self.metadata.get(_GGUF_SHAPE + name):
                shape = self._original_shape(name, text, prod(shape))
            self.tensors[name] = TensorInfo(shape, tensor.type)

    def _original_shape(self, name: str, text: str, elements: int) -> tuple[int, ...]:
        try:
            shape = tuple(int(side) for side in parse_json(text))
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"{self.path}: {_GGUF_SHAPE}{name} is {text[:100]}, not a shape; download the file "
                "again"
            ) from error
        if prod(shape) != elements or min(shape, default=0) < 0:
            raise CheckpointError(
                f"{self.path}: {_GGUF_SHAPE}{name} is {text[:100]}, but the tensor has {elements} "
                "elements; download the file again"
            )
        return shape

    def read(self, name: str, keep_mapped: bool) -> Tensor:
        import numpy as np
        import torch

        info, stored = self.tensors[name], self._stored[name]
        if not stored.bytes:  # which can't be mapped
            empty = torch.empty(0, dtype=torch.uint8)
            return empty if info.is_quantized else empty.float().reshape(info.shape)
        # Mode "c" is copy on write, since PyTorch does not support read-only arrays.
        if keep_mapped:
            if self._bytes is None:
                self._bytes = np.memmap(self.path, dtype=np.uint8, mode="c")
            data = self._bytes[stored.offset : stored.offset + stored.bytes]
        else:
            data = np.memmap(
                self.path, dtype=np.uint8, mode="c", offset=stored.offset, shape=(stored.bytes,)
            )
        tensor = torch.from_numpy(data)
        if info.is_quantized:
            return tensor.reshape(prod(stored.shape[:-1]), -1)
        return tensor.view(from_safetensors_name(info.dtype)).reshape(info.shape)

    def _header(self) -> GgufHeader:
        try:
            return GgufHeader(self.path)
        except ImportError:
            raise CheckpointError(
                f"{self.path}: is a GGUF file; install the package that reads them: "
                "pip install gguf"
            ) from None
        except (ValueError, OSError, struct.error) as error:
            raise CheckpointError(
                f"{self.path}: is not a complete GGUF file ({first_line(error)}); "
                "copy or download it again"
            ) from error
