"""Merges adapters into a model: W + the weighted sum of the difference that each one makes.

Computed in float32 from the base model's numbers and rounded once, to the type that is written.
Everything that the adapters do not touch stays as it is, to the bit, quantized weights included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from onewan.checkpoint.atomic_write import ProgressCallback
from onewan.checkpoint.component import ComponentWeights, SourceWeight
from onewan.checkpoint.convert import WriteResult, write_model
from onewan.checkpoint.layouts import ModelFormat
from onewan.checkpoint.model_files import ModelWeights, read_model
from onewan.checkpoint.saver import expert_of
from onewan.errors import CheckpointError
from onewan.formats.adapter import ModuleAdapter
from onewan.formats.container import open_tensors
from onewan.formats.lora import layout_of
from onewan.formats.lora_files import AdapterFile, BaseWeights, read_adapter
from onewan.formats.model_folder import ComponentName
from onewan.formats.weights import detect_expert
from onewan.variants import ExpertName


@dataclass(frozen=True, slots=True)
class _WeightedAdapter:
    adapter: ModuleAdapter
    weight: float


def merge(
    base: Path,
    loras: Sequence[tuple[Path, float]],
    destination: Path,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
    check_file_names: bool = True,
    report: ProgressCallback = lambda _done, _total: None,
) -> WriteResult:
    """Write `base`, a model's folder or one transformer, with `loras` (path, weight) merged in.

    Each LoRA goes to its expert, told by its keys, its header or its name. `destination` gets the
    layout of `base`; of a single file, with official names and no prefix. `dtype` is as in
    `convert_model`. CheckpointError as there, if a LoRA has a layer that the base has not, and with
    `check_file_names` if headers or names say that a LoRA and a single base are of different
    experts.
    """
    model = read_model(Path(base))
    added: dict[ComponentName, dict[str, list[_WeightedAdapter]]] = {}
    for path, weight in loras:
        for placed, file in _adapters(Path(path), model, check_file_names).items():
            _check_layers_fit(file, model.components[placed])
            for module, adapter in file.modules.items():
                added.setdefault(placed, {}).setdefault(module, []).append(
                    _WeightedAdapter(adapter, weight)
                )
    components = {
        placed: _add_adapters(component, added[placed]) if placed in added else component
        for placed, component in model.components.items()
    }
    arrangement, to = _arrangement(model)
    written = write_model(
        replace(model, components=components),
        Path(destination),
        arrangement,
        to,
        sources=[Path(base), *(Path(path) for path, _ in loras)],
        dtype=dtype,
        force=force,
        report=report,
    )
    notices = [
        f"{components[placed].source}: the merged weights were quantized to fp8 anew"
        for placed in added
        if arrangement[placed] == "fp8_scaled"
    ]
    untouched = [p for p in components if p.startswith("transformer") and p not in added]
    if untouched:
        notices.append(
            f"{base}: no LoRA was given for {' and '.join(untouched)}, which stays as is"
        )
    return WriteResult(files=written.files, notices=(*written.notices, *notices))


def base_weights(base: Path, lora: Path, expert: ExpertName | None) -> BaseWeights:
    """The weights of the model at `base` that the adapter `lora` was trained on; `expert` says
    which of two it is, where that is to be said."""
    model = read_model(base)
    placed = _component_for(model, lora, expert or _expert_in_keys(lora))
    weights = model.components[placed].weights
    source = model.components[placed].source

    def read(name: str) -> Tensor:
        if name not in weights:
            raise CheckpointError(f"{source}: has no {name}; {lora.name} is of another model")
        return weights[name].read()

    return read


def _expert_in_keys(lora: Path) -> ExpertName | None:
    """The expert that the keys of `lora` name."""
    file = open_tensors(lora)
    layout = layout_of(file.tensors, file.metadata)
    return layout.experts[0] if layout is not None and len(layout.experts) == 1 else None


def _adapters(
    path: Path, model: ModelWeights, check_file_names: bool
) -> dict[ComponentName, AdapterFile]:
    """What is in `path`, by the component of `model` that it is for."""
    file = open_tensors(path)
    layout = layout_of(file.tensors, file.metadata)
    experts = () if layout is None else layout.experts
    if len(experts) > 1 and model.whole:
        return {
            _component_for(model, path, expert): read_adapter(path, expert) for expert in experts
        }
    alone = None if model.whole else next(iter(model.components.values())).expert
    if len(experts) > 1 and alone is None:
        raise CheckpointError(
            f"{path}: holds the LoRAs of both experts, and neither header nor name of {model.name} "
            "says which it is; name it ..._high_noise or ..._low_noise"
        )
    adapter = read_adapter(path, alone if len(experts) > 1 else None)
    return {_component_for(model, path, adapter.expert, check_file_names): adapter}


def _component_for(
    model: ModelWeights, lora: Path, named: ExpertName | None, check_file_names: bool = True
) -> ComponentName:
    """The component of `model` that `lora` is for."""
    transformers: list[ComponentName] = [p for p in model.components if p.startswith("transformer")]
    if not transformers:
        raise CheckpointError(f"{model.name}: holds no transformer, and LoRAs are for one")
    metadata = open_tensors(lora).metadata
    if not model.whole:
        told = detect_expert(lora, metadata)
        of_lora, of_base = named or (told and told[0]), model.components[transformers[0]].expert
        if check_file_names and {of_lora, of_base} == {"high", "low"}:
            raise CheckpointError(
                f"{lora}: is for the {of_lora}-noise expert, and {model.name} is the "
                f"{of_base}-noise one, by header or name; give the other, or add --any-expert"
            )
        return transformers[0]
    assert model.variant is not None
    # The keys of a file for diffusers begin with "transformer." for whichever expert.
    expert = expert_of(lora, metadata, model.variant, named)
    if expert.component not in transformers:
        raise CheckpointError(
            f"{model.name}: has no {expert.component}, and {lora} is for the {expert.name} expert"
        )
    return expert.component


# ------------------------------------------------------------------------------------------ weights


def _check_layers_fit(file: AdapterFile, base: ComponentWeights) -> None:
    """CheckpointError if an adapter has no layer to go to, or does not fit it."""
    problems: list[str] = []
    for module, adapter in file.modules.items():
        weight = base.weights.get(f"{module}.weight")
        if weight is None:
            problems.append(f"no layer {module}")
            continue
        shape = _shape_after_merge(adapter, weight.shape)
        bias = adapter.bias_difference()
        if shape != weight.shape:
            problems.append(f"{module} is {list(weight.shape)}, the LoRA's {list(shape)}")
        elif bias is not None and f"{module}.bias" not in base.weights:
            problems.append(f"{module} has no bias")
        elif bias is not None and tuple(bias.shape) != base.weights[f"{module}.bias"].shape:
            problems.append(f"the bias of {module} is not {list(bias.shape)}")
    if problems:
        more = ", ..." if len(problems) > 3 else ""
        raise CheckpointError(
            f"{file.path}: does not fit {base.source} in {len(problems)} of {len(file.modules)} "
            f"layers ({'; '.join(problems[:3])}{more}); it is of another model"
        )


def _shape_after_merge(adapter: ModuleAdapter, weight: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what `adapter` adds to a weight of shape `weight`, without computing it."""
    if adapter.kind == "oft":
        if "rotation" in adapter.tensors:
            blocks, size = adapter.tensors["rotation"].shape[:2]
            fits = weight[1] % size == 0 if blocks == 1 else blocks * size == weight[1]
            return weight if fits else (weight[0], blocks * size)
        blocks, size = adapter.tensors["oft_blocks"].shape[:2]
        return (blocks * size, *weight[1:])
    blank = {name: torch.empty_like(t, device="meta") for name, t in adapter.tensors.items()}
    kept = {name: tensor for name, tensor in blank.items() if name != "magnitude"}
    difference = replace(adapter, tensors=kept).difference()
    return weight if difference is None else tuple(difference.shape)


