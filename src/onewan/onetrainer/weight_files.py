"""Adapters, experts and embeddings between OneTrainer's names and the files of other programs.

OneTrainer's own name for an adapter's weight is ``<part>.<module>.<tensor>``, such as
``transformer_2.blocks.0.attn1.to_q.lora_down.weight``. Its savers know one denoiser; here each
expert gets a file of its own, ``NAME_high_noise`` and ``NAME_low_noise``, by onewan's writers, as
ComfyUI, diffusers and musubi-tuner read them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from onewan.checkpoint.saver import WanModelSaver, convert_adapter
from onewan.errors import CheckpointError
from onewan.formats.adapter import ModuleAdapter
from onewan.formats.container import open_tensors
from onewan.formats.embedding import EmbeddingFile
from onewan.formats.lora import LoraFormat
from onewan.formats.lora_files import AdapterFile, read_adapter
from onewan.formats.weights import expert_in_name
from onewan.formats.write import write_safetensors
from onewan.model.embedding import WanModelEmbedding
from onewan.model.wan import WanModel
from onewan.variants import Expert, ExpertName, Variant

EXPERTS: dict[str, ExpertName] = {"transformer": "high", "transformer_2": "low"}

_FORMATS: dict[str, LoraFormat] = {
    "DIFFUSERS_LORA": "diffusers",
    "KOHYA_LORA": "kohya",
    "COMFY_LORA": "comfyui",
    "ORIGINAL_LORA": "comfyui",
}
"""OneTrainer's names of formats; ORIGINAL is ComfyUI's without its prefix."""

_COMFY_PREFIX = "diffusion_model."

_ONETRAINER: dict[str, str] = {
    "lora_A": "lora_down.weight",
    "lora_B": "lora_up.weight",
    "magnitude": "dora_scale",
}
"""onewan's names of an adapter's tensors that OneTrainer calls otherwise."""


# ----------------------------------------------------------------------------------------- adapters


def save_adapters(
    weights: Mapping[str, Tensor],
    destination: Path,
    format: str,
    *,
    variant: Variant | None,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None,
    model: WanModel | None = None,
) -> list[Path]:
    """Write OneTrainer's adapter `weights` in `format` (``KOHYA_LORA``), a file for each expert.

    `metadata` goes into the headers. `variant` None is of a model that was not loaded: a single
    expert's file then has the name as it was given. CheckpointError where `format` can't hold this
    kind of adapter.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        part, _, rest = key.partition(".")
        if part not in EXPERTS:
            raise CheckpointError(
                f"{destination}: {key} is the weight of neither transformer; only the experts' "
                "adapters go into these formats"
            )
        parts.setdefault(part, {})[rest] = tensor.detach().cpu().contiguous()
    two = len(parts) > 1 if variant is None else len(variant.experts) > 1
    written: list[Path] = []
    for part, found in sorted(parts.items()):
        expert = EXPERTS[part] if two else None
        path = named(Path(destination), expert)
        _save_adapter(found, path, format, expert, metadata, dtype, _base(model, part))
        written.append(path)
    return written


def adapter_paths(weights: Mapping[str, Tensor], destination: Path) -> list[Path]:
    """Where `save_adapters` would write, for a model that was not loaded."""
    parts = {key.partition(".")[0] for key in weights} & EXPERTS.keys()
    return [named(Path(destination), EXPERTS[p] if len(parts) > 1 else None) for p in sorted(parts)]


def named(path: Path, expert: ExpertName | None) -> Path:
    """The file of one expert among those called `path`."""
    suffix = "" if expert is None else f"_{expert}_noise"
    return path.with_name(f"{path.stem}{suffix}{path.suffix}")


