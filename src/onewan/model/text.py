"""Prompts -> UMT5 embeddings, the way the transformer was trained on them.

A prompt is cleaned, tokenised with its end token, encoded at its true length, and only then filled
up with zero vectors to exactly 512. The transformer attends to all 512 without a mask, so zeros are
part of the input: 226 instead of 512 changes its output by 2 %, and leaving the encoder's own
vectors at padded places is silently wrong (``wan/modules/t5.py:506-513``, ``model.py:472-478``).
Encoding unpadded equals encoding padded with a mask to 2e-7, so each prompt is encoded alone: its
embedding never depends on its neighbours, and the cache can keep the valid tokens only.

Placeholders of learned vectors (`onewan.model.embedding`) are cut out of the prompt before it is
tokenised. The tokenizer, the encoder and its table are never changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from onewan.errors import CheckpointError
from onewan.variants import TEXT_LENGTH

if TYPE_CHECKING:
    from onewan.model.embedding import WanModelEmbedding


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: UMT5EncoderModel,
    prompt: str,
    embeddings: Sequence[WanModelEmbedding] = (),
) -> Tensor:
    """[length, dim] in the encoder's dtype: the valid tokens of one prompt, at most 512.

    The empty prompt is one vector, that of the end token. Where the placeholder of one of
    `embeddings` stands, its vectors do: among the encoder's inputs, or, for output embeddings,
    among its outputs, of which the others are then those of the prompt without the placeholder. The
    text around a placeholder is tokenised piece by piece, as ComfyUI does it.

    Gradients flow to vectors that require them, if gradients are on; a prompt without a placeholder
    never records any. CheckpointError for vectors of another width than the encoder's.
    """
    prompt = prompt_clean(prompt)
    pieces = _split(prompt, [embedding.placeholder for embedding in embeddings])
    if len(pieces) == 1:
        return _encode_plain(tokenizer, text_encoder, prompt)
    return _encode_parts(text_encoder, _parts(tokenizer, pieces, embeddings))


@torch.no_grad()
def _encode_plain(
    tokenizer: PreTrainedTokenizerBase, text_encoder: UMT5EncoderModel, prompt: str
) -> Tensor:
    tokens = tokenizer(
        prompt,
        max_length=TEXT_LENGTH,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    ).to(text_encoder.device)
    return text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state[0]


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of `text`, at most 512, without the end token."""
    return tokenizer(
        text, max_length=TEXT_LENGTH, truncation=True, add_special_tokens=False
    ).input_ids


def pad_text(embeddings: Sequence[Tensor]) -> Tensor:
    """[B, 512, dim]: each of the [length, dim] embeddings followed by zeros."""
    return torch.stack([F.pad(e, (0, 0, 0, TEXT_LENGTH - len(e))) for e in embeddings])


def checkpoint_encoder(text_encoder: UMT5EncoderModel) -> None:
    """Freeze the encoder, and let it keep only each block's input for the backward pass.

    transformers does that in training mode alone, where UMT5 drops out a tenth. Here the mode plays
    no part, so the encoder stays in evaluation mode, and gradients keep their bits.
    """
    text_encoder.requires_grad_(False)
    for block in text_encoder.encoder.block:
        if not isinstance(block.forward, partial):  # it is one if this was called before
            # Nothing in it is random, so the state of the generators need not be kept.
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )


# ------------------------------------------------------------------------------------ placeholders


def mentions(prompt: str, placeholder: str) -> bool:
    """Whether vectors of `placeholder` come into the encoding of `prompt`."""
    return len(_split(prompt_clean(prompt), [placeholder])) > 1


def _split(prompt: str, placeholders: Iterable[str]) -> list[str]:
    """Pieces of a cleaned prompt: text, placeholder, text, ..., text; the texts may be empty.

    A placeholder of letters or digits counts as a word only (``sks`` is not in ``masks``). The
    letters that matter are ASCII's: other scripts write without spaces. Where one placeholder
    begins with another, the longer one counts.
    """
    longest_first = sorted(placeholders, key=len, reverse=True)
    if not longest_first:
        return [prompt]
    return re.split(f"({'|'.join(map(_as_word, longest_first))})", prompt)


def _as_word(placeholder: str) -> str:
    before = r"(?<![A-Za-z0-9_])" if re.match(r"\w", placeholder, re.ASCII) else ""
    after = r"(?![A-Za-z0-9_])" if re.search(r"\w\Z", placeholder, re.ASCII) else ""
    return before + re.escape(placeholder) + after


@dataclass(frozen=True, slots=True)
class _Part:
    """A run of tokens, or the vectors that stand in the place of some."""

    ids: Sequence[int] = ()
    vectors: Tensor | None = None
    """[n, dim]"""
    is_output: bool = False

    def __len__(self) -> int:
        return len(self.ids) if self.vectors is None else len(self.vectors)


def _parts(
    tokenizer: PreTrainedTokenizerBase,
    pieces: Sequence[str],
    embeddings: Sequence[WanModelEmbedding],
) -> list[_Part]:
    """What a prompt with placeholders consists of: at most 512 tokens, the last the end token."""
    known = {embedding.placeholder: embedding for embedding in embeddings}
    parts: list[_Part] = []
    room = TEXT_LENGTH - 1
    for number, piece in enumerate(pieces):
        if number % 2:
            embedding = known[piece]
            part = _Part(vectors=embedding.vectors[:room], is_output=embedding.is_output_embedding)
        else:
            # The tokenizer puts a space in front by itself, and makes a token of one at the end.
            part = _Part(ids=token_ids(tokenizer, piece.strip())[:room])
        parts.append(part)
        room -= len(part)
    end: Any = tokenizer.eos_token_id
    return [*parts, _Part(ids=[end])]


def _encode_parts(text_encoder: UMT5EncoderModel, parts: Sequence[_Part]) -> Tensor:
    """[length, dim] in the encoder's dtype."""
    width = text_encoder.config.d_model
    table = text_encoder.encoder.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    inputs: list[Tensor] = []
    for part in parts:
        if part.vectors is None:
            ids = torch.tensor(part.ids, dtype=torch.long, device=text_encoder.device)
            inputs.append(table(ids))
        elif part.vectors.shape[1] != width:
            raise CheckpointError(
                f"embedding: its vectors have {part.vectors.shape[1]} numbers and the text "
                f"encoder's {width}; it is for another text encoder"
            )
        elif not part.is_output:
            inputs.append(part.vectors.to(table.weight))
    inputs_LD = torch.cat(inputs)
    # Output vectors change nothing of what goes in, so nothing need be kept for a backward pass.
    with torch.set_grad_enabled(torch.is_grad_enabled() and inputs_LD.requires_grad):
        outputs_LD = text_encoder(
            inputs_embeds=inputs_LD[None],
            attention_mask=inputs_LD.new_ones(1, len(inputs_LD), dtype=torch.long),
        ).last_hidden_state[0]
    lengths = [0 if part.is_output else len(part) for part in parts]
    return torch.cat(
        [
            part.vectors.to(outputs) if part.is_output and part.vectors is not None else outputs
            for part, outputs in zip(parts, outputs_LD.split(lengths), strict=True)
        ]
    )
