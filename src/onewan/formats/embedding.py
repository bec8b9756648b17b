"""Files of learned prompt vectors (textual inversion), in the spelling that ComfyUI reads.

One tensor [tokens, width] under the name of the text encoder that it is for: ``umt5xxl`` for
vectors that stand among UMT5's input embeddings, which ComfyUI takes by the file's name
(``embedding:NAME``), and ``umt5xxl_out`` for vectors that join its outputs, which no other program
has. `onewan.checkpoint.saver` writes them.
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
_FOREIGN_NAMES = ("emb_params", "*", "t5", "t5_out")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingFile:
    """A placeholder's vectors."""

    vectors: Tensor
    """[tokens, width], floating point in the precision of the file, finite."""
    is_output_embedding: bool
    """Whether they join the text encoder's outputs instead of entering it."""
    placeholder: str | None
    """The word in a prompt that they stand for; None if the file does not say."""
    uuid: str | None
    metadata: Mapping[str, str]


def looks_like_embedding(file: TensorFile) -> bool:
    """Whether the file holds vectors for prompts and nothing else."""
    return 0 < len(file.tensors) <= 2 and file.tensors.keys() <= {INPUT, OUTPUT, *_FOREIGN_NAMES}


def read_embedding(path: Path, width: int | None = None) -> EmbeddingFile:
    """The vectors in `path`; CheckpointError if it holds none, or none of `width`."""
    file = open_tensors(path)
    known = [name for name in (INPUT, OUTPUT) if name in file.tensors]
    names = known or [name for name in file.tensors if name in _FOREIGN_NAMES]
    if len(names) != 1:
        found = ", ".join(sorted(file.tensors)[:3]) or "nothing"
        raise CheckpointError(
            f"{path}: holds {found}, not the vectors of one embedding ({INPUT} or {OUTPUT})"
        )
    vectors = file.read(names[0], stay=True)
    if vectors.ndim == 1:
        vectors = vectors[None]
    if vectors.ndim != 2 or not len(vectors) or (width and vectors.shape[1] != width):
        raise CheckpointError(
            f"{path}: {names[0]} is {list(vectors.shape)}, expected [tokens, {width or 'width'}]; "
            "it is for another text encoder"
        )
    if not vectors.is_floating_point() or not vectors.float().isfinite().all():
        raise CheckpointError(
            f"{path}: {names[0]} ({vectors.dtype}) does not hold finite numbers; the file is "
            "damaged, export it again"
        )
    return EmbeddingFile(
        vectors=vectors,
        is_output_embedding=names[0].endswith("_out"),
        placeholder=file.metadata.get("onewan.placeholder"),
        uuid=file.metadata.get("onewan.uuid"),
        metadata=file.metadata,
    )