def _save_adapter(
    weights: Mapping[str, Tensor],
    path: Path,
    format: str,
    expert: ExpertName | None,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None,
    base: Any,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "adapter.safetensors"
        header = dict(metadata) | ({"onewan.expert": expert} if expert else {})
        write_safetensors(raw, {f"transformer.{k}": v for k, v in weights.items()}, header)
        path.parent.mkdir(parents=True, exist_ok=True)
        for notice in convert_adapter(raw, path, _FORMATS[format], dtype=dtype, base=base):
            print(f"{path.name}: {notice}")
        if format == "ORIGINAL_LORA":
            file = open_tensors(path)
            names = {name: name.removeprefix(_COMFY_PREFIX) for name in file.tensors}
            tensors = {new: file.read(old) for old, new in names.items()}
            write_safetensors(path, tensors, dict(file.metadata))


def _base(model: WanModel | None, part: str) -> Any:
    """The base model's weights by name, for kinds that become differences."""
    transformer: nn.Module | None = getattr(model, part, None)

    def weight(name: str) -> Tensor:
        assert transformer is not None
        tensor = transformer.get_parameter(name)
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise CheckpointError(
                f"{name}: is quantized, and this format needs it as it was; choose another format, "
                "or a weight data type of 16 bit"
            )
        return tensor.detach().cpu()

    return None if transformer is None else weight


def load_adapters(path: Path, variant: Variant | None) -> dict[str, Tensor]:
    """The adapters in `path`, of any trainer, under OneTrainer's names.

    `path` is one expert's file, whose other is found beside it by its name (``..._low_noise``), a
    file that holds both, or the name that both have in common. `variant` None is of a model that
    was not loaded.
    """
    found: dict[str, Tensor] = {}
    for file, expert in _adapter_files(Path(path), variant):
        part = "transformer_2" if expert == "low" else "transformer"
        for module, adapter in file.modules.items():
            found |= {f"{part}.{module}.{k}": v for k, v in _onetrainer(adapter).items()}
    return found


_Found: TypeAlias = tuple[AdapterFile, "ExpertName | None"]


def _adapter_files(path: Path, variant: Variant | None) -> list[_Found]:
    if not path.is_file():
        return _pair(path)
    try:
        file = read_adapter(path)
    except CheckpointError:
        return [_one_of(path, "high"), _one_of(path, "low")]
    if variant is not None and len(variant.experts) == 1:
        return [(file, None)]
    said: Any = file.metadata.get("onewan.expert")
    expert: ExpertName = file.expert or said or expert_in_name(path) or "high"
    other: ExpertName = "low" if expert == "high" else "high"
    beside = path.with_name(path.name.replace(f"{expert}_noise", f"{other}_noise"))
    if expert_in_name(path) and beside != path and beside.is_file():
        return [(file, expert), (read_adapter(beside), other)]
    return [(file, expert)]


def _pair(path: Path) -> list[_Found]:
    """The files of which `path` is the name without the expert."""
    found: list[_Found] = []
    high, low = named(path, "high"), named(path, "low")
    if high.is_file():
        found.append((read_adapter(high), "high"))
    if low.is_file():
        found.append((read_adapter(low), "low"))
    if not found:
        raise CheckpointError(f"{path}: there is no such file, nor {high.name} or {low.name}")
    return found


def _one_of(path: Path, expert: ExpertName) -> _Found:
    return read_adapter(path, expert), expert


def _onetrainer(adapter: ModuleAdapter) -> dict[str, Tensor]:
    tensors = {
        _ONETRAINER.get(name, "oft_R.weight" if name == "oft_R" else name): tensor
        for name, tensor in adapter.tensors.items()
    }
    if "oft_R.weight" not in tensors:
        rank = adapter.rank
        alpha = adapter.alpha if adapter.alpha is not None else rank
        if alpha is not None:
            tensors["alpha"] = torch.tensor(float(alpha))
    return tensors


# ------------------------------------------------------------------------------------- full weights


def alone(model: WanModel, part: str) -> WanModel:
    """`model` with the one transformer `part` and nothing else."""
    others: dict[str, Any] = dict.fromkeys(("transformer", "transformer_2"))
    others[part] = getattr(model, part)
    return replace(
        model, tokenizer=None, text_encoder=None, vae=None, noise_scheduler=None, **others
    )


def save_experts(
    model: WanModel, destination: Path, dtype: torch.dtype | None, parts: list[str]
) -> list[Path]:
    """Write each of the transformers `parts` to a file of its own, as ComfyUI reads it."""
    written: list[Path] = []
    for part in parts:
        expert = _expert(model.variant, part)
        path = named(Path(destination), expert.name if len(model.variant.experts) > 1 else None)
        path.parent.mkdir(parents=True, exist_ok=True)
        WanModelSaver().save(alone(model, part), path, "single", dtype, force=True)
        written.append(path)
    return written


def _expert(variant: Variant, part: str) -> Expert:
    return next(expert for expert in variant.experts if expert.component == part)


# --------------------------------------------------------------------------------------- embeddings


def embedding_of(
    uuid: str, file: EmbeddingFile, placeholder: str | None = None
) -> WanModelEmbedding:
    """What `file` holds, under OneTrainer's `uuid`, with the placeholder of its config if given."""
    name = placeholder or file.placeholder or "<embedding>"
    return WanModelEmbedding(
        placeholder=name,
        name=name.strip("<>") or "embedding",
        uuid=uuid,
        vectors=nn.Parameter(file.vectors.float().clone()),
        is_output_embedding=file.is_output_embedding,
        initial_text=file.metadata.get("onewan.initial_text"),
    )
