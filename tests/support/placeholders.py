"""Vectors for tests, and what a prompt's own tokens are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onewan.model.embedding import WanModelEmbedding
from onewan.model.wan import WanModel

FOX, INK = "<fox>", "<ink>"


def vectors(count: int, seed: int = 0) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(count, 64, generator=generator))


def learned(
    placeholder: str = FOX, count: int = 2, *, is_output: bool = False, seed: int = 0
) -> WanModelEmbedding:
    return WanModelEmbedding(
        placeholder=placeholder,
        name=placeholder.strip("<>"),
        uuid=f"uuid of {placeholder}",
        vectors=vectors(count, seed),
        is_output_embedding=is_output,
    )


def ids(model: WanModel, text: str) -> list[int]:
    tokenizer, _ = model.prompt_encoder()
    return tokenizer(text, add_special_tokens=False).input_ids


def end(model: WanModel) -> list[int]:
    """The end token, as the tokenizer itself puts it."""
    tokenizer, _ = model.prompt_encoder()
    return tokenizer("").input_ids


def rows(model: WanModel, tokens: list[int]) -> Tensor:
    _, encoder = model.prompt_encoder()
    return encoder.shared.weight[tokens]
