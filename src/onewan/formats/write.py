"""Writes safetensors files tensor by tensor, and verifies them before they are renamed.

The library's own ``save_file`` needs all tensors in memory at once. Here the header is made from
shapes, and each tensor is computed, written and freed, so that a 57 GB expert takes the memory of
its largest tensor. The file is renamed to its final name only after it was flushed to the disk,
read back and found bit-exact; if anything fails, the old file stays.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from onewan.dtypes import safetensors_name
from onewan.errors import CheckpointError
from onewan.files import replacing, sync
from onewan.formats.modelspec import HASH
from onewan.formats.untrusted import first_line

_HASH_PLACEHOLDER = "0x" + "0" * 64


@dataclass(frozen=True, slots=True)
class _ExpectedContent:
    """Expected content, for the read-back check."""

    metadata: dict[str, str]
    checksums: dict[str, int]
    """CRC-32 of each tensor's bytes, in the order of the file: it detects errors of a disk at a
    fifth of the cost of a cryptographic digest."""


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is computed when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    destination: Path,
    tensors: Mapping[str, Tensor | LazyTensor],
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], None] = lambda _count: None,
) -> None:
    """Write `tensors` and `metadata` to `destination`, completely or not at all.

    ModelSpec's hash of the content is added to the metadata. Equal tensors and metadata give equal
    files. `on_bytes` is called with the number of bytes of tensors written since its last call.
    CheckpointError if the file can't be written, or reads back different.
    """
    lazy = {name: _lazy(tensor) for name, tensor in tensors.items()}
    try:
        with replacing(destination) as path:
            written = _write(path, {name: lazy[name] for name in _order(lazy)}, metadata, on_bytes)
            if wrong := _differences(path, lazy, written):
                raise CheckpointError(
                    f"{destination}: reads back different from what was written "
                    f"({', '.join(wrong[:3])}); the disk or its driver is at fault, use another one"
                )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{destination}: can't be written ({first_line(error)}); "
            "check the folder and the free space"
        ) from error


def safetensors_parts(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """The content of a small safetensors file, part by part, for a caller that writes it.

    Equal tensors and metadata give equal bytes; the library's own `save_file` writes the metadata
    in another order each time.
    """
    lazy = {name: _lazy(tensors[name]) for name in _order(tensors)}
    text = _header_text({"__metadata__": dict(sorted(metadata.items())), **_entries(lazy)})
    yield len(text).to_bytes(8, "little") + text
    yield from (bytes_of(tensors[name]) for name in lazy)


def _order(tensors: Mapping[str, Tensor | LazyTensor]) -> list[str]:
    # The library's own order: the widest type first, which keeps every tensor aligned.
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def _entries(tensors: Mapping[str, LazyTensor]) -> dict[str, object]:
    """What the header of a file says about tensors that follow each other in this order."""
    entries, end = dict[str, object](), 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.bytes
        entries[name] = {
            "dtype": safetensors_name(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    return entries


def _lazy(tensor: Tensor | LazyTensor) -> LazyTensor:
    if isinstance(tensor, LazyTensor):
        return tensor
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def _write(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], None],
) -> _ExpectedContent:
    """Write the file; returns the content that it must have when it is read back."""
    header: dict[str, object] = {
        "__metadata__": _metadata(metadata, _HASH_PLACEHOLDER),
        **_entries(tensors),
    }
    text = _header_text(header)
    checksums: dict[str, int] = {}
    sha = hashlib.sha256()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, planned in tensors.items():
            tensor = compute_planned(name, planned)
            content = bytes_of(tensor)
            sha.update(content)
            checksums[name] = zlib.crc32(content)
            file.write(content)
            on_bytes(len(content))
            del tensor, content
        # The hash is known only now. The header keeps its length, as the placeholder is as long.
        final = header["__metadata__"] = _metadata(metadata, "0x" + sha.hexdigest())
        file.seek(8)
        file.write(_header_text(header))
    sync(path)
    return _ExpectedContent(final, checksums)


def _metadata(metadata: Mapping[str, str], digest: str) -> dict[str, str]:
    # transformers refuses files without ``format``.
    return dict(sorted({"format": "pt", **metadata, HASH: digest}.items()))


def _header_text(header: Mapping[str, object]) -> bytes:
    # Padded to 8 bytes, as the library does, so that the tensors after it are aligned.
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def compute_planned(name: str, planned: LazyTensor) -> Tensor:
    """The tensor; ValueError if its shape or type is not the planned one, by which the header was
    made."""
    tensor = planned.make()
    if tuple(tensor.shape) != planned.shape or tensor.dtype != planned.dtype:
        raise ValueError(
            f"{name}: is {list(tensor.shape)} {tensor.dtype}, expected "
            f"{list(planned.shape)} {planned.dtype}"
        )
    return tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """The content of `tensor` as files store it, little-endian, without a copy."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def _differences(
    path: Path, tensors: Mapping[str, LazyTensor], written: _ExpectedContent
) -> list[str]:
    """The names of tensors that are missing, unexpected, or not bit-exact in the file; "the header"
    if only that differs."""
    with safe_open(path, framework="pt") as file:
        found = set(file.keys())
        header = file.metadata() or {}
    wrong = sorted(found ^ written.checksums.keys())
    for name, checksum in written.checksums.items():
        if name not in found:
            continue
        # Opened for each tensor: pages of a mapping stay resident until it is closed.
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(name)
        if (
            tensor.dtype != tensors[name].dtype
            or tuple(tensor.shape) != tensors[name].shape
            or zlib.crc32(bytes_of(tensor)) != checksum
        ):
            wrong.append(name)
        del tensor
    return wrong if header == written.metadata or wrong else ["the header"]
