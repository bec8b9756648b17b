"""Reads embedding files (textual inversion), with the keys that ComfyUI uses.

One tensor [tokens, width] with the name of its text encoder as key: ``umt5xxl`` for vectors among
UMT5's input embeddings, which ComfyUI reads with the node in `onewan/resources/comfyui`, and
``umt5xxl_out`` for vectors among its outputs, which no other program supports.
`onewan.checkpoint.saver` writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onewan.errors import CheckpointError
from onewan.formats.container import TensorFile, open_tensors

if TYPE_CHECKING:
    from torch import Tensor

INPUT, OUTPUT = "umt5xxl", "umt5xxl_out"
_KEYS_OF_OTHER_TRAINERS = ("emb_params", "*", "t5", "t5_out")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingFile:
    """The vectors of one placeholder, from a file."""

    vectors: Tensor
    """[tokens, width], finite, in the floating-point type of the file."""
    is_output_embedding: bool
    """Whether they are inserted among the text encoder's outputs, not its input embeddings."""
    placeholder: str | None
    """The word in a prompt that they replace; None if the header does not name one."""
    uuid: str | None
    """OneTrainer's identifier; None if the header has none."""
    metadata: Mapping[str, str]


def looks_like_embedding(file: TensorFile) -> bool:
    """Whether the file holds the vectors of an embedding and nothing else."""
    return 0 < len(file.tensors) <= 2 and file.tensors.keys() <= {
        INPUT,
        OUTPUT,
        *_KEYS_OF_OTHER_TRAINERS,
    }


def read_embedding(path: Path, width: int | None = None) -> EmbeddingFile:
    """The vectors in `path`. CheckpointError if it does not hold exactly one set of them, if they
    are not of `width`, the text encoder's, or not finite floating-point values."""
    file = open_tensors(path)
    known = [name for name in (INPUT, OUTPUT) if name in file.tensors]
    names = known or [name for name in file.tensors if name in _KEYS_OF_OTHER_TRAINERS]
    if len(names) != 1:
        found = ", ".join(sorted(file.tensors)[:3]) or "nothing"
        raise CheckpointError(
            f"{path}: holds {found}, not the vectors of one embedding ({INPUT} or {OUTPUT}); give "
            "an embedding for UMT5-XXL"
        )
    vectors = file.read(names[0], keep_mapped=True)
    if vectors.ndim == 1:  # some trainers write a single vector without the axis of tokens
        vectors = vectors[None]
    if vectors.ndim != 2 or not len(vectors) or (width and vectors.shape[1] != width):
        raise CheckpointError(
            f"{path}: {names[0]} is {list(vectors.shape)}, expected [tokens, {width or 'width'}]; "
            "it is for another text encoder, give one for UMT5-XXL"
        )
    if not vectors.is_floating_point() or not vectors.float().isfinite().all():
        raise CheckpointError(
            f"{path}: {names[0]} ({vectors.dtype}) holds values that are not finite floating-point "
            "numbers; the file is damaged, export it again"
        )
    return EmbeddingFile(
        vectors=vectors,
        is_output_embedding=names[0].endswith("_out"),
        placeholder=file.metadata.get("onewan.placeholder"),
        uuid=file.metadata.get("onewan.uuid"),
        metadata=file.metadata,
    )
