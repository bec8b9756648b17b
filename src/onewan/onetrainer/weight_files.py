"""Adapters, experts and embeddings between OneTrainer's names and the files of other programs.

OneTrainer's key of an adapter's weight is ``<component>.<module>.<tensor>``, such as
``transformer_2.blocks.0.attn1.to_q.lora_down.weight``. Its savers support one transformer; here
onewan's writers give each expert a file of its own, ``NAME_high_noise`` and ``NAME_low_noise``, as
ComfyUI, diffusers and musubi-tuner read them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onewan.checkpoint.saver import AdapterHeader, WanModelSaver
from onewan.errors import CheckpointError
from onewan.formats.adapter import ModuleAdapter
from onewan.formats.embedding import EmbeddingFile
from onewan.formats.lora import KeyFormat
from onewan.formats.lora_files import AdapterFile, parse_adapter, read_adapter, read_adapters
from onewan.formats.lora_writing import BaseWeights
from onewan.formats.weights import expert_in_name
from onewan.model.embedding import WanModelEmbedding
from onewan.model.wan import WanModel
from onewan.variants import ExpertName, Variant

EXPERTS: dict[str, ExpertName] = {"transformer": "high", "transformer_2": "low"}

_FORMATS: dict[str, KeyFormat] = {
    "DIFFUSERS_LORA": "diffusers",
    "KOHYA_LORA": "kohya",
    "COMFY_LORA": "comfyui",
    "ORIGINAL_LORA": "official",
}
"""OneTrainer's name of each format."""

_ONETRAINER: dict[str, str] = {
    "lora_A": "lora_down.weight",
    "lora_B": "lora_up.weight",
    "magnitude": "dora_scale",
    "oft_R": "oft_R.weight",
}
"""OneTrainer's name of each tensor of an adapter, where it differs from onewan's."""


def save_adapters(
    weights: Mapping[str, Tensor],
    destination: Path,
    format: str,
    *,
    variant: Variant | None,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None,
    report: Callable[[str], None],
    model: WanModel | None = None,
) -> list[Path]:
    """Write OneTrainer's adapter `weights` in `format` (``KOHYA_LORA``), a file for each expert.

    `metadata` goes into the headers, and `report` gets a line for what the user should know of a
    file. `variant` is None if the model was not loaded: a single expert's file is then
    `destination` itself. CheckpointError where `format` can't hold this kind of adapter.
    """
    components: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        component, _, _ = key.partition(".")
        if component not in EXPERTS:
            raise CheckpointError(
                f"{destination}: {key} belongs to neither transformer; only the experts' adapters "
                "can be written in these formats"
            )
        # OneTrainer's key without the expert, which each file states in its header.
        name = f"transformer.{key.partition('.')[2]}"
        components.setdefault(component, {})[name] = tensor.detach().cpu().contiguous()
    two = len(components) > 1 if variant is None else len(variant.experts) > 1
    written: list[Path] = []
    for component, tensors in sorted(components.items()):
        expert = EXPERTS[component] if two else None
        path = expert_path(Path(destination), expert)
        modules = parse_adapter(tensors, source=str(path))
        header = AdapterHeader(kept=metadata, facts={"expert": expert} if expert else {})
        path.parent.mkdir(parents=True, exist_ok=True)
        notices = WanModelSaver().save_adapter(
            modules, path, _FORMATS[format], header, dtype=dtype, base=_base(model, component)
        )
        for notice in notices:
            report(f"{path.name}: {notice}")
        written.append(path)
    return written


def adapter_paths(weights: Mapping[str, Tensor], destination: Path) -> list[Path]:
    """The files that `save_adapters` would write for a model that was not loaded."""
    found = {key.partition(".")[0] for key in weights} & EXPERTS.keys()
    return [
        expert_path(Path(destination), EXPERTS[component] if len(found) > 1 else None)
        for component in sorted(found)
    ]


def expert_path(path: Path, expert: ExpertName | None) -> Path:
    """The file of one expert, named after `path`; `path` itself for a model with one expert."""
    suffix = "" if expert is None else f"_{expert}_noise"
    return path.with_name(f"{path.stem}{suffix}{path.suffix}")


