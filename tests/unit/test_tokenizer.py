"""The tokenizer built from a SentencePiece model has the token ids of the official tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer, T5Tokenizer

from onewan.errors import CheckpointError
from onewan.model.tokenizer import tokenizer_from_sentencepiece

PROMPTS = [
    "",
    "a red fox",
    "  two  spaces and\na line\tbreak ",
    "Ünïcödé 一只猫 ﬁ ½ \u200b 🦊",
    "special words: </s> <pad> <unk> <extra_id_0> <s>",
]


@pytest.fixture(scope="module")
def official(shared: Path) -> Path:
    return shared / "golden" / "t2v-A14B" / "google" / "umt5-xxl"


def test_token_ids_equal_those_of_the_official_tokenizer(official: Path) -> None:
    reference = AutoTokenizer.from_pretrained(official, local_files_only=True)
    tokenizer = tokenizer_from_sentencepiece((official / "spiece.model").read_bytes(), "here")
    assert len(tokenizer) == len(reference)
    for prompt in PROMPTS:
        assert tokenizer(prompt).input_ids == reference(prompt).input_ids, prompt


def test_the_t5_tokenizer_of_transformers_differs_by_its_sentinel_tokens(official: Path) -> None:
    """Why it is not used. If this fails, it can replace `tokenizer_from_sentencepiece`."""
    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    proto.ParseFromString((official / "spiece.model").read_bytes())
    plain = T5Tokenizer(
        vocab=[(piece.piece, piece.score) for piece in proto.pieces],
        _spm_precompiled_charsmap=proto.normalizer_spec.precompiled_charsmap,
    )
    reference = AutoTokenizer.from_pretrained(official, local_files_only=True)
    assert plain(PROMPTS[-1]).input_ids != reference(PROMPTS[-1]).input_ids


def test_other_bytes_are_refused() -> None:
    with pytest.raises(CheckpointError, match="here: is not a SentencePiece model; set"):
        tokenizer_from_sentencepiece(b"nothing of the kind", "here")
    empty = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(CheckpointError, match="here: is not the SentencePiece model of UMT5"):
        tokenizer_from_sentencepiece(empty.SerializeToString(), "here")
