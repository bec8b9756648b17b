"""The weights of one component as lazy tensors, each read or computed when it is written.

The weights come from files (`from_file`) or from a module in memory (`from_module`). Nothing is
read or computed before a writer asks for it, so that a conversion takes the memory of one weight.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from onewan.dtypes import dtype_name, from_safetensors_name
from onewan.errors import CheckpointError
from onewan.formats.configs import ComponentKind
from onewan.formats.finite import all_finite
from onewan.formats.model_folder import ComponentDescription
from onewan.formats.weights import ComponentFile
from onewan.formats.write import LazyTensor
from onewan.model.meta_init import is_tied, module_on_meta
from onewan.model.quantized_linear import QuantizedLinear
from onewan.variants import ExpertName, Variant, variant_of


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceWeight:
    """One weight, read or computed on demand."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """None if the source has it quantized."""
    read: Callable[[], Tensor]
    """Returns the values on the CPU, in `dtype`, or dequantized to float32 if that is None."""
    fp8: Callable[[], tuple[Tensor, Tensor]] | None = None
    """Returns the weight as float8_e4m3fn [out, in] and its scale, float32 [], without
    requantizing; None if the source does not store it so."""

    def as_stored(self, name: str, dtype: torch.dtype | None) -> LazyTensor:
        """The weight in `dtype`; for None in its own type, or in bfloat16 if it is quantized."""
        target = dtype or self.dtype or torch.bfloat16
        return LazyTensor(self.shape, target, lambda: cast_checked(self.read(), target, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentWeights:
    """All weights of a transformer, VAE or text encoder."""

    kind: ComponentKind
    source: str
    """The name for messages."""
    weights: Mapping[str, SourceWeight]
    """By diffusers' (text encoder: transformers') names."""
    config: Mapping[str, Any]
    """The content of config.json of diffusers or transformers, without paths."""
    variant: Variant | None
    expert: ExpertName | None = None
    """None if it is not an expert, or if it is unknown which."""
    tokenizer: Callable[[], Tensor] | None = None
    """SentencePiece's model as bytes, uint8, for ComfyUI's file of the text encoder."""
    facts: Mapping[str, str | int | float] = field(default_factory=dict)
    """Further entries of the header, written as ``onewan.<name>``."""

    @property
    def is_quantized(self) -> bool:
        return any(weight.dtype is None for weight in self.weights.values())

    @property
    def dtype(self) -> torch.dtype:
        """The type in which most parameters are stored if no other is requested."""
        counts: dict[torch.dtype, int] = {}
        for weight in self.weights.values():
            dtype = weight.dtype or torch.bfloat16
            counts[dtype] = counts.get(dtype, 0) + prod(weight.shape)
        return max(counts, key=lambda dtype: counts[dtype])


class NotFiniteError(CheckpointError):
    """A weight holds values that are NaN or infinite."""


def cast_checked(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`tensor` in `dtype`. CheckpointError if a finite value becomes infinite, NotFiniteError if
    there is one that is not finite."""
    if not all_finite(tensor):
        raise NotFiniteError(f"{name}: holds values that are NaN or infinite")
    result = tensor.to(dtype)
    narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    if narrower and not all_finite(result):
        largest = tensor.abs().max().item()
        raise CheckpointError(
            f"{name}: holds {largest:.3g}, too large for {dtype_name(dtype)}; "
            "choose --dtype bfloat16"
        )
    return result


# -------------------------------------------------------------------------------------- from files


def from_file(described: ComponentDescription) -> ComponentWeights:
    """The weights of a component on disk, checked against its class. CheckpointError lists missing
    and unexpected keys and wrong shapes."""
    file = described.file
    assert file is not None
    module = module_on_meta(file)
    key = file.tokenizer
    return ComponentWeights(
        kind=file.kind,
        source=str(file.path),
        weights={name: _weight_in_file(file, name) for name in file.entries},
        config=config_of(module),
        variant=file.variant,
        expert=described.expert,
        tokenizer=None if key is None else lambda: file.file.read(key),
    )


