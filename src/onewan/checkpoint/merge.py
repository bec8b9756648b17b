"""Merges adapters into a model: W plus the weighted sum of the adapters' differences.

Computed in float32 from the base model's values and rounded once, to the type of the output. Layers
without an adapter are copied bit-exact, quantized weights included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
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
from onewan.formats.lora_files import AdapterFile, read_adapter, read_adapters
from onewan.formats.lora_writing import BaseWeights
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
    on_progress: ProgressCallback = lambda _done, _total: None,
) -> WriteResult:
    """Write `base`, a model's folder or one transformer, with `loras` (path, weight) merged in.

    Each LoRA is merged into its expert, which is inferred from its keys, header or name. The output
    has the layout of `base`; single files get official keys without a prefix. `dtype` is as in
    `convert_model`. CheckpointError as there, if a LoRA has a layer that the base does not have,
    and with `check_file_names` if headers or names say that a LoRA and a single base are of
    different experts.
    """
    # Layers and shapes are checked now; weights are read only while the result is written.
    model = read_model(Path(base))
    added: dict[ComponentName, dict[str, list[_WeightedAdapter]]] = {}
    notices: list[str] = []
    for path, weight in loras:
        for name, file in _adapters(Path(path), model, check_file_names).items():
            _check_layers_fit(file, model.components[name])
            notices += file.notices
            for module, adapter in file.modules.items():
                added.setdefault(name, {}).setdefault(module, []).append(
                    _WeightedAdapter(adapter, weight)
                )
    components = {
        name: _add_adapters(component, added[name]) if name in added else component
        for name, component in model.components.items()
    }
    formats, to = _formats_of_result(model)
    written = write_model(
        replace(model, components=components),
        Path(destination),
        formats,
        to,
        sources=[Path(base), *(Path(path) for path, _ in loras)],
        dtype=dtype,
        force=force,
        on_progress=on_progress,
    )
    notices += [
        f"{components[name].source}: the merged weights were quantized to fp8 again"
        for name in added
        if formats[name] == "fp8_scaled"
    ]
    untouched = [p for p in components if p.startswith("transformer") and p not in added]
    if untouched:
        notices.append(
            f"{base}: no LoRA was given for {' and '.join(untouched)}, which is copied unchanged"
        )
    return WriteResult(
        files=written.files, notices=tuple(dict.fromkeys([*written.notices, *notices]))
    )


def base_weights(base: Path, lora: Path, expert: ExpertName | None) -> BaseWeights:
    """The weights of the model at `base` that the adapter `lora` was trained on. `expert` selects
    one of two if `base` has both and `lora` does not say which it is for."""
    model = read_model(base)
    component = model.components[_component_for(model, lora, expert or _expert_in_keys(lora))]
    weights, source = component.weights, component.source

    def read(name: str) -> Tensor:
        if name not in weights:
            raise CheckpointError(
                f"{source}: has no {name}; {lora.name} was trained on another model, give that one"
            )
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
    """The adapters in the file `path`, by the component of `model` that each is for."""
    file = open_tensors(path)
    layout = layout_of(file.tensors, file.metadata)
    experts = () if layout is None else layout.experts
    if len(experts) > 1 and model.whole:
        return {_component_for(model, path, a.expert): a for a in read_adapters(path)}
    of_base = None if model.whole else next(iter(model.components.values())).expert
    if len(experts) > 1 and of_base is None:
        raise CheckpointError(
            f"{path}: contains the LoRAs of both experts, and neither header nor name of "
            f"{model.name} says which one it is; name it ..._high_noise or ..._low_noise"
        )
    adapter = read_adapter(path, of_base if len(experts) > 1 else None)
    return {_component_for(model, path, adapter.expert, check_file_names): adapter}


def _component_for(
    model: ModelWeights, lora: Path, named: ExpertName | None, check_file_names: bool = True
) -> ComponentName:
    """The component of `model` that `lora` is for."""
    transformers: list[ComponentName] = [p for p in model.components if p.startswith("transformer")]
    if not transformers:
        raise CheckpointError(
            f"{model.name}: contains no transformer, which LoRAs are merged into; give a base "
            "model with one"
        )
    metadata = open_tensors(lora).metadata
    if not model.whole:
        detected = detect_expert(lora, metadata)
        of_lora = named or (detected and detected[0])
        of_base = model.components[transformers[0]].expert
        if check_file_names and {of_lora, of_base} == {"high", "low"}:
            raise CheckpointError(
                f"{lora}: is for the {of_lora}-noise expert, but {model.name} is the "
                f"{of_base}-noise one, by header or name; give the other one, or add --any-expert"
            )
        return transformers[0]
    assert model.variant is not None
    # Not by keys alone: in files for diffusers they begin with "transformer." for either expert.
    expert = expert_of(lora, metadata, model.variant, named)
    if expert.component not in transformers:
        raise CheckpointError(
            f"{model.name}: has no {expert.component}, but {lora} is for the {expert.name} expert; "
            "give a base model with it"
        )
    return expert.component


# ------------------------------------------------------------------------------------------ weights


def _check_layers_fit(file: AdapterFile, base: ComponentWeights) -> None:
    """CheckpointError if `base` does not have a layer of `file`, or in another shape."""
    problems: list[str] = []
    for module, adapter in file.modules.items():
        weight = base.weights.get(_weight_name(module))
        if weight is None:
            problems.append(f"no layer {module}")
            continue
        shape = _shape_after_merge(adapter, weight.shape)
        bias = adapter.bias_difference()
        if shape != weight.shape:
            problems.append(f"{module} is {list(weight.shape)}, but {list(shape)} in the LoRA")
        elif bias is not None and f"{module}.bias" not in base.weights:
            problems.append(f"{module} has no bias")
        elif bias is not None and tuple(bias.shape) != base.weights[f"{module}.bias"].shape:
            problems.append(f"the bias of {module} is not {list(bias.shape)}")
    if problems:
        more = ", ..." if len(problems) > 3 else ""
        raise CheckpointError(
            f"{file.path}: does not fit {base.source} in {len(problems)} of {len(file.modules)} "
            f"layers ({'; '.join(problems[:3])}{more}); give the model that it was trained on"
        )


def _weight_name(module: str) -> str:
    """The name of the weight of `module`; the tables of modulation are weights themselves."""
    return module if module.endswith("scale_shift_table") else f"{module}.weight"


def _shape_after_merge(adapter: ModuleAdapter, weight: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the weight that `adapter` can be merged into, without computing the difference:
    `weight`, that of the base's, if it fits."""
    if adapter.kind == "oft":
        inputs = prod(weight[1:]) if weight[1:] else 0
        if "rotation" in adapter.tensors:
            blocks, size = adapter.tensors["rotation"].shape[:2]
            fits = inputs % size == 0 if blocks == 1 else blocks * size == inputs
            return weight if fits and inputs else (*weight[:1], blocks * size)
        blocks, size = adapter.tensors["oft_blocks"].shape[:2]
        return (blocks * size, *weight[1:]) if inputs else (blocks * size, size)
    # The product on the meta device has the shape but takes no memory. A magnitude needs the weight
    # and does not change the shape.
    factors = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in adapter.tensors.items()
        if name != "magnitude"
    }
    difference = replace(adapter, tensors=factors).difference()
    if difference is None:
        return weight
    # The factors of a convolution may be matrices (see `ModuleAdapter.difference`).
    is_matrix = difference.ndim == 2 and len(weight) > 2
    same = is_matrix and tuple(difference.shape) == (*weight[:1], prod(weight[1:]))
    return weight if same else tuple(difference.shape)


