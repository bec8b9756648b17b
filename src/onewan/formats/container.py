"""Opens files of named tensors: safetensors (also in shards), GGUF, PyTorch's zip or pickle.

`open_tensors` reads headers only, in milliseconds for 57 GB. `TensorFile.read` returns one tensor,
mapped from the file until the tensor is freed, so that reading through a file of any size takes the
memory of one tensor. The container is detected by its first bytes, not by its name.

No code from a file runs: pickles are read by PyTorch's ``weights_only`` unpickler, and names of
shards must not leave their folder. Every problem raises a `CheckpointError` with the file, what was
found and what was expected. The meaning of the tensors is not interpreted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError

from onewan.errors import CheckpointError
from onewan.files import moved_aside
from onewan.formats.backends import (
    GgufFile,
    PickleFile,
    SafetensorsFile,
    TensorFileReader,
    TensorInfo,
)
from onewan.formats.untrusted import first_line, named, read_json

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

ContainerFormat = Literal["safetensors", "gguf", "pickle"]

_LFS_POINTER = b"version https://git-lfs"


class TensorFile:
    """The tensors of one file, or of the shards of one checkpoint, by the file's own keys.

    `open_tensors` creates it.
    """

    def __init__(self, path: Path, kind: ContainerFormat, readers: list[TensorFileReader]) -> None:
        self.path = path
        self.container: ContainerFormat = kind
        self.files = tuple(reader.path for reader in readers)
        """The file, or the shards, with the tensors."""
        self.metadata: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._reader_of: dict[str, TensorFileReader] = {}
        for reader in readers:
            self.metadata |= reader.metadata
            if twice := sorted(reader.tensors.keys() & self.tensors.keys()):
                raise CheckpointError(
                    f"{path}: {reader.path.name} and another shard both hold {twice[0]}; the "
                    "folder mixes two checkpoints, download it again"
                )
            self.tensors |= reader.tensors
            self._reader_of |= dict.fromkeys(reader.tensors, reader)

    def arrays(self, names: Iterable[str]) -> dict[str, NDArray[Any]]:
        """Small tensors (alphas, quantization metadata) as numpy arrays by name. Each file is
        opened once, and torch is imported only for containers and types that need it."""
        found: dict[str, NDArray[Any]] = {}
        by_reader: dict[TensorFileReader, list[str]] = {}
        for name in names:
            by_reader.setdefault(self._reader_of[name], []).append(name)
        for reader, inside in by_reader.items():
            found |= reader.arrays(inside)
        return found

    def read(self, name: str, *, keep_mapped: bool = False) -> Tensor:
        """The tensor as the file stores it, on the CPU, mapped from the file where possible.

        A quantized GGUF tensor is returned as its bytes, uint8 [rows, bytes of a row]. Writing to a
        tensor never changes the file. With `keep_mapped` (for the weights of a model in use)
        tensors share one mapping of their file; otherwise each has its own, which is released with
        it. KeyError for an unknown name, CheckpointError if the file can't be read.
        """
        reader = self._reader_of[name]
        try:
            return reader.read(name, keep_mapped)
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{reader.path}: {name} can't be read ({first_line(error)}); copy or download the "
                "file again"
            ) from error


def open_tensors(path: Path) -> TensorFile:
    """The tensors in `path`: a file, an index of shards, or the one checkpoint in a folder."""
    path = Path(path)
    try:
        if path.is_dir():
            return _in_folder(path)
        if path.name.endswith(".json"):
            return _shards(path, path)
        kind, reader = _open(path)
    except FileNotFoundError:
        aside = moved_aside(path)
        remedy = (
            f"rename {aside} back, where a killed process left it" if aside else "check the path"
        )
        raise CheckpointError(f"{path}: there is no such file; {remedy}") from None
    except OSError as error:
        raise CheckpointError(
            f"{path}: can't be read ({first_line(error)}); check the path and its permissions"
        ) from error
    return TensorFile(path, kind, [reader])


# ------------------------------------------------------------------------------------------ folders

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})")


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in `folder` itself, by name."""
    return sorted(p for s in ("safetensors", "gguf", "pth") for p in folder.glob(f"*.{s}"))


