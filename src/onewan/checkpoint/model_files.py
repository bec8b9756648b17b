"""A model, or a component of one, read from disk for conversion: its weights and its layout."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from onewan.checkpoint.component import ComponentWeights, from_file
from onewan.checkpoint.target_formats import ModelFormat
from onewan.formats.container import open_tensors, weight_files
from onewan.formats.model_folder import (
    ComponentDescription,
    ComponentName,
    describe_component,
    describe_components,
    find_components,
    for_each,
    infer_variant,
    missing_components,
    model_problems,
    raise_problems,
    refuse_folder_of_adapters,
)
from onewan.formats.weights import ComponentFile, looks_like_adapter
from onewan.model.tokenizer import tokenizer_from_sentencepiece
from onewan.variants import ExpertName, Variant

SPIECE = "spiece.model"
"""SentencePiece's model in the folder of a tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWeights:
    """The components of a model, or one component by itself, with lazy weights."""

    name: str
    components: Mapping[ComponentName, ComponentWeights]
    formats: Mapping[ComponentName, ModelFormat]
    """The layout of each component on disk; empty for a model in memory."""
    whole: bool
    """Whether it is a model's folder, not a component by itself."""
    tokenizer: Mapping[str, bytes] = field(default_factory=dict)
    """The contents of the tokenizer's files by file name."""

    @property
    def variant(self) -> Variant | None:
        """None for a text encoder, or a VAE of the A14B models, by itself."""
        return next((c.variant for c in self.components.values() if c.variant), None)

    @property
    def missing(self) -> list[ComponentName]:
        """The components with weights that a whole model has and this one does not."""
        assert self.variant is not None
        # Not the tokenizer: without one the result gets none, which is no loss of weights.
        return missing_components({*self.components, "tokenizer"}, self.variant)


def read_model(path: Path) -> ModelWeights:
    """The model or component at `path`; only headers are read. CheckpointError if a component can't
    be read or is incomplete, or if the components are not of one variant."""
    path = Path(path)
    paths = find_components(path)
    described = describe_components(paths) or _describe_alone(path)
    whole = bool(paths.keys() - {"tokenizer"})
    if whole:
        # In a model's folder the layout determines the expert; file names may be arbitrary.
        raise_problems(model_problems(str(path), described, check_file_names=False))
        variant = infer_variant(described)
        assert variant is not None  # otherwise `model_problems` returned one
        experts: dict[str, ExpertName] = {e.component: e.name for e in variant.experts}
        for name, component in described.items():
            described[name] = replace(component, expert=experts.get(name))
    components = for_each(lambda name: from_file(described[name]), described)
    folder = paths.get("tokenizer", path / "tokenizer")
    formats: dict[ComponentName, ModelFormat] = {}
    for name, component in described.items():
        assert component.file is not None  # `describe_components` reads the files of all by default
        formats[name] = format_of(component.file)
    model = ModelWeights(
        name=str(path),
        components=components,
        formats=formats,
        whole=whole,
        tokenizer=_tokenizer(folder, components.get("text_encoder")) if whole else {},
    )
    return _with_spiece(model) if whole else model


def _describe_alone(path: Path) -> dict[ComponentName, ComponentDescription]:
    """A component by itself. An expert that may be either gets the name of the first one, since
    nothing in its file depends on which it is."""
    described = describe_component(path)
    if described.kind == "transformer":
        return {"transformer_2" if described.expert == "low" else "transformer": described}
    return {described.kind: described}


def holds_adapter(path: Path) -> bool:
    """Whether `path` is an adapter (LoRA, DoRA, LoHa, LoKr, OFT): a file, or a folder with one, as
    PEFT and diffusion-pipe write it."""
    refuse_folder_of_adapters(path)
    if path.is_dir() and len(weight_files(path)) != 1:
        return False
    return looks_like_adapter(open_tensors(path))


def format_of(weights: ComponentFile) -> ModelFormat:
    """The layout of a component on disk; ``single`` also for forms that onewan does not write."""
    shards = weights.path.is_dir() or weights.path.suffix == ".json"
    if weights.file.container == "safetensors" and shards:
        return "official" if weights.key_format == "official" else "diffusers"
    # The official .pth files are those of VAE and text encoder; a transformer has shards.
    if weights.file.container == "pickle" and weights.key_format == "official":
        return "single" if weights.kind == "transformer" else "official"
    return "fp8_scaled" if weights.quantization.startswith("fp8") else "single"


# ---------------------------------------------------------------------------------------- tokenizer


def _tokenizer(folder: Path, encoder: ComponentWeights | None) -> dict[str, bytes]:
    """The tokenizer's files from `folder`, or else made from the SentencePiece model in the file of
    `encoder`."""
    if folder.is_dir():
        files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
        return {file.name: file.read_bytes() for file in files}
    if encoder is None or encoder.tokenizer is None:
        return {}
    spiece = encoder.tokenizer().numpy().tobytes()
    files = saved_tokenizer(tokenizer_from_sentencepiece(spiece, encoder.source))
    return {**files, SPIECE: spiece}


def saved_tokenizer(tokenizer: object) -> dict[str, bytes]:
    """The files, by name, that a transformers tokenizer writes when it is saved."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)  # pyright: ignore[reportAttributeAccessIssue]
        return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def _with_spiece(model: ModelWeights) -> ModelWeights:
    """`model` with SentencePiece's model added to the text encoder if the tokenizer's folder has
    it: ComfyUI reads it from the text encoder's file."""
    encoder, spiece = model.components.get("text_encoder"), model.tokenizer.get(SPIECE)
    if encoder is None or spiece is None or encoder.tokenizer is not None:
        return model
    encoder = replace(
        encoder, tokenizer=lambda: torch.frombuffer(bytearray(spiece), dtype=torch.uint8)
    )
    return replace(model, components={**model.components, "text_encoder": encoder})
