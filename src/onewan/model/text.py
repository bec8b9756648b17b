"""Prompts -> UMT5 embeddings, the way the transformer was trained on them.

A prompt is cleaned, tokenized with its end token, encoded at its true length, and then padded with
zero vectors to exactly 512. The transformer attends to all 512 without a mask, so the zeros are
part of its input: 226 vectors instead of 512 change its output by 2 %, and padding with the
encoder's own outputs is wrong too (``wan/modules/t5.py:506-513``, ``model.py:472-478``). Encoding
without padding equals encoding with padding and a mask to 2e-7, so each prompt is encoded alone:
its embedding does not depend on others in the batch, and the cache stores the valid tokens only.

Placeholders of learned vectors (`onewan.model.embedding`) are cut out of the prompt before it is
tokenized. The tokenizer, the encoder and its embedding table are never changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from onewan.errors import CheckpointError
from onewan.model.inputs import to_device
from onewan.model.prompts import clean_prompt
from onewan.variants import TEXT_LENGTH


class PlaceholderVectors(Protocol):
    """What encoding needs to know of a `WanModelEmbedding`."""

    @property
    def placeholder(self) -> str:
        """The word in prompts that the vectors replace."""
        ...

    @property
    def vectors(self) -> Tensor:
        """[tokens, width], float32."""
        ...

    @property
    def is_output_embedding(self) -> bool:
        """Whether the vectors are inserted among the encoder's outputs, not its inputs."""
        ...


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: UMT5EncoderModel,
    prompt: str,
    embeddings: Sequence[PlaceholderVectors] = (),
) -> Tensor:
    """[length, dim] in the encoder's dtype: the valid tokens of one prompt, at most 512.

    The empty prompt is one vector, that of the end token. The placeholder of each of `embeddings`
    is replaced by its vectors: among the encoder's inputs, or, for output embeddings, among its
    outputs, and then the other outputs are those of the prompt without the placeholder. The text
    before and after a placeholder is tokenized separately, as in ComfyUI.

    With gradients enabled, they flow to vectors that require them; a prompt without a placeholder
    never records any. CheckpointError for vectors of another width than the encoder's.
    """
    prompt = clean_prompt(prompt)
    pieces = _split_at_placeholders(prompt, [embedding.placeholder for embedding in embeddings])
    if len(pieces) == 1:
        return _encode_tokens(tokenizer, text_encoder, prompt)
    return _encode_segments(text_encoder, _segments(tokenizer, pieces, embeddings))


