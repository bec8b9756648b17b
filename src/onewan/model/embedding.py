"""`WanModelEmbedding`: learned vectors that replace a placeholder in prompts (textual inversion).

Input embeddings enter the text encoder among the rows of UMT5's embedding table; output embeddings
are inserted among the encoder's outputs. `onewan.model.text` does both. The vectors are float32
whatever the encoder's dtype, and cast to it at each use.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from onewan.errors import ConfigError
from onewan.formats.embedding import read_embedding
from onewan.model.prompts import clean_prompt
from onewan.model.text import encode_prompt, token_ids

# Any constant would do, but changing it would change the uuids of all placeholders.
_UUID_NAMESPACE = uuid.UUID("6cf1a7a5-3f4f-5d57-9a3e-2a4fbb0f3c41")


class HasPromptEncoder(Protocol):
    """What initial vectors are computed with: a `WanModel` whose text encoder was loaded."""

    def prompt_encoder(self) -> tuple[PreTrainedTokenizerBase, UMT5EncoderModel]: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WanModelEmbedding:
    """A placeholder's vectors. ConfigError if no prompt can contain the placeholder."""

    placeholder: str
    """The word in prompts that the vectors replace, such as <fox>."""
    name: str
    """The name of its file, after the step of the run."""
    uuid: str
    """Identifies the embedding; does not change when it is exported, loaded and trained further."""
    vectors: nn.Parameter
    """[tokens, width], float32."""
    is_output_embedding: bool = False
    """Whether the vectors are inserted among the text encoder's outputs, not its inputs."""
    initial_text: str | None = None
    """The text whose vectors they were initialized with, if that is known."""

    def __post_init__(self) -> None:
        if problem := _placeholder_error(self.placeholder):
            raise ConfigError("embedding", [problem])
        if self.vectors.ndim != 2 or not len(self.vectors):
            shape = list(self.vectors.shape)
            raise ValueError(f"{self.placeholder}: is {shape}, not [tokens, width]")
        if self.vectors.dtype != torch.float32:
            raise ValueError(f"{self.placeholder}: is {self.vectors.dtype}, not float32")

    @classmethod
    def initial(
        cls,
        model: HasPromptEncoder,
        *,
        placeholder: str,
        name: str | None = None,
        initial_text: str = "*",
        token_count: int | None = None,
        is_output_embedding: bool = False,
        seed: int = 0,
    ) -> WanModelEmbedding:
        """Vectors with the meaning of `initial_text`, with gradients required.

        They are the rows of its tokens in the text encoder's embedding table, or, for an output
        embedding, the encoder's outputs at these tokens. `token_count` truncates them or repeats
        them from the first (None: as many as there are tokens). The uuid depends on `seed` (the
        run's) and `placeholder` only, so a resumed run has the same one. ConfigError if the text
        has no tokens; CheckpointError if the text encoder was not loaded.
        """
        tokenizer, text_encoder = model.prompt_encoder()
        text = clean_prompt(initial_text)
        ids = token_ids(tokenizer, text)
        if not ids:
            raise ConfigError(
                "embedding",
                [
                    f"initial_text: {initial_text!r} has no tokens; set it to a word whose meaning "
                    f"is close to that of {placeholder!r}"
                ],
            )
        with torch.no_grad():
            if is_output_embedding:
                # Without the output at the end token, which every prompt has once anyway.
                rows = encode_prompt(tokenizer, text_encoder, text)[:-1]
            else:
                table = text_encoder.encoder.get_input_embeddings()
                rows = table(torch.tensor(ids, device=text_encoder.device))
            # Rows are repeated from the first: more vectors than tokens need some initial value.
            chosen = torch.arange(len(rows) if token_count is None else token_count) % len(rows)
            # Indexing copies, so the vectors share no memory with the embedding table.
            vectors = rows.float().cpu()[chosen]
        return cls(
            placeholder=placeholder,
            name=name or _file_name(placeholder),
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
        """The vectors in `path`, without gradients required.

        The placeholder is `placeholder`, else the one in the file's metadata, else the file's name.
        `width` is the text encoder's. CheckpointError if the file holds no vectors of that width,
        ConfigError if no prompt can contain the placeholder.
        """
        file = read_embedding(path, width)
        placeholder = placeholder or file.placeholder
        is_file_name = placeholder is None
        placeholder = placeholder or Path(path).stem
        if problem := _placeholder_error(placeholder):
            source = "; the file names no placeholder, so its own name is used"
            raise ConfigError(str(path), [problem + source * is_file_name])
        return cls(
            placeholder=placeholder,
            name=name or _file_name(placeholder),
            uuid=file.uuid or _uuid(0, placeholder),
            # A copy: `float` returns float32 vectors of the file as they are.
            vectors=nn.Parameter(file.vectors.float().clone(), requires_grad=False),
            is_output_embedding=file.is_output_embedding,
            initial_text=file.metadata.get("onewan.initial_text"),
        )

    @classmethod
    def restored(
        cls,
        vectors: Tensor,
        *,
        placeholder: str,
        name: str,
        initial_text: str,
        is_output_embedding: bool,
        seed: int,
    ) -> WanModelEmbedding:
        """The embedding that `initial` has made with these arguments, with `vectors` that it has
        been trained to."""
        return cls(
            placeholder=placeholder,
            name=name,
            uuid=_uuid(seed, placeholder),
            vectors=nn.Parameter(vectors),
            is_output_embedding=is_output_embedding,
            initial_text=initial_text,
        )

    def to(self, device: torch.device | str) -> WanModelEmbedding:
        """Move the vectors to `device` and return itself; the parameter is the same object, which
        an optimizer may hold."""
        # `data`, since assigning a moved tensor would need a new parameter.
        self.vectors.data = self.vectors.data.to(device)
        return self


def _placeholder_error(placeholder: str) -> str | None:
    """An error message if no cleaned prompt can contain `placeholder`, else None."""
    # Between words, because cleaning removes spaces at the ends and may join characters.
    around = f"a {placeholder} b"
    cleaned = clean_prompt(around)
    if not placeholder.split() or cleaned.split() != ["a", placeholder, "b"]:
        shown = cleaned[2:-2].strip()
        why = f"would be {shown!r} in a cleaned prompt" if shown != placeholder else "has a space"
        return f"placeholder: {placeholder!r} {why}; choose a single word such as <fox>"
    return None


def _file_name(placeholder: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "", placeholder) or "embedding"


def _uuid(seed: int, placeholder: str) -> str:
    return str(uuid.uuid5(_UUID_NAMESPACE, f"{seed} {placeholder}"))
