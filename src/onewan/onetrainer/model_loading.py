"""Models for OneTrainer, by onewan's loader, each component in the requested data type."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from onewan.errors import CheckpointError
from onewan.files import replacing
from onewan.model.load import WanModelLoader
from onewan.model.sources import PipelineComponent
from onewan.model.wan import WanModel

SOURCES_FILE = "onewan.json"
"""Name of the file in a fine-tuning's backup that says where untrained components came from."""

META_FILE = "meta.json"
"""A file that OneTrainer writes into every backup."""

FLOAT32_LINEARS = ("linear_1", "linear_2", "time_proj", "proj_out")
"""Linear layers outside the transformer blocks, by the last part of their name. They
compute in float32 and are not quantized (`onewan.model.precision`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """The model to load: its sources and data types."""

    base: str
    overrides: Mapping[str, str] = field(default_factory=dict)
    """By component; they replace the base model's."""
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    """By component, of weights that are not quantized."""
    boundary: float | None = None
    excluded: Collection[str] = ()


def component_sources(request: LoadRequest) -> dict[str, str]:
    """The source of each component. A backup says where the untrained ones came from."""
    meta, recorded = Path(request.base) / META_FILE, Path(request.base) / SOURCES_FILE
    if not (request.base and meta.is_file()):
        return {"path": request.base, **{k: v for k, v in request.overrides.items() if v}}
    if not recorded.is_file():
        raise CheckpointError(
            f"{request.base}: has no {SOURCES_FILE}, so it is no backup of a Wan 2.2 fine-tuning; "
            "select the base model here, and the backup as the LoRA"
        )
    sources: dict[str, str] = dict(json.loads(recorded.read_text("utf-8"))["sources"])
    for part in ("transformer", "transformer_2"):
        if (Path(request.base) / part).is_dir():
            sources[part] = str(Path(request.base) / part)
    return sources


def write_sources(folder: Path, sources: Mapping[str, str]) -> None:
    """Write into the backup `folder` where the untrained components are."""
    content = json.dumps({"sources": dict(sources)}, indent=2) + "\n"
    with replacing(folder / SOURCES_FILE) as path:
        path.write_text(content, encoding="utf-8")


def load(request: LoadRequest) -> WanModel:
    """The model, on the CPU. CheckpointError names the file and what is wrong with it."""
    sources = component_sources(request)

    def part(
        components: Collection[PipelineComponent], dtype: torch.dtype, variant: Any
    ) -> WanModel:
        try:
            return _loaded(sources, variant, dtype, components, request.boundary)
        except CheckpointError as error:
            details = [_with_onetrainers_names(line) for line in error.details]
            raise CheckpointError(_with_onetrainers_names(error.message), details) from error

    # Each component has a data type of its own, which the loader takes once for each call.
    def dtype(component: str) -> torch.dtype:
        return request.dtypes.get(component, torch.float32)

    model = part(("transformer", "scheduler"), dtype("transformer"), None)
    variant = model.variant.name
    if len(model.variant.experts) > 1 and "transformer_2" not in request.excluded:
        second = part(("transformer_2",), dtype("transformer_2"), variant)
        model.transformer_2 = second.transformer_2
        model.notices += second.notices
    encoder = part(("vae", "text_encoder", "tokenizer"), dtype("text_encoder"), variant)
    model.vae, model.text_encoder = encoder.vae, encoder.text_encoder
    model.tokenizer = encoder.tokenizer
    model.notices += encoder.notices
    return model


def _with_onetrainers_names(message: str) -> str:
    for ours, theirs in (
        ("set model.boundary to", "set the Wan boundary (wan_boundary) to"),
        ("model.transformer_2", "transformer_2.model_name"),
        ("model.transformer", "transformer.model_name"),
        ("model.vae", "vae.model_name"),
    ):
        message = message.replace(ours, theirs)
    return message


def reload_components(
    model: WanModel, sources: Mapping[str, str], parts: Collection[Any]
) -> WanModel:
    """Load `parts` of a model from its `sources` again, in bfloat16, not quantized."""
    variant = model.variant
    return _loaded(dict(sources), variant.name, torch.bfloat16, parts, variant.boundary)


def _loaded(
    sources: dict[str, str], variant: Any, dtype: torch.dtype, parts: Any, boundary: float | None
) -> WanModel:
    return WanModelLoader().load(
        sources, variant, dtype, "cpu", parts, weights="bf16", boundary=boundary
    )
