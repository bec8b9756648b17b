"""`WanModelEmbedding`: vectors that a word in prompts stands for (textual inversion).

Input embeddings stand among the rows of UMT5's table that the text encoder reads; output embeddings
join what comes out of it. `onewan.model.text` puts them in their places. The vectors are float32
whatever the encoder computes in, and rounded to its precision at each use.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import nn

from onewan.errors import ConfigError
from onewan.formats.embedding import read_embedding
from onewan.model.text import encode_prompt, token_ids

if TYPE_CHECKING:
    from onewan.model.wan import WanModel

_NAMESPACE = uuid.UUID("6cf1a7a5-3f4f-5d57-9a3e-2a4fbb0f3c41")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WanModelEmbedding:
    """A placeholder's vectors. ConfigError if no prompt can contain the placeholder."""

    placeholder: str
    """The word in prompts that the vectors stand for, such as <fox>."""
    name: str
    """Of its file, and so what ComfyUI's prompts call it."""
    uuid: str
    """Tells it from every other; stays when it is exported, read and trained on."""
    vectors: nn.Parameter
    """[tokens, width], float32."""
    is_output_embedding: bool = False
    """Whether the vectors join the text encoder's outputs, and don't enter it."""
    initial_text: str | None = None
    """What the vectors started as, if that is known."""

    def __post_init__(self) -> None:
        if problem := _placeholder_problem(self.placeholder):
            raise ConfigError("embedding", [problem])
        if self.vectors.ndim != 2 or not len(self.vectors):
            shape = list(self.vectors.shape)
            raise ValueError(f"{self.placeholder}: is {shape}, not [tokens, width]")
        if self.vectors.dtype != torch.float32:
            raise ValueError(f"{self.placeholder}: is {self.vectors.dtype}, not float32")

    @classmethod
    def initial(
        cls,
        model: WanModel,
        *,
        placeholder: str,
        name: str | None = None,
        initial_text: str = "*",
        token_count: int | None = None,
        is_output_embedding: bool = False,
        seed: int = 0,
    ) -> WanModelEmbedding:
        """Vectors that mean `initial_text` to `model`; they train.

        They are the rows of its tokens in the text encoder's table, or the encoder's outputs at
        these tokens: `token_count` of them, cut off or repeated from the first (None: as many as
        there are tokens). The uuid depends on `seed`, the run's, and `placeholder` alone, so that a
        resumed run keeps it. ConfigError if the text has no tokens; CheckpointError if the text
        encoder was not loaded.
        """
        tokenizer, text_encoder = model.prompt_encoder()
        text = prompt_clean(initial_text)
        ids = token_ids(tokenizer, text)
        if not ids:
            raise ConfigError(
                "embedding",
                [
                    f"initial_text: {initial_text!r} has no tokens; give a word for what "
                    f"{placeholder!r} will mean"
                ],
            )
        with torch.no_grad():
            if is_output_embedding:
                # Without the end token's, which the prompt has already.
                rows = encode_prompt(tokenizer, text_encoder, text)[:-1]
            else:
                table = text_encoder.encoder.get_input_embeddings()
                rows = table(torch.tensor(ids, device=text_encoder.device))
            chosen = torch.arange(len(rows) if token_count is None else token_count) % len(rows)
            vectors = rows.float().cpu()[chosen]
        return cls(
            placeholder=placeholder,
            name=name or _name(placeholder),
            uuid=_uuid(seed, placeholder),
            vectors=nn.Parameter(vectors),
            is_output_embedding=is_output_embedding,
            initial_text=initial_text,
        )

    @classmethod
    def from_file(
        cls,
        path: Path,
        *,
        placeholder: str | None = None,
        name: str | None = None,
        width: int | None = None,
    ) -> WanModelEmbedding:
        """The vectors in `path`, as they are; they don't train until they are asked to.

        They stand for `placeholder`, or else for what the file says, or else for its name. `width`
        is that of the text encoder. CheckpointError if the file holds no vectors of that width,
        ConfigError if no prompt can contain the placeholder.
        """
        file = read_embedding(path, width)
        placeholder = placeholder or file.placeholder
        by_name = placeholder is None
        placeholder = placeholder or Path(path).stem
        if problem := _placeholder_problem(placeholder):
            remedy = "; a file that names no placeholder gives its own name" if by_name else ""
            raise ConfigError(str(path), [problem + remedy])
        return cls(
            placeholder=placeholder,
            name=name or _name(placeholder),
            uuid=file.uuid or _uuid(0, placeholder),
            vectors=nn.Parameter(file.vectors.float().clone(), requires_grad=False),
            is_output_embedding=file.is_output_embedding,
            initial_text=file.metadata.get("onewan.initial_text"),
        )

    def to(self, device: torch.device | str) -> WanModelEmbedding:
        """Itself, with its vectors, the same parameter as before, on `device`."""
        self.vectors.data = self.vectors.data.to(device)
        return self


def overlapping(embeddings: list[WanModelEmbedding]) -> list[str]:
    """What is wrong with `embeddings` in one prompt: placeholders that are alike, or part of one
    another."""
    problems: list[str] = []
    for number, embedding in enumerate(embeddings):
        for other in embeddings[:number]:
            one, two = sorted((embedding.placeholder, other.placeholder), key=len)
            if one in two:
                what = "is given twice" if one == two else f"is part of {two!r}"
                problems.append(f"placeholder: {one!r} {what}; give each its own")
    return problems


def _placeholder_problem(placeholder: str) -> str | None:
    """Why prompts can't contain `placeholder`, if they can't."""
    around = f"a {placeholder} b"
    cleaned = prompt_clean(around)
    if not placeholder.split() or cleaned.split() != ["a", placeholder, "b"]:
        shown = cleaned[2:-2].strip()
        why = f"would be {shown!r} in a cleaned prompt" if shown != placeholder else "has a space"
        return f"placeholder: {placeholder!r} {why}; choose a single word such as <fox>"
    return None


def _name(placeholder: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "", placeholder) or "embedding"


def _uuid(seed: int, placeholder: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, f"{seed} {placeholder}"))
