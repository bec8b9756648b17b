"""A model, or a component of one, as it lies on disk: what is where, and how it is arranged.

Whole models come in the three arrangements that `onewan.model.sources.layout` knows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from onewan.checkpoint.component import ComponentWeights, from_file
from onewan.checkpoint.layouts import WEIGHTS, ModelFormat
from onewan.errors import CheckpointError
from onewan.formats.container import open_tensors
from onewan.formats.weights import ComponentFile, looks_like_adapter, open_component
from onewan.model.sources import ComponentName, layout
from onewan.model.tokenizer import tokenizer_from_sentencepiece
from onewan.variants import ExpertName, Variant

SPIECE = "spiece.model"
"""SentencePiece's model in the folder of a tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What a path, or a model in memory, holds."""

    name: str
    components: Mapping[ComponentName, ComponentWeights]
    arrangement: Mapping[ComponentName, ModelFormat]
    """The layout that each component has now."""
    whole: bool
    """Whether it is a model's folder and not a component by itself."""
    tokenizer: Mapping[str, bytes] = field(default_factory=dict)
    """The tokenizer's files by name."""

    @property
    def variant(self) -> Variant | None:
        """None for a text encoder or a VAE of the A14B models alone."""
        return next((c.variant for c in self.components.values() if c.variant), None)

    @property
    def missing(self) -> list[ComponentName]:
        """The components that a whole model has and this has not."""
        variant = self.variant
        single = variant is not None and len(variant.experts) == 1
        wanted: list[ComponentName] = [p for p in WEIGHTS if not (single and p == "transformer_2")]
        return [placed for placed in wanted if placed not in self.components]


def read_model(path: Path) -> Model:
    """The model or component at `path`, its headers read and checked. CheckpointError says what is
    wrong with it, or that its components do not belong together."""
    path = Path(path)
    found = layout(path)
    weights: dict[ComponentName, ComponentFile] = {
        p: open_component(found[p]) for p in WEIGHTS if p in found
    }
    if not weights:
        return _alone(path)
    components: dict[ComponentName, ComponentWeights] = {
        p: _component(p, held) for p, held in weights.items()
    }
    folder = found.get("tokenizer", path / "tokenizer")
    model = Model(
        name=str(path),
        components=components,
        arrangement={p: arrangement_of(w) for p, w in weights.items()},
        whole=True,
        tokenizer=_tokenizer(folder, components.get("text_encoder")),
    )
    _check(model)
    return _with_spiece(model)


def holds_adapter(path: Path) -> bool:
    """Whether `path` is the file of a LoRA or its kin."""
    return path.is_file() and looks_like_adapter(open_tensors(path))


def arrangement_of(weights: ComponentFile) -> ModelFormat:
    """The layout that a component has. One that nobody writes counts as a single file."""
    shards = weights.path.is_dir() or weights.path.suffix == ".json"
    if weights.file.container == "safetensors" and shards:
        return "official" if weights.key_format == "official" else "diffusers"
    if weights.file.container == "pickle" and weights.key_format == "official":
        return "single" if weights.kind == "transformer" else "official"
    return "fp8_scaled" if weights.quantization.startswith("fp8") else "single"


def _alone(path: Path) -> Model:
    weights = open_component(path)
    component = from_file(weights)
    placed = _placed(component)
    components: dict[ComponentName, ComponentWeights] = {placed: component}
    arrangement: dict[ComponentName, ModelFormat] = {placed: arrangement_of(weights)}
    return Model(
        name=str(path),
        components=components,
        arrangement=arrangement,
        whole=False,
    )


def _component(placed: ComponentName, weights: ComponentFile) -> ComponentWeights:
    component = from_file(weights)
    expected = "transformer" if placed == "transformer_2" else placed
    if component.kind != expected:
        raise CheckpointError(
            f"{weights.path}: is where the {placed} belongs, and holds a "
            f"{component.kind.replace('_', ' ')}"
        )
    if component.variant is None or component.kind == "vae":
        return component
    experts: dict[str, ExpertName] = {e.component: e.name for e in component.variant.experts}
    return replace(component, expert=experts.get(placed))


def _placed(component: ComponentWeights) -> ComponentName:
    if component.kind == "transformer":
        return "transformer_2" if component.expert == "low" else "transformer"
    return component.kind


def _check(model: Model) -> None:
    """CheckpointError if the components are not of one model."""
    variants = {p: c.variant.name for p, c in model.components.items() if c.variant}
    if len(set(variants.values())) > 1:
        listed = ", ".join(f"{placed} {name}" for placed, name in variants.items())
        raise CheckpointError(f"{model.name}: mixes variants ({listed}); convert them one by one")
    variant = model.variant
    if variant is None:
        raise CheckpointError(
            f"{model.name}: has no transformer, which would tell the variant; convert its "
            "components one by one"
        )
    vae = model.components.get("vae")
    if vae is not None and vae.config["z_dim"] != variant.latent_channels:
        raise CheckpointError(
            f"{vae.source}: has {vae.config['z_dim']} latent channels, and {variant.name} has "
            f"{variant.latent_channels}; it is the VAE of another model"
        )


# ---------------------------------------------------------------------------------------- tokenizer


def _tokenizer(folder: Path, encoder: ComponentWeights | None) -> dict[str, bytes]:
    """The tokenizer's files: those in `folder`, else made from what `encoder` carries."""
    if folder.is_dir():
        files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
        return {file.name: file.read_bytes() for file in files}
    if encoder is None or encoder.tokenizer is None:
        return {}
    spiece = encoder.tokenizer().numpy().tobytes()
    made = saved_tokenizer(tokenizer_from_sentencepiece(spiece, encoder.source))
    return {**made, SPIECE: spiece}


def saved_tokenizer(tokenizer: object) -> dict[str, bytes]:
    """The files that a transformers tokenizer saves itself in."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)  # pyright: ignore[reportAttributeAccessIssue]
        return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def _with_spiece(model: Model) -> Model:
    """`model` with SentencePiece's model in the text encoder if the tokenizer's folder has it."""
    encoder, spiece = model.components.get("text_encoder"), model.tokenizer.get(SPIECE)
    if encoder is None or spiece is None or encoder.tokenizer is not None:
        return model
    encoder = replace(
        encoder, tokenizer=lambda: torch.frombuffer(bytearray(spiece), dtype=torch.uint8)
    )
    return replace(model, components={**model.components, "text_encoder": encoder})
