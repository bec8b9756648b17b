"""Writes PyTorch's own file (``.pth``) tensor by tensor, for official VAEs and text encoders.

Written by hand because ``torch.save`` needs all tensors in memory at once (11 GB for the text
encoder in bfloat16, twice that when it is converted), and the official code reads these two
components in no other format. The file is a zip archive of a pickle, which assigns a part of a
storage to each tensor, and of the bytes of each storage. Here the pickle is made from shapes, and
the storages are written one by one. Tests read the result with ``torch.load``, also with
``weights_only`` and mapped. Format: ``torch/serialization.py``, ``_save`` and ``_load``.
"""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from onewan.errors import CheckpointError
from onewan.files import replacing
from onewan.formats.container import open_tensors
from onewan.formats.untrusted import first_line
from onewan.formats.write import LazyTensor, bytes_of, compute_planned

_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}
"""Classes by which the pickle names the types."""

_ALIGNMENT = 64
"""Storages start at multiples of this, as PyTorch writes them, so that they can be mapped."""


def write_pth(
    destination: Path,
    tensors: Mapping[str, LazyTensor],
    on_bytes: Callable[[int], None] = lambda _count: None,
) -> None:
    """Write `tensors` as a dictionary by name to `destination`, completely or not at all.

    `on_bytes` is called with the number of bytes written since its last call. CheckpointError if
    the file can't be written, or reads back different.
    """
    try:
        with replacing(destination) as path:
            checksums = _write(path, tensors, on_bytes)
            if wrong := _differences(path, tensors, checksums):
                raise CheckpointError(
                    f"{destination}: reads back different from what was written "
                    f"({', '.join(wrong[:3])}); the disk or its driver is at fault, use another one"
                )
    except OSError as error:
        raise CheckpointError(
            f"{destination}: can't be written ({first_line(error)}); "
            "check the folder and the free space"
        ) from error


def _write(
    path: Path, tensors: Mapping[str, LazyTensor], on_bytes: Callable[[int], None]
) -> dict[str, int]:
    """Write the file; returns a checksum of each tensor's bytes."""
    checksums: dict[str, int] = {}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _add(archive, "data.pkl", _index(tensors))
        _add(archive, "byteorder", b"little")
        for number, (name, planned) in enumerate(tensors.items()):
            content = bytes_of(compute_planned(name, planned))
            _add(archive, f"data/{number}", content)
            checksums[name] = zlib.crc32(content)
            on_bytes(len(content))
            del content
        _add(archive, "version", b"3\n")
    return checksums


def _add(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    # A `ZipInfo` is dated 1980 by default, so that equal tensors give equal files.
    entry = zipfile.ZipInfo(f"archive/{name}")
    big = len(content) > zipfile.ZIP64_LIMIT
    assert archive.fp is not None
    # The local header has 30 bytes, the name, 20 more for a ZIP64 entry, and 4 for the head of the
    # extra field "FB", which PyTorch pads with, too.
    start = archive.fp.tell() + 30 + len(entry.filename) + 20 * big + 4
    padding = -start % _ALIGNMENT
    entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    entry.file_size = len(content)
    with archive.open(entry, "w", force_zip64=big) as file:
        file.write(content)


# The pickle refers to storages by persistent ids and to tensors by a call of `_rebuild_tensor_v2`.
# These stand-ins are pickled so, without the memory of a tensor.
class _Storage:
    def __init__(self, key: str, tensor: LazyTensor) -> None:
        self.pickled = ("storage", _STORAGES[tensor.dtype], key, "cpu", prod(tensor.shape))


class _Tensor:
    def __init__(self, key: str, tensor: LazyTensor) -> None:
        self.storage, self.shape = _Storage(key, tensor), tensor.shape

    def __reduce__(self) -> tuple[Any, ...]:
        strides = [prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        rebuild = torch._utils._rebuild_tensor_v2  # pyright: ignore[reportAttributeAccessIssue]
        return rebuild, (self.storage, 0, self.shape, tuple(strides), False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        return obj.pickled if isinstance(obj, _Storage) else None


def _index(tensors: Mapping[str, LazyTensor]) -> bytes:
    buffer = io.BytesIO()
    entries = enumerate(tensors.items())
    _Pickler(buffer, protocol=2).dump({n: _Tensor(str(i), tensor) for i, (n, tensor) in entries})
    return buffer.getvalue()


def _differences(
    path: Path, tensors: Mapping[str, LazyTensor], checksums: Mapping[str, int]
) -> list[str]:
    """The names of tensors that are missing, unexpected, or not bit-exact in the file."""
    file = open_tensors(path)
    wrong = sorted(set(file.tensors) ^ set(tensors))
    for name, planned in tensors.items():
        if name in wrong:
            continue
        tensor = file.read(name)
        same = tuple(tensor.shape) == planned.shape and tensor.dtype == planned.dtype
        if not same or zlib.crc32(bytes_of(tensor)) != checksums[name]:
            wrong.append(name)
        del tensor
    return wrong