def _in_folder(folder: Path) -> TensorFile:
    """The checkpoint in `folder` itself: an index with shards, shards without one, or one file."""
    indices = sorted(folder.glob("*.safetensors.index*.json"))
    if len(indices) > 1:
        raise CheckpointError(
            f"{folder}: holds {len(indices)} checkpoints ({_names(indices)}); give the index of one"
        )
    if indices:
        return _shards(folder, indices[0])
    files = weight_files(folder)
    if len(files) == 1:
        kind, reader = _open(files[0])
        return TensorFile(folder, kind, [reader])
    # Without an index the names of shards tell whether all are there.
    matches = [_SHARD.search(p.name) for p in files]
    totals = {int(m[2]) for m in matches if m}
    if files and all(matches) and len(totals) == 1:
        numbers = {int(m[1]) for m in matches if m}
        if missing := sorted(set(range(1, totals.pop() + 1)) - numbers):
            raise CheckpointError(
                f"{folder}: has no shard {missing[0]} of {files[0].name}; the download is "
                "incomplete, continue it"
            )
        return TensorFile(folder, "safetensors", [_open(p)[1] for p in files])
    if files:
        raise CheckpointError(
            f"{folder}: holds {len(files)} files of weights ({_names(files)}); give the path of one"
        )
    raise CheckpointError(
        f"{folder}: holds no weights (*.safetensors, *.gguf, *.pth); check the path"
    )


def _shards(path: Path, index: Path) -> TensorFile:
    """The shards beside `index` that it lists."""
    try:
        weight_map: Any = read_json(index)["weight_map"]
        file_of = {str(name): str(file) for name, file in weight_map.items()}
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{index}: is not an index of shards (it has no weight_map of names); give a file of "
            "weights or its index"
        ) from None
    readers: list[TensorFileReader] = []
    for name in sorted(set(file_of.values())):
        # The index comes from the internet and must not make us open other files.
        if not _is_file_name(name):
            raise CheckpointError(
                f"{index}: lists the shard {name[:100]!r}, which is not the name of a file in its "
                "folder; download it again"
            )
        try:
            readers.append(_open(index.parent / name)[1])
        except FileNotFoundError:
            raise CheckpointError(
                f"{index.parent / name}: is missing, but {index.name} lists it; the download is "
                "incomplete, continue it"
            ) from None
    file = TensorFile(path, "safetensors", readers)
    if missing := sorted(file_of.keys() - file.tensors.keys()):
        raise CheckpointError(
            f"{index}: lists {len(missing)} tensors that no shard holds, such as "
            f"{named(missing)}; the shards are of another checkpoint, download them again"
        )
    return file


def _is_file_name(name: str) -> bool:
    """Whether `name` is that of a file, on every system, and leads to no other folder or device."""
    return bool(re.fullmatch(r"[\w.()+@ -]{1,200}", name, re.ASCII)) and name not in (".", "..")


def _names(paths: list[Path]) -> str:
    more = f" and {len(paths) - 4} more" if len(paths) > 4 else ""
    return ", ".join(p.name for p in paths[:4]) + more


# ----------------------------------------------------------------------------------------- one file


def _open(path: Path) -> tuple[ContainerFormat, TensorFileReader]:
    """(container, reader) of one file, detected by its first bytes."""
    status = path.stat()
    if not S_ISREG(status.st_mode):  # a pipe or a device could block, or never end
        raise CheckpointError(f"{path}: is not a file; give a file of weights")
    size = status.st_size
    with path.open("rb") as file:
        start = file.read(64)
    if not size:
        raise CheckpointError(f"{path}: is empty (0 bytes); copy or download it again")
    if start.startswith(_LFS_POINTER):
        raise CheckpointError(
            f"{path}: is a Git LFS pointer of {size} bytes, not the weights; run git lfs pull"
        )
    if start.startswith(b"GGUF"):
        return "gguf", GgufFile(path)
    # A zip archive, or a bare pickle (0x80 and the protocol), as PyTorch wrote before 1.6.
    if start.startswith(b"PK\x03\x04") or (start[0] == 0x80 and start[1:2] in b"\x02\x03\x04\x05"):
        return "pickle", PickleFile(path)
    return "safetensors", SafetensorsFile(path, size)
