"""A tiny text encoder (fixtures), learned vectors for it, and the tokens of a prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from onewan.demo.tiny_model import write_tiny_model
from onewan.model.embedding import WanModelEmbedding
from onewan.model.load import WanModelLoader
from onewan.model.wan import WanModel

FOX, INK = "<fox>", "<ink>"
BOTH = pytest.mark.parametrize("is_output", [False, True], ids=["input", "output"])
"""Runs a test with input vectors and with output vectors."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_tiny_model(folder, "ti2v-5b", width=32, layers=1)


@pytest.fixture
def load(model_folder: Path) -> Callable[..., WanModel]:
    def load(dtype: torch.dtype = torch.float32) -> WanModel:
        return WanModelLoader().load(
            model_folder, dtype=dtype, components=["text_encoder", "tokenizer"]
        )

    return load


@pytest.fixture
def model(load: Callable[..., WanModel]) -> WanModel:
    """Without placeholders; each test adds its own."""
    return load()


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
    """The end token, as the tokenizer adds it to a prompt."""
    tokenizer, _ = model.prompt_encoder()
    return tokenizer("").input_ids


def rows(model: WanModel, tokens: list[int]) -> Tensor:
    _, encoder = model.prompt_encoder()
    return encoder.shared.weight[tokens]
