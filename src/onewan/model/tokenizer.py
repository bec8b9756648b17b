"""UMT5's tokenizer: from a folder, or from the SentencePiece model in a text encoder's file."""

from __future__ import annotations

from pathlib import Path

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from onewan.errors import CheckpointError
from onewan.formats.backends import first_line
from onewan.formats.weights import recognise
from onewan.variants import TEXT_LENGTH

_REMEDY = "give model.tokenizer: the folder google/umt5-xxl of an official model, or that hub name"


def load_tokenizer(place: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in folder `place`, or the one that the weights at `place` carry.

    CheckpointError if there is none.
    """
    kept_apart = place.is_dir() and any(
        (place / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")
    )
    if kept_apart:
        try:
            return AutoTokenizer.from_pretrained(place, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{place}: no usable tokenizer ({first_line(error)}); {_REMEDY}"
            ) from error
    spiece = place / "spiece.model" if place.is_dir() else place
    if spiece.name.endswith(".model") and spiece.is_file():
        return tokenizer_of(spiece.read_bytes(), str(spiece))
    try:
        weights = recognise(place)
    except CheckpointError as error:
        raise CheckpointError(f"{place}: no usable tokenizer ({error}); {_REMEDY}") from error
    if weights.tokenizer is None:
        raise CheckpointError(f"{place}: carries no tokenizer; {_REMEDY}")
    model = weights.file.read(weights.tokenizer)
    return tokenizer_of(model.numpy().tobytes(), f"{place}: {weights.tokenizer}")


def tokenizer_of(spiece: bytes, where: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a SentencePiece model, as transformers makes UMT5's.

    Bytes of unknown characters become ``<unk>``, although the model could spell them out: so does
    the tokenizer.json that the model was trained and is used with.
    """
    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        proto.ParseFromString(spiece)
    except DecodeError as error:
        raise CheckpointError(f"{where}: is no SentencePiece model; {_REMEDY}") from error
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    names = {name for name, _ in pieces}
    unknown = proto.trainer_spec.unk_id
    if not {"<pad>", "</s>"} <= names or not 0 <= unknown < len(pieces):
        raise CheckpointError(f"{where}: is not the SentencePiece model of UMT5; {_REMEDY}")
    tokenizer = Tokenizer(Unigram(pieces, unk_id=unknown, byte_fallback=False))
    if charsmap := proto.normalizer_spec.precompiled_charsmap:
        tokenizer.normalizer = normalizers.Precompiled(charsmap)
    space = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**space)]
    )
    tokenizer.decoder = decoders.Metaspace(**space)
    end = next(number for number, (name, _) in enumerate(pieces) if name == "</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token=pieces[unknown][0],
        model_max_length=TEXT_LENGTH,
    )