def _weight_in_file(weights: ComponentFile, name: str) -> SourceWeight:
    entry = weights.entries[name]
    if entry.packing == "plain":
        return SourceWeight(
            shape=entry.info.shape,
            dtype=from_safetensors_name(entry.info.dtype),
            read=lambda: weights.read(name),
        )
    scale = entry.scale
    one_scale = scale is None or weights.file.tensors[scale].elements == 1
    packed = entry.info.dtype == "F8_E4M3" and one_scale

    def fp8() -> tuple[Tensor, Tensor]:
        factor = torch.ones(()) if scale is None else weights.file.read(scale)
        return weights.file.read(entry.key), factor.float().reshape(())

    return SourceWeight(
        shape=entry.info.shape,
        dtype=None,
        read=lambda: weights.read(name),
        fp8=fp8 if packed else None,
    )


def config_of(module: nn.Module) -> dict[str, Any]:
    """The content of config.json of `module`, except paths and types."""
    if isinstance(module, UMT5EncoderModel):
        config = {**module.config.to_diff_dict(), "architectures": ["UMT5EncoderModel"]}
    else:
        config = json.loads(module.to_json_string())  # pyright: ignore[reportCallIssue]
    # `_name_or_path` is a folder of the user's machine. The types are those of the source, and the
    # new file may have another.
    hidden = ("_name_or_path", "dtype", "torch_dtype")
    return {name: value for name, value in config.items() if name not in hidden}


# ------------------------------------------------------------------------------- from modules


def from_module(
    module: nn.Module, kind: ComponentKind, source: str, expert: ExpertName | None = None
) -> ComponentWeights:
    """The weights of a module in memory, with active adapters merged in. The module itself is not
    changed."""
    config = config_of(module)
    return ComponentWeights(
        kind=kind,
        source=source,
        weights=dict(_weights_of(module)),
        config=config,
        variant=variant_of(config, source) if kind == "transformer" else None,
        expert=expert,
    )


def _weights_of(module: nn.Module) -> Iterator[tuple[str, SourceWeight]]:
    modules = dict(module.named_modules())
    adapted = [name for name, m in modules.items() if isinstance(m, BaseTunerLayer)]
    for name, parameter in module.named_parameters():
        # The embedding has two names in the module, but files store it under one.
        if is_tied(name):
            continue
        owner = next((n for n in adapted if name.startswith(f"{n}.")), None)
        holder, _, which = name.rpartition(".")
        weight = _weight_in_memory(modules[holder], which, parameter)
        if owner is None:
            yield name, weight
        # All other parameters in an adapted layer are the adapter's own.
        elif holder == f"{owner}.base_layer":
            layer: Any = modules[owner]
            yield f"{owner}.{which}", replace(weight, read=_read_merged(layer, which), fp8=None)


def _weight_in_memory(holder: nn.Module, which: str, parameter: Tensor) -> SourceWeight:
    """`parameter`, the weight or bias (`which`) of layer `holder`."""
    if not isinstance(holder, QuantizedLinear) or which != "weight":
        return SourceWeight(
            shape=tuple(parameter.shape),
            dtype=parameter.dtype,
            read=lambda: parameter.detach().cpu(),
        )
    scale = holder.scale

    def fp8() -> tuple[Tensor, Tensor]:
        factor = torch.ones(()) if scale is None else scale.detach().cpu().float().reshape(())
        return parameter.detach().cpu().view(torch.float8_e4m3fn), factor

    one_scale = scale is None or scale.numel() == 1
    return SourceWeight(
        shape=(holder.out_features, holder.in_features),
        dtype=None,
        read=lambda: holder.dequantized_weight().detach().cpu(),
        fp8=fp8 if holder.form == "F8_E4M3" and one_scale else None,
    )


def _read_merged(layer: Any, which: str) -> Callable[[], Tensor]:
    """Returns a function that computes the weight or bias of `layer` with its active adapters
    merged in, float32 on the CPU. PEFT merges, so that every kind of adapter is supported."""

    def merged() -> Tensor:
        base = layer.get_base_layer()
        assert isinstance(base, nn.Linear)
        packed = isinstance(base, QuantizedLinear)
        weight = base.dequantized_weight() if packed else base.weight
        linear = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
        linear.weight.data = weight.detach().cpu().float().clone()
        if base.bias is not None:
            linear.bias.data = base.bias.detach().cpu().float().clone()
        # `merge` changes the base layer in place, and in its own precision. The memo makes the copy
        # wrap the float32 `linear`, and saves copying the base layer.
        copy = deepcopy(layer, {id(layer.base_layer): linear}).to("cpu", torch.float32)
        if not copy.disable_adapters and not copy.merged:
            copy.merge()
        return getattr(linear, which).detach()

    return merged


def source_name(source: str | Path) -> str:
    """The name of the source for a header, without the user's folders."""
    return Path(source).name