def _add_adapters(
    component: ComponentWeights, added: dict[str, list[_WeightedAdapter]]
) -> ComponentWeights:
    weights = dict(component.weights)
    for module, all_added in added.items():
        name = _weight_name(module)
        weights[name] = _sum_adapters(weights[name], all_added)
        if any(item.adapter.bias_difference() is not None for item in all_added):
            bias = f"{module}.bias"
            weights[bias] = _sum_adapters(weights[bias], all_added, bias=True)
    return replace(component, weights=weights)


def _sum_adapters(
    base: SourceWeight, added: Sequence[_WeightedAdapter], *, bias: bool = False
) -> SourceWeight:
    """`base` plus the weighted differences of `added`, float32, computed when it is read."""

    def read() -> Tensor:
        weight = base.read().float()
        # The differences are summed first: added to the weight one by one they would be rounded at
        # its magnitude each time.
        total = torch.zeros(())
        for item in added:
            adapter = item.adapter
            difference = adapter.bias_difference() if bias else adapter.difference(weight)
            if difference is not None:
                total = torch.add(total, difference, alpha=item.weight)
        return weight + total

    # The fp8 bits of the source are not those of the sum.
    return replace(base, read=read, fp8=None)


def _formats_of_result(model: ModelWeights) -> tuple[dict[ComponentName, ModelFormat], ModelFormat]:
    """The layout of each component of the result, and that of the whole model."""
    formats = dict(model.formats)
    if not model.whole:
        return formats, next(iter(formats.values()))
    transformer = next((formats[p] for p in formats if p.startswith("transformer")), None)
    # One layout for all components, as far as it can store them: a model's folder that mixes them
    # is read by no other program.
    if transformer in ("diffusers", "official"):
        return dict.fromkeys(formats, transformer), transformer
    singles: dict[ComponentName, ModelFormat] = {
        name: "fp8_scaled" if format == "fp8_scaled" else "single"
        for name, format in formats.items()
    }
    return singles, "single"