def _add_adapters(
    component: ComponentWeights, added: dict[str, list[_WeightedAdapter]]
) -> ComponentWeights:
    weights = dict(component.weights)
    for module, all_added in added.items():
        name = f"{module}.weight"
        weights[name] = _sum_adapters(weights[name], all_added)
        if any(item.adapter.bias_difference() is not None for item in all_added):
            bias = f"{module}.bias"
            weights[bias] = _sum_adapters(weights[bias], all_added, bias=True)
    return replace(component, weights=weights)


def _sum_adapters(
    base: SourceWeight, added: Sequence[_WeightedAdapter], *, bias: bool = False
) -> SourceWeight:
    """`base` with everything that is `added`, made when it is read: float32."""

    def read() -> Tensor:
        weight = base.read().float()
        total = torch.zeros(())
        for item in added:
            adapter = item.adapter
            difference = adapter.bias_difference() if bias else adapter.difference(weight)
            if difference is not None:
                total = torch.add(total, difference, alpha=item.weight)
        return weight + total

    return replace(base, read=read, fp8=None)


def _arrangement(model: ModelWeights) -> tuple[dict[ComponentName, ModelFormat], ModelFormat]:
    """The layout of each component of the result, and of the whole."""
    arrangement = dict(model.arrangement)
    if not model.whole:
        return arrangement, next(iter(arrangement.values()))
    transformer = next((arrangement[p] for p in arrangement if p.startswith("transformer")), None)
    if transformer in ("diffusers", "official"):
        return dict.fromkeys(arrangement, transformer), transformer
    singles: dict[ComponentName, ModelFormat] = {
        placed: "fp8_scaled" if form == "fp8_scaled" else "single"
        for placed, form in arrangement.items()
    }
    return singles, "single"
