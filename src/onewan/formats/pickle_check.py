"""Checks a PyTorch file before it is unpickled: what its pickle creates, and how large that is.

PyTorch's ``weights_only`` unpickler runs no code from a file. It does create what the file asks for
of the types that it knows, among them byte arrays and tensors of any size, and decompresses
archives. PyTorch itself writes neither, so a file with them is refused.
"""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from pathlib import Path
from typing import IO

from onewan.errors import CheckpointError

_LARGEST_PICKLE = 16 << 20
"""Bytes, without the tensors' values. That of a 14B model has 0.2 MB."""

_MOST_OPERATIONS = 1_000_000

_PARTS_BEFORE_1_6 = 5
"""Pickles in a file of PyTorch before 1.6: magic number, version, system, content, and the keys of
the storages, whose values follow."""

_CREATED = re.compile(
    r"collections\.(OrderedDict|Counter)"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter)"
    r"|torch(\.cuda)?\.\w+Storage|torch\.storage\.(Untyped|Typed)Storage"
    r"|torch\.(Size|device|[a-z]\w*)"
    r"|torch\.nn\.parameter\.Parameter|torch\.serialization\._get_layout"
    r"|_codecs\.encode|(builtins|__builtin__)\.(set|complex)"
)
"""What a dictionary of tensors consists of, and harmless settings beside it."""


def check_pickle(path: Path) -> None:
    """CheckpointError if unpickling `path`, of PyTorch, could create more than its tensors; any
    other exception if it is damaged."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            for _ in range(_PARTS_BEFORE_1_6):
                _check_operations(path, file)
        return
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(
                    f"{path}: its content is compressed, which PyTorch never does; it is not "
                    "loaded; get the weights as safetensors"
                )
            if entry.filename.endswith("/data.pkl"):
                if entry.file_size > _LARGEST_PICKLE:
                    raise _too_large(path)
                _check_operations(path, io.BytesIO(archive.read(entry)))


def holds_more_than_tensors(path: Path, what: str) -> CheckpointError:
    """The error for a file with `what`, the name of a class or function, in its pickle."""
    named = f", {what[:100]}" if what else ""
    return CheckpointError(
        f"{path}: is a pickle that holds more than tensors{named}; loading it could run code or "
        "fill the memory, so it was not loaded; get the weights as safetensors"
    )


def _too_large(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: has a pickle of more than {_LARGEST_PICKLE >> 20} MB or {_MOST_OPERATIONS:,} "
        "operations without its tensors; it was not loaded; get the weights as safetensors"
    )


def _check_operations(path: Path, file: IO[bytes]) -> None:
    """Read one pickle from `file`, up to its end, without executing it."""
    for count, (operation, argument, position) in enumerate(pickletools.genops(file)):
        if count > _MOST_OPERATIONS or (position or 0) > _LARGEST_PICKLE:
            raise _too_large(path)
        name = str(argument).replace(" ", ".")
        if operation.name in ("GLOBAL", "INST") and not _CREATED.fullmatch(name):
            raise holds_more_than_tensors(path, name)
        if operation.name in ("STACK_GLOBAL", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"):
            raise holds_more_than_tensors(path, operation.name)
