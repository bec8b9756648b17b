"""Reads the weights of one component into its module, each in the type or form that is asked for.

Beside the module, memory holds a part of one weight (all of it, in float32, for GGUF types that
only the `gguf` package decodes). On the CPU a weight that needs no conversion is not copied at all:
it stays mapped from the file. Every weight is checked for NaN and infinite values. Where it is
packed, the check is of the scales that were computed anyway; otherwise it is a pass over the
weight, which brings a mapped one into the page cache.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from onewan.devices import is_host
from onewan.dtypes import WeightStorage, dtype_name, from_safetensors_name
from onewan.errors import CheckpointError
from onewan.formats.configs import ComponentKind
from onewan.formats.finite import all_finite
from onewan.formats.untrusted import named
from onewan.formats.weights import ComponentFile, check_fp8_scale
from onewan.model.quantized_linear import QuantizedLinear
from onewan.model.weight_storage import (
    NF4_BLOCK,
    Stored,
    can_be_packed,
    expanded,
    gguf_form_exists,
    levels_of,
    packed,
    repacked,
)

_PACKED = {"fp8": "F8_E4M3", "int8": "int8", "nf4": "nf4"}
"""Forms that weights are packed into, by the value of memory.weights."""

_BLOCKS = ("blocks.", "encoder.block.")
"""Prefixes of linear layers that may be packed; those outside are few and mostly compute in
float32."""


class WeightLoader:
    """Loads the weights of one component."""

    def __init__(
        self,
        weights: ComponentFile,
        dtype: torch.dtype,
        device: torch.device,
        storage: WeightStorage,
    ) -> None:
        """`dtype` is that of weights that are not packed. The text encoder is never packed anew:
        its embeddings are cached, and a cache is valid for every `storage`."""
        packs = storage in _PACKED and weights.kind != "transformer"
        self._weights = weights
        self._dtype = dtype
        self._device = device
        self._storage: WeightStorage = "as_stored" if packs else storage
        self._damaged: list[str] = []
        self._not_kept = Counter[str]()
        self._rounded_twice = Counter[str]()

    def load(self, module: nn.Module) -> list[str]:
        """Replace the parameters of `module`, which are on the meta device; returns notices for
        the user. CheckpointError for weights that are not finite or that can't be packed."""
        islands = _float32_islands(module, self._weights.kind, self._dtype)
        for name in self._weights.entries:
            path, _, leaf = name.rpartition(".")
            owner: Any = module.get_submodule(path)
            target = torch.float32 if islands.intersection(name.split(".")) else self._dtype
            in_a_block = isinstance(owner, nn.Linear) and name.startswith(_BLOCKS)
            # A layer that computes in float32 is expanded: packed, it would compute in `dtype`.
            may_be_packed = in_a_block and leaf == "weight" and target == self._dtype
            stored = self._packed(name) if may_be_packed else None
            if stored is not None:
                layer = QuantizedLinear(*stored, owner.bias)
                if not layer.is_finite():
                    self._damaged.append(name)
                module.set_submodule(path, layer)
                continue
            tensor = self._values(name, target)
            if not all_finite(tensor):
                self._damaged.append(name)
            # `load_state_dict` would leave a meta parameter as it is, and `.data` refuses another
            # device.
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        self._raise_if_damaged()
        return self._notices()

    def _packed(self, name: str) -> tuple[str, Stored] | None:
        """(form, matrix) of a weight that is packed in memory; None for one that is expanded."""
        entry = self._weights.entries[name]
        form = _PACKED.get(self._storage)
        keeps = self._storage == "as_stored" or (form == "F8_E4M3" and entry.packing == "fp8")
        if keeps:
            if entry.packing == "plain":
                return None
            if self._form_in_file(name) is None:
                self._not_kept[entry.info.dtype] += 1
                return None
            in_file = self._in_file(name, keep_mapped=is_host(self._device))
            return entry.info.dtype, _moved(in_file, self._device)
        if form is None:
            return None
        if not can_be_packed(form, entry.info.shape):
            raise CheckpointError(
                f"{self._weights.path}: {name} is {list(entry.info.shape)}, but {form} stores "
                f"blocks of {NF4_BLOCK} values; set memory.weights to fp8 or int8"
            )
        if entry.packing != "plain":
            self._rounded_twice[entry.info.dtype] += 1
        in_file = self._form_in_file(name)
        if in_file is None:
            stored = packed(form, self._weights.read(name))
        else:
            stored = repacked(in_file, self._in_file(name, keep_mapped=False), form)
        return form, _moved(stored, self._device)

    def _values(self, name: str, dtype: torch.dtype) -> Tensor:
        """The values of a weight in `dtype`, on the device."""
        entry = self._weights.entries[name]
        if entry.packing != "plain":
            return self._expanded(name, dtype).to(self._device)
        # A weight that is converted or moved is copied, so its mapping is released at once.
        is_final = from_safetensors_name(entry.info.dtype) == dtype
        keep_mapped = is_final and is_host(self._device)
        return self._weights.read(name, dtype, keep_mapped=keep_mapped).to(self._device)

    def _expanded(self, name: str, dtype: torch.dtype) -> Tensor:
        """The values, in `dtype` on the CPU, of a weight that the file stores quantized."""
        form = self._form_in_file(name)
        if form is None:
            return self._weights.read(name, dtype)
        return expanded(form, self._in_file(name, keep_mapped=False), dtype)

    def _form_in_file(self, name: str) -> str | None:
        """The form of a matrix that the file stores quantized; None if it is not, or if only the
        `gguf` package decodes it."""
        entry = self._weights.entries[name]
        dtype, shape = entry.info.dtype, entry.info.shape
        if entry.packing == "plain" or len(shape) != 2:
            return None
        return dtype if entry.packing == "fp8" or gguf_form_exists(dtype, shape[1]) else None

    def _in_file(self, name: str, *, keep_mapped: bool) -> Stored:
        """A matrix that the file stores quantized, on the CPU."""
        entry, file = self._weights.entries[name], self._weights.file
        data = file.read(entry.key, keep_mapped=keep_mapped).view(torch.int8)
        scale = None
        if entry.scale is not None:
            # A copy, which does not keep a mapping of the whole file for a few bytes.
            scale = file.read(entry.scale).to(torch.float32, copy=True)
            check_fp8_scale(entry.info.shape, scale, f"{self._weights.path}: {entry.scale}")
        return data.reshape(entry.info.shape[0], -1), scale, levels_of(entry.info.dtype)

    def _raise_if_damaged(self) -> None:
        if self._damaged:
            raise CheckpointError(
                f"{self._weights.path}: {len(self._damaged)} of {len(self._weights.entries)} "
                "weights hold values that are NaN or infinite in "
                f"{dtype_name(self._dtype)}, such as {named(self._damaged)}; give another file, or "
                "bfloat16 if this is float16"
            )

    def _notices(self) -> list[str]:
        path = self._weights.path
        return [
            *(
                f"{path}: {count} weights of type {gguf_type} were expanded, since no decoder for "
                "this type runs on the device"
                for gguf_type, count in self._not_kept.items()
            ),
            *(
                f"{path}: {count} weights were rounded twice, to {dtype} in the file and to "
                f"{self._storage} by memory.weights; a file in bfloat16 would be rounded once"
                for dtype, count in self._rounded_twice.items()
            ),
        ]


def _moved(stored: Stored, device: torch.device) -> Stored:
    weight, scale, levels = stored
    return (
        weight.to(device),
        None if scale is None else scale.to(device),
        None if levels is None else levels.to(device),
    )


def _float32_islands(module: Any, kind: ComponentKind, dtype: torch.dtype) -> set[str]:
    """Parts of the names of weights that are loaded in float32 if the others are loaded in `dtype`.

    From the module's class, as its library applies it: diffusers keeps these weights in float32 for
    float16 and bfloat16, transformers for float16 only (UMT5's ``wo`` overflows there).
    """
    affected = {torch.float16} if kind == "text_encoder" else {torch.float16, torch.bfloat16}
    return set(module._keep_in_fp32_modules or ()) if dtype in affected else set()