@torch.no_grad()
def _encode_tokens(
    tokenizer: PreTrainedTokenizerBase, text_encoder: UMT5EncoderModel, prompt: str
) -> Tensor:
    ids: Tensor = tokenizer(
        prompt,
        max_length=TEXT_LENGTH,
        truncation=True,
        add_special_tokens=True,
        return_tensors="pt",
    ).input_ids
    # All tokens are valid. A mask of ones would say the same, and transformers would look whether
    # they are ones, which waits for the device.
    return text_encoder(to_device(ids, text_encoder.device)).last_hidden_state[0]


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of `text`, at most 512, without the end token."""
    return tokenizer(
        text, max_length=TEXT_LENGTH, truncation=True, add_special_tokens=False
    ).input_ids


def token_count(tokenizer: PreTrainedTokenizerBase, prompt: str) -> int:
    """How many tokens `prompt` has, with the end token, before it is cut to 512."""
    return len(tokenizer(clean_prompt(prompt)).input_ids)


def pad_text(embeddings: Sequence[Tensor]) -> Tensor:
    """[B, 512, dim]: each of the [length, dim] embeddings followed by zeros."""
    return torch.stack([F.pad(e, (0, 0, 0, TEXT_LENGTH - len(e))) for e in embeddings])


def checkpoint_encoder(text_encoder: UMT5EncoderModel) -> None:
    """Freeze the encoder and enable gradient checkpointing for each of its blocks.

    transformers checkpoints in training mode only, where UMT5 has a dropout of 0.1. This does it in
    evaluation mode too, so gradients are the same bits as without checkpointing.
    """
    text_encoder.requires_grad_(False)
    for block in text_encoder.encoder.block:
        if not isinstance(block.forward, partial):  # else this was called before
            # Nothing in a block is random, so generator states need not be saved and restored.
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )


# ------------------------------------------------------------------------------------ placeholders


def mentions(prompt: str, placeholder: str) -> bool:
    """Whether encoding `prompt` uses the vectors of `placeholder`."""
    return len(_split_at_placeholders(clean_prompt(prompt), [placeholder])) > 1


def _split_at_placeholders(prompt: str, placeholders: Iterable[str]) -> list[str]:
    """A cleaned prompt as text, placeholder, text, ..., text; the texts may be empty.

    A placeholder that begins or ends with a letter or digit is found as a whole word only (``sks``
    is not in ``masks``). Word boundaries are ASCII only, since Chinese and Japanese have no spaces
    between words. Where one placeholder begins with another, the longer one is found.
    """
    longest_first = sorted(placeholders, key=len, reverse=True)
    if not longest_first:
        return [prompt]
    return re.split(f"({'|'.join(map(_word_pattern, longest_first))})", prompt)


def _word_pattern(placeholder: str) -> str:
    before = r"(?<![A-Za-z0-9_])" if re.match(r"\w", placeholder, re.ASCII) else ""
    after = r"(?![A-Za-z0-9_])" if re.search(r"\w\Z", placeholder, re.ASCII) else ""
    return before + re.escape(placeholder) + after


@dataclass(frozen=True, slots=True)
class _Segment:
    """Consecutive tokens of a prompt, or the vectors that replace a placeholder."""

    ids: Sequence[int] = ()
    vectors: Tensor | None = None
    """[n, dim]"""
    is_output: bool = False

    def __len__(self) -> int:
        return len(self.ids) if self.vectors is None else len(self.vectors)


def _segments(
    tokenizer: PreTrainedTokenizerBase,
    pieces: Sequence[str],
    embeddings: Sequence[PlaceholderVectors],
) -> list[_Segment]:
    """The segments of a prompt: at most 512 tokens together, the last of them the end token."""
    by_placeholder = {embedding.placeholder: embedding for embedding in embeddings}
    segments: list[_Segment] = []
    room = TEXT_LENGTH - 1  # one is for the end token
    for index, piece in enumerate(pieces):
        if index % 2:  # every other piece is a placeholder
            embedding = by_placeholder[piece]
            segment = _Segment(
                vectors=embedding.vectors[:room], is_output=embedding.is_output_embedding
            )
        else:
            # Stripped because the tokenizer itself adds a space in front, and turns one at the end
            # into a separate token.
            segment = _Segment(ids=token_ids(tokenizer, piece.strip())[:room])
        segments.append(segment)
        room -= len(segment)
    end: Any = tokenizer.eos_token_id
    return [*segments, _Segment(ids=[end])]


def _encode_segments(text_encoder: UMT5EncoderModel, segments: Sequence[_Segment]) -> Tensor:
    """[length, dim] in the encoder's dtype."""
    width = text_encoder.config.d_model
    table = text_encoder.encoder.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    inputs: list[Tensor] = []
    for segment in segments:
        if segment.vectors is None:
            ids = to_device(torch.tensor(segment.ids, dtype=torch.long), text_encoder.device)
            # T5 does not scale its embeddings: rows of the table are the encoder's inputs.
            inputs.append(table(ids))
        elif segment.vectors.shape[1] != width:
            raise CheckpointError(
                f"embedding: its vectors have {segment.vectors.shape[1]} values and the text "
                f"encoder's {width}; it is for another text encoder"
            )
        elif not segment.is_output:
            # `to` casts from float32 differentiably, so gradients reach the float32 vectors.
            inputs.append(segment.vectors.to(table.weight))
    inputs_LD = torch.cat(inputs)
    # Output vectors are not among the inputs, so without input vectors that require gradients the
    # encoder need not keep activations for a backward pass.
    with torch.set_grad_enabled(torch.is_grad_enabled() and inputs_LD.requires_grad):
        outputs_LD = text_encoder(inputs_embeds=inputs_LD[None]).last_hidden_state[0]
    lengths = [0 if segment.is_output else len(segment) for segment in segments]
    return torch.cat(
        [
            segment.vectors.to(outputs_LD)
            if segment.is_output and segment.vectors is not None
            else outputs
            for segment, outputs in zip(segments, outputs_LD.split(lengths), strict=True)
        ]
    )
