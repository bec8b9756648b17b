"""The three kinds of file that hold named tensors: safetensors, PyTorch's zip or pickle, GGUF.

Each class reads the header when it is made, and a tensor when asked. `onewan.formats.container`
tells which one a file is for, and joins shards.
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

_NUMPY = BYTES_PER_ELEMENT.keys() - {"BF16", *FP8}
"""Types that numpy has, too."""

_GGUF_SHAPE = "comfy.gguf.orig_shape."
"""Key under which ComfyUI-GGUF keeps the shape of a tensor that GGUF can't hold (five axes)."""

_PICKLE_MAPPING = 256 << 20
"""Bytes read through one mapping of a pickle before a new one is made."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says about one tensor."""

    shape: tuple[int, ...]
    """In PyTorch's order, and of the values: a quantized GGUF tensor has that of its weights."""
    dtype: str
    """safetensors' name (``BF16``, ``F8_E4M3``, ...) or GGUF's (``Q8_0``, ``Q4_K``, ...)."""

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def is_quantized(self) -> bool:
        """Whether this is one of GGUF's packed types, whose bytes are not numbers."""
        return self.dtype not in BYTES_PER_ELEMENT


def first_line(error: BaseException) -> str:
    """What an error of a library says, fit for one line."""
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
        # A mapping counts as ours, page by page as it is touched, until its last tensor goes: to
        # pass through a file in little memory takes one for each tensor. To keep a model's thousand
        # weights takes one for all, since each is as long as the file (and numpy's hold it open).

    def arrays(self, names: list[str]) -> dict[str, NDArray[Any]]:
        """See `TensorFile.numbers`."""
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
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                self.tensors = {
                    name: TensorInfo(tuple(reader.get_shape()), reader.get_dtype())
                    for name, reader in slices.items()
                }
        except (SafetensorError, OSError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{path}: {_safetensors_fault(path, size, error)}") from error

    def read(self, name: str, keep_mapped: bool) -> Tensor:
        if not keep_mapped:
            with safe_open(self.path, framework="pt") as file:
                return file.get_tensor(name)
        if self._open is None:
            self._open = safe_open(self.path, framework="pt")
        return self._open.get_tensor(name)

    def arrays(self, names: list[str]) -> dict[str, NDArray[Any]]:
        plain = [name for name in names if self.tensors[name].dtype in _NUMPY]
        with safe_open(self.path, framework="np") as file:
            found = {name: file.get_tensor(name) for name in plain}
        return found | super().arrays([name for name in names if name not in found])


def _safetensors_fault(path: Path, size: int, error: BaseException) -> str:
    """Why `path`, of `size` bytes, is no safetensors file: what it claims against what is there."""
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
    whole = 8 + length + max(ends, default=0)
    if whole != size:
        return (
            f"is not a complete safetensors file: has {size} bytes, and its header "
            f"describes {whole}; copy or download it again"
        )
    return f"has a damaged header ({first_line(error)}); copy or download it again"


class PickleFile(TensorFileReader):
    """PyTorch's own format (``.pth``, ``.pt``, ``.ckpt``): a dictionary of tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = {}
        self._mapped = zipfile.is_zipfile(path) and path.suffix.lower() != ".safetensors"
        self._whole: Mapping[str, Tensor] | None = None
        self._recent: Mapping[str, Tensor] | None = None
        self._touched = 0
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
                f"{self.path}: {name} has the type {dtype_name(tensor.dtype)}, which weights of "
                "models do not have; give another file"
            ) from None

    def read(self, name: str, keep_mapped: bool) -> Tensor:
        tensors = self._load()
        if keep_mapped:
            self._whole = tensors
            return tensors[name]
        # Unpickling takes a while (0.03 s), so one mapping serves for a quarter of a gigabyte.
        self._touched += tensors[name].nbytes
        full = self._touched > _PICKLE_MAPPING
        self._recent = None if full else tensors
        self._touched = 0 if full else self._touched
        return tensors[name]

    def _load(self) -> Mapping[str, Tensor]:
        """All tensors, mapped from the file."""
        kept = self._recent if self._whole is None else self._whole
        if kept is not None:
            return kept
        import pickle

        import torch

        try:
            data = self._unpickled()
        except pickle.UnpicklingError as error:
            wanted = re.search(r"GLOBAL (\S+)", str(error))
            what = f", {wanted[1]}" if wanted else ""
            raise CheckpointError(
                f"{self.path}: is a pickle that holds more than tensors{what}; loading it could "
                "run code, so it was not loaded; get the weights as safetensors"
            ) from error
        except Exception as error:  # a damaged pickle makes it raise anything
            raise CheckpointError(
                f"{self.path}: is not a complete PyTorch file ({first_line(error)}); "
                "copy or download it again"
            ) from error
        if isinstance(data, dict) and isinstance(data.get("state_dict"), dict):
            data = data["state_dict"]
        if not isinstance(data, dict) or not all(
            isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in data.items()
        ):
            raise CheckpointError(
                f"{self.path}: holds {type(data).__name__}, not a dictionary of tensors by name"
            )
        if not self._mapped:
            self._whole = data
        return data

    def _unpickled(self) -> Any:
        """What the file holds; PyTorch's own unpickler makes tensors and plain data, nothing else.

        The format before PyTorch 1.6 can't be mapped, nor can a file that is called .safetensors:
        PyTorch would go by the name.
        """
        import torch

        with warnings.catch_warnings():
            # About the version of a damaged pickle, in words for programmers.
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
        self._places: dict[str, tuple[int, tuple[int, ...], str]] = {}
        self.tensors = {}
        for tensor in reader.tensors:
            name, data = tensor.name, tensor.data
            shape = tuple(tensor.shape.tolist()[::-1])
            if kept := self.metadata.get(_GGUF_SHAPE + name):
                shape = self._kept_shape(name, kept, prod(shape))
            self.tensors[name] = TensorInfo(shape, tensor.tensor_type.name)
            self._places[name] = (tensor.data_offset, data.shape, str(data.dtype))

    def _kept_shape(self, name: str, text: str, elements: int) -> tuple[int, ...]:
        try:
            shape = tuple(int(side) for side in json.loads(text))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{self.path}: {_GGUF_SHAPE}{name} is {text}") from error
        if prod(shape) != elements or min(shape, default=0) < 0:
            raise CheckpointError(
                f"{self.path}: {_GGUF_SHAPE}{name} is {text}, and the tensor has {elements} "
                "elements; get the file anew"
            )
        return shape

    def read(self, name: str, keep_mapped: bool) -> Tensor:
        import numpy as np
        import torch

        offset, shape, dtype = self._places[name]
        # Copy on write: PyTorch takes no read-only arrays.
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
        if info.dtype == "BF16":  # numpy has none, so the reader gives bytes
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
            """The library reads past the end as nothing, and would count an absurd number of
            nothings to its end."""

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
        except Exception as error:  # it trusts every number in the file
            raise CheckpointError(
                f"{self.path}: is not a complete GGUF file ({first_line(error)}); "
                "copy or download it again"
            ) from error


def _gguf_metadata(reader: GGUFReader) -> dict[str, str]:
    """The key-value reader of the header, as text; arrays as JSON."""
    metadata: dict[str, str] = {}
    for name, field in reader.fields.items():
        if name.startswith("GGUF."):
            continue
        value = field.contents()
        metadata[name] = value if isinstance(value, str) else json.dumps(value, default=str)
    return metadata
