"""UMT5's tokenizer: from a folder, or from the SentencePiece model in a text encoder's file.

A folder with ``tokenizer.json`` or ``tokenizer_config.json`` is loaded by transformers. For a bare
SentencePiece model, which ComfyUI's text encoder files contain, `tokenizer_from_sentencepiece`
builds the tokenizer with the tokenizers library, although transformers has `T5Tokenizer`, because:

- `T5Tokenizer.from_pretrained` needs a folder, and adds 100 sentinel tokens (``<extra_id_0>`` ...)
  by default, which changes the token ids of prompts that contain such a word;
- its constructor takes a vocabulary, which has to be parsed from the SentencePiece model as here;
  the normalization rules are then a private argument (`_spm_precompiled_charsmap`), and the id of
  ``<unk>`` is always 2, whatever the model says.

A test compares the token ids with those of the official ``tokenizer.json``.
"""

from __future__ import annotations

from pathlib import Path

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from onewan.errors import CheckpointError
from onewan.formats.untrusted import first_line
from onewan.formats.weights import open_component
from onewan.variants import TEXT_LENGTH

_REMEDY = "set model.tokenizer to the folder google/umt5-xxl of an official model, or that hub id"


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder `path`, or the one inside the weights file `path`.

    CheckpointError if there is none.
    """
    has_own_files = path.is_dir() and any(
        (path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")
    )
    if has_own_files:
        try:
            return AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the library checks no value in the files before using it
            raise CheckpointError(
                f"{path}: no usable tokenizer ({first_line(error)}); {_REMEDY}"
            ) from error
    # A folder with the bare SentencePiece model only, or that file itself.
    spiece = path / "spiece.model" if path.is_dir() else path
    if spiece.name.endswith(".model") and spiece.is_file():
        return tokenizer_from_sentencepiece(spiece.read_bytes(), str(spiece))
    try:
        weights = open_component(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: no usable tokenizer ({error}); {_REMEDY}") from error
    if weights.tokenizer is None:
        raise CheckpointError(f"{path}: contains no tokenizer; {_REMEDY}")
    model = weights.file.read(weights.tokenizer)
    return tokenizer_from_sentencepiece(model.numpy().tobytes(), f"{path}: {weights.tokenizer}")


def tokenizer_from_sentencepiece(spiece: bytes, where: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a serialized SentencePiece model, with the token ids of UMT5's own.

    Unknown characters become ``<unk>``, although the vocabulary has byte tokens to represent them:
    the official ``tokenizer.json`` has no byte fallback either. CheckpointError, which names the
    source as `where`, if it is not UMT5's.
    """
    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        proto.ParseFromString(spiece)
    except DecodeError as error:
        raise CheckpointError(f"{where}: is not a SentencePiece model; {_REMEDY}") from error
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    names = {name for name, _ in pieces}
    unk_id = proto.trainer_spec.unk_id
    if not {"<pad>", "</s>"} <= names or not 0 <= unk_id < len(pieces):
        raise CheckpointError(f"{where}: is not the SentencePiece model of UMT5; {_REMEDY}")
    # The pipeline of UMT5's tokenizer.json: normalizer, pre-tokenizer, decoder, end token.
    tokenizer = Tokenizer(Unigram(pieces, unk_id=unk_id, byte_fallback=False))
    if charsmap := proto.normalizer_spec.precompiled_charsmap:
        tokenizer.normalizer = normalizers.Precompiled(charsmap)
    # A word begins with "▁" (U+2581), also the first of a text; several spaces are one.
    space = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**space)]
    )
    tokenizer.decoder = decoders.Metaspace(**space)
    eos_id = next(index for index, (name, _) in enumerate(pieces) if name == "</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", eos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token=pieces[unk_id][0],
        model_max_length=TEXT_LENGTH,
    )