def _base(model: WanModel | None, component: str) -> BaseWeights | None:
    """The base model's weights by name, for adapters that are written as weight differences."""
    transformer: nn.Module | None = getattr(model, component, None)

    def weight(name: str) -> Tensor:
        assert transformer is not None
        tensor = transformer.get_parameter(name)
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise CheckpointError(
                f"{name}: is quantized, and this format needs the original weight; choose another "
                "format, or a weight data type of 16 bit"
            )
        return tensor.detach().cpu()

    return None if transformer is None else weight


def load_adapters(path: Path, variant: Variant | None) -> dict[str, Tensor]:
    """The adapters in `path`, of any trainer, with OneTrainer's keys.

    `path` is one expert's file (the other's is found beside it by its name, ``..._low_noise``), a
    file with both experts, or the common part of both names. `variant` is None if the model was
    not loaded.
    """
    found: dict[str, Tensor] = {}
    for file, expert in _adapter_files(Path(path), variant):
        part = "transformer_2" if expert == "low" else "transformer"
        for module, adapter in file.modules.items():
            found |= {f"{part}.{module}.{k}": v for k, v in _onetrainer(adapter).items()}
    return found


def _adapter_files(path: Path, variant: Variant | None) -> list[tuple[AdapterFile, ExpertName]]:
    if not path.is_file():
        high, low = expert_path(path, "high"), expert_path(path, "low")
        files: list[tuple[AdapterFile, ExpertName]] = [
            (read_adapter(file), EXPERTS[part])
            for part, file in (("transformer", high), ("transformer_2", low))
            if file.is_file()
        ]
        if not files:
            raise CheckpointError(
                f"{path}: does not exist, nor {high.name} or {low.name}; give an adapter's file"
            )
        return files
    adapters = read_adapters(path)
    if len(adapters) > 1:
        return [(file, file.expert or "high") for file in adapters]
    file = adapters[0]
    if variant is not None and len(variant.experts) == 1:
        return [(file, "high")]
    said: Any = file.metadata.get("onewan.expert")
    expert: ExpertName = file.expert or said or expert_in_name(path) or "high"
    other: ExpertName = "low" if expert == "high" else "high"
    beside = path.with_name(path.name.replace(f"{expert}_noise", f"{other}_noise"))
    if expert_in_name(path) and beside != path and beside.is_file():
        return [(file, expert), (read_adapter(beside), other)]
    return [(file, expert)]


def _onetrainer(adapter: ModuleAdapter) -> dict[str, Tensor]:
    tensors = {_ONETRAINER.get(name, name): tensor for name, tensor in adapter.tensors.items()}
    alpha = adapter.rank if adapter.alpha is None else adapter.alpha
    # OneTrainer's OFT has no scale.
    if "oft_R.weight" not in tensors and alpha is not None:
        tensors["alpha"] = torch.tensor(float(alpha))
    return tensors


def only_transformers(model: WanModel, parts: Collection[str]) -> WanModel:
    """`model` with the transformers `parts` and nothing else."""
    kept: dict[str, Any] = {p: getattr(model, p) if p in parts else None for p in EXPERTS}
    return replace(model, tokenizer=None, text_encoder=None, vae=None, **kept)


def save_experts(model: WanModel, destination: Path, dtype: torch.dtype | None) -> None:
    """Write each transformer of `model` to a file of its own, in ComfyUI's format."""
    for part, name in EXPERTS.items():
        if getattr(model, part) is not None:
            path = expert_path(destination, name if len(model.variant.experts) > 1 else None)
            path.parent.mkdir(parents=True, exist_ok=True)
            one = only_transformers(model, (part,))
            WanModelSaver().save(one, path, "single", dtype, force=True)


def embedding_of(
    uuid: str, file: EmbeddingFile, placeholder: str | None = None
) -> WanModelEmbedding:
    """The embedding in `file`, with OneTrainer's `uuid` and, if given, its config's placeholder."""
    name = placeholder or file.placeholder or "<embedding>"
    return WanModelEmbedding(
        placeholder=name,
        name=name.strip("<>") or "embedding",
        uuid=uuid,
        vectors=nn.Parameter(file.vectors.float().clone()),
        is_output_embedding=file.is_output_embedding,
        initial_text=file.metadata.get("onewan.initial_text"),
    )
