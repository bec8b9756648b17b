"""Merges differences into the weights and biases of a transformer: those of a finished adapter, and
the parts of an adapter file that stay fixed while the rest of it is trained.

Published adapters have more than low-rank pairs: differences of biases (``diff_b``), of the weights
of norms (``diff``), pairs on the patch embedding, which is no linear layer. Training can start from
such a file: `split_adapter` divides it, `FixedParts` applies what is not trained, and the exported
adapter has it again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from onewan.errors import CheckpointError
from onewan.formats.adapter import BIASES, ModuleAdapter
from onewan.formats.untrusted import first_line, named
from onewan.model.quantized_linear import QuantizedLinear


def split_adapter(
    modules: Mapping[str, ModuleAdapter],
) -> tuple[dict[str, ModuleAdapter], dict[str, ModuleAdapter]]:
    """(the adapters to train, the parts to leave as they are) of an adapter file."""
    trained: dict[str, ModuleAdapter] = {}
    fixed: dict[str, ModuleAdapter] = {}
    for module, adapter in modules.items():
        is_convolution = module == "patch_embedding" and not adapter.needs_weight
        if adapter.kind == "difference" or is_convolution:
            fixed[module] = adapter
            continue
        bias = adapter.bias_difference()
        if bias is not None:
            fixed[module] = ModuleAdapter(kind="difference", tensors={"diff_b": bias})
        parts = {part: t for part, t in adapter.tensors.items() if part not in BIASES}
        trained[module] = replace(adapter, tensors=parts)
    return trained, fixed


class FixedParts:
    """Parts of an adapter that are merged into the weights of a transformer and not trained."""

    def __init__(
        self, transformer: WanTransformer3DModel, modules: Mapping[str, ModuleAdapter], name: str
    ) -> None:
        """Merge `modules`. `name` stands in the CheckpointError for parts that do not fit. The
        transformer has no adapter yet; it may be on the meta device, to check names and shapes."""
        # Copies: the tensors may be mapped from a file that is overwritten during the run.
        self.modules = {
            module: replace(adapter, tensors={n: t.clone() for n, t in adapter.tensors.items()})
            for module, adapter in modules.items()
        }
        self._changed: list[tuple[nn.Module, str]] = []
        check_modules_exist(transformer, modules, name)
        for module, adapter in modules.items():
            for owner, parameter, added in _changes(transformer, module, adapter, name):
                # As a buffer, the base model's tensor moves with the module. Not persistent, since
                # it is no part of the adapter.
                before = owner.get_parameter(parameter).data
                owner.register_buffer(f"base_{parameter}", before, persistent=False)
                _add(owner, parameter, added)
                self._changed.append((owner, parameter))

    @contextmanager
    def removed(self) -> Iterator[None]:
        """A context in which the transformer has the base model's weights, bit for bit. It must not
        be moved to another device meanwhile."""
        for owner, parameter in self._changed:
            _exchange(owner, parameter)
        try:
            yield
        finally:
            for owner, parameter in self._changed:
                _exchange(owner, parameter)

    def added_to(self, trained: Mapping[str, ModuleAdapter]) -> dict[str, ModuleAdapter]:
        """The adapter of both: `trained` and these parts."""
        result = dict(trained)
        for module, part in self.modules.items():
            own = trained.get(module)
            result[module] = (
                part if own is None else replace(own, tensors={**own.tensors, **part.tensors})
            )
        return result


def _exchange(owner: nn.Module, parameter: str) -> None:
    """Exchange a weight with the base model's beside it.

    The objects and not their data: while blocks are streamed, each object is bound to its own data
    again at every use.
    """
    base = f"base_{parameter}"
    weight = owner._parameters[parameter]
    owner._parameters[parameter] = owner._buffers[base]  # pyright: ignore[reportArgumentType]
    owner._buffers[base] = weight


def check_modules_exist(
    transformer: WanTransformer3DModel, modules: Mapping[str, ModuleAdapter], name: str
) -> None:
    """CheckpointError, which names the adapter as `name`, if the transformer lacks a module."""
    present = {n for n, _ in (*transformer.named_modules(), *transformer.named_parameters())}
    if absent := [module for module in modules if module not in present]:
        raise CheckpointError(
            f"{name}: the model has no layer {named(sorted(absent))} ({len(absent)} of "
            f"{len(modules)} layers); the LoRA is for another model"
        )


def merge_adapters(
    transformer: WanTransformer3DModel,
    modules: Mapping[str, ModuleAdapter],
    name: str,
    *,
    strength: float = 1.0,
    only_biases: Collection[str] = (),
) -> None:
    """Add the differences of `modules`, times `strength`, to their weights and biases, computed in
    float32; of the modules `only_biases`, only to the bias. CheckpointError, naming `name`, if they
    do not fit."""
    for module, adapter in modules.items():
        weight_too = module not in only_biases
        changes = _changes(transformer, module, adapter, name, weight_too=weight_too)
        for owner, parameter, added in changes:
            _add(owner, parameter, strength * added)


def _changes(
    transformer: WanTransformer3DModel,
    module: str,
    adapter: ModuleAdapter,
    name: str,
    *,
    weight_too: bool = True,
) -> list[tuple[nn.Module, str, Tensor]]:
    """What `adapter` changes: (module, its parameter, the difference, float32 on the CPU)."""
    parent, _, last = module.rpartition(".")
    owner: Any = transformer.get_submodule(parent)
    weight = last  # a scale_shift_table is a parameter itself
    if not isinstance(getattr(owner, last), nn.Parameter):
        owner, weight = getattr(owner, last), "weight"
    if isinstance(owner, BaseTunerLayer):
        owner = owner.get_base_layer()
    weight_too = weight_too and adapter.changes_weight
    if weight_too and isinstance(owner, QuantizedLinear):
        raise CheckpointError(
            f"{name}: changes the weights of {module} themselves, which are packed in "
            "memory here; load the model with memory.weights: bf16 (onewan sample: --storage bf16)"
        )
    changes: list[tuple[nn.Module, str, Tensor]] = []
    try:
        if weight_too:
            present = _parameter(owner, weight)
            # On the CPU, where the tensors of the adapter file are. Only some kinds need values.
            added = adapter.difference(present.cpu() if adapter.needs_weight else present)
            assert added is not None
            changes.append((owner, weight, _of_shape(present, added)))
        bias = adapter.bias_difference()
        if bias is not None:
            changes.append((owner, "bias", _of_shape(_parameter(owner, "bias"), bias)))
    except (RuntimeError, ValueError, IndexError) as error:  # for a wrong shape
        raise CheckpointError(
            f"{name}: does not fit the model at {module} ({first_line(error)}); give the model "
            "that it was trained on"
        ) from error
    return changes


def _parameter(owner: nn.Module, name: str) -> nn.Parameter:
    found = getattr(owner, name, None)
    if not isinstance(found, nn.Parameter):
        raise ValueError(f"it has no {name}")
    return found


def _of_shape(weight: Tensor, added: Tensor) -> Tensor:
    if added.shape != weight.shape:  # which torch would broadcast
        raise ValueError(f"{list(added.shape)} in the file, {list(weight.shape)} in the model")
    return added


@torch.no_grad()
def _add(owner: nn.Module, parameter: str, added: Tensor) -> None:
    weight = owner.get_parameter(parameter)
    # A new tensor: the present one may be kept, or mapped from the model's file.
    weight.data = (weight + added.to(weight.device)).to(weight.dtype)
