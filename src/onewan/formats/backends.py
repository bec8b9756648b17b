"""Readers of the three containers of named tensors: safetensors, PyTorch's zip or pickle, GGUF.

The constructor of each class reads the header; `read` reads one tensor. `onewan.formats.container`
detects which class a file needs, and joins shards.
"""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from onewan.dtypes import BYTES_PER_ELEMENT, FP8, dtype_name, safetensors_name
from onewan.errors import CheckpointError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from numpy.typing import NDArray
    from torch import Tensor

_NUMPY_DTYPES = BYTES_PER_ELEMENT.keys() - {"BF16", *FP8}
"""safetensors' types that numpy has, so that reading them needs no torch."""

_GGUF_SHAPE = "comfy.gguf.orig_shape."
"""Prefix of the metadata where ComfyUI-GGUF stores shapes that GGUF can't (more than 4 axes)."""

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


def first_line(error: BaseException) -> str:
    """The first line of a library's error message, at most 200 characters, to quote in ours."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


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
            with safe_open(path, framework="np") as file:
                self.metadata = dict(file.metadata() or {})
                # A slice reads the header only; `get_tensor` would read the values.
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                self.tensors = {
                    name: TensorInfo(tuple(reader.get_shape()), reader.get_dtype())
                    for name, reader in slices.items()
                }
        except (SafetensorError, OSError, ValueError, OverflowError) as error:
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
            header = json.loads(file.read(length))
            ends = [
                int(entry["data_offsets"][1])
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
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
            data = self._unpickled()
        except pickle.UnpicklingError as error:
            match = re.search(r"GLOBAL (\S+)", str(error))
            what = f", {match[1]}" if match else ""
            raise CheckpointError(
                f"{self.path}: is a pickle that holds more than tensors{what}; loading it could "
                "run code, so it was not loaded; get the weights as safetensors"
            ) from error
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


class GgufFile(TensorFileReader):
    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes: Any = None
        reader, self.metadata = self._header()
        self._stored: dict[str, tuple[int, tuple[int, ...], str]] = {}
        """(offset in bytes, shape, numpy type) of each tensor as it is stored."""
        self.tensors = {}
        for tensor in reader.tensors:
            name, data = tensor.name, tensor.data
            shape = tuple(tensor.shape.tolist()[::-1])  # GGUF lists the fastest axis first
            if text := self.metadata.get(_GGUF_SHAPE + name):
                shape = self._original_shape(name, text, prod(shape))
            self.tensors[name] = TensorInfo(shape, tensor.tensor_type.name)
            self._stored[name] = (tensor.data_offset, data.shape, str(data.dtype))

    def _original_shape(self, name: str, text: str, elements: int) -> tuple[int, ...]:
        try:
            shape = tuple(int(side) for side in json.loads(text))
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"{self.path}: {_GGUF_SHAPE}{name} is {text}, not a shape; download the file again"
            ) from error
        if prod(shape) != elements or min(shape, default=0) < 0:
            raise CheckpointError(
                f"{self.path}: {_GGUF_SHAPE}{name} is {text}, but the tensor has {elements} "
                "elements; download the file again"
            )
        return shape

    def read(self, name: str, keep_mapped: bool) -> Tensor:
        import numpy as np
        import torch

        offset, shape, dtype = self._stored[name]
        # Mode "c" is copy on write, since PyTorch does not support read-only arrays.
        if keep_mapped:
            if self._bytes is None:
                self._bytes = np.memmap(self.path, dtype=np.uint8, mode="c")
            end = offset + prod(shape) * np.dtype(dtype).itemsize
            data = self._bytes[offset:end].view(dtype).reshape(shape)
        else:
            data = np.memmap(self.path, dtype=dtype, mode="c", offset=offset, shape=shape)
        tensor = torch.from_numpy(data)
        info = self.tensors[name]
        if info.is_quantized:
            return tensor
        if info.dtype == "BF16":  # numpy has no such type, so the library returns bytes
            tensor = tensor.view(torch.bfloat16)
        return tensor.reshape(info.shape)

    def _header(self) -> tuple[GGUFReader, dict[str, str]]:
        import numpy as np

        try:
            from gguf import GGUFReader
        except ImportError:
            raise CheckpointError(
                f"{self.path}: is a GGUF file; install the package that reads them: "
                "pip install gguf"
            ) from None

        class Bounded(GGUFReader):
            """Checks offsets: past the end of the file the library reads empty arrays, so that an
            absurd count in a damaged header would keep it busy for hours."""

            def _get(
                self, offset: int, dtype: Any, count: int = 1, override_order: Any = None
            ) -> Any:
                end = int(offset) + np.dtype(dtype).itemsize * int(count)
                if end > len(self.data):
                    raise ValueError(f"its header points to byte {end} of {len(self.data)}")
                return super()._get(offset, dtype, count, override_order)

        try:
            reader = Bounded(self.path)
            return reader, _gguf_metadata(reader)
        except Exception as error:  # the library checks no value in the file before using it
            raise CheckpointError(
                f"{self.path}: is not a complete GGUF file ({first_line(error)}); "
                "copy or download it again"
            ) from error


def _gguf_metadata(reader: GGUFReader) -> dict[str, str]:
    """The key-value pairs of the header as text; arrays as JSON."""
    metadata: dict[str, str] = {}
    for name, field in reader.fields.items():
        if name.startswith("GGUF."):  # the library's own fields: version and counts
            continue
        value = field.contents()
        metadata[name] = value if isinstance(value, str) else json.dumps(value, default=str)
    return metadata
