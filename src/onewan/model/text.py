"""Prompts -> UMT5 embeddings, the way the transformer was trained on them.

A prompt is cleaned, tokenised with its end token, encoded at its true length, and only then filled
up with zero vectors to exactly 512. The transformer attends to all 512 without a mask, so zeros are
part of the input: 226 instead of 512 changes its output by 2 %, and leaving the encoder's own
vectors at padded places is silently wrong (``wan/modules/t5.py:506-513``, ``model.py:472-478``).
Encoding unpadded equals encoding padded with a mask to 2e-7, so each prompt is encoded alone: its
embedding never depends on its neighbours, and the cache can keep the valid tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from onewan.variants import TEXT_LENGTH


@torch.no_grad()
def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, text_encoder: UMT5EncoderModel, prompt: str
) -> Tensor:
    """[length, dim] in the encoder's dtype: the valid tokens of one prompt, at most 512.

    The empty prompt is one vector, that of the end token.
    """
    tokens = tokenizer(
        prompt_clean(prompt),
        max_length=TEXT_LENGTH,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    ).to(text_encoder.device)
    return text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state[0]


def pad_text(embeddings: Sequence[Tensor]) -> Tensor:
    """[B, 512, dim]: each of the [length, dim] embeddings followed by zeros."""
    first = embeddings[0]
    padded = first.new_zeros(len(embeddings), TEXT_LENGTH, first.shape[-1])
    for row, embedding in zip(padded, embeddings, strict=True):
        row[: len(embedding)] = embedding
    return padded
