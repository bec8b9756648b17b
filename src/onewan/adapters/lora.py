"""LoRA on a diffusers transformer, through PEFT.

What is added to PEFT: float32 master weights whatever the base is stored in, at the activation
memory of a bfloat16 adapter (PEFT would upcast each layer's input and autograd would keep the copy:
412 instead of 271 kB per token and block at 14B); and initial weights that depend on the seed and
the layer's name alone, not on the device, the order of layers or what was drawn before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from onewan.errors import CheckpointError
from onewan.formats.adapter import ModuleAdapter
from onewan.model.packed import PackedLinear
from onewan.seeds import derive_seed

_ADAPTER = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """The shape of an adapter: everything but its weights."""

    rank: int
    alpha: float
    dropout: float
    modules: tuple[str, ...]
    """Linear layers within a block, by diffusers' names (``attn1.to_q``)."""
    layers: tuple[int, ...]
    """Numbers of the blocks."""

    def peft_config(self) -> LoraConfig:
        layers = "|".join(map(str, self.layers))
        modules = "|".join(name.replace(".", r"\.") for name in self.modules)
        return LoraConfig(
            r=self.rank,
            # PEFT declares an int and only divides by the rank; a whole number stays one in files.
            lora_alpha=int(self.alpha) if float(self.alpha).is_integer() else self.alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=self.dropout,
            target_modules=rf"blocks\.({layers})\.({modules})",
            bias="none",
        )


def attach_lora(transformer: WanTransformer3DModel, spec: LoraSpec, seed: int, name: str) -> None:
    """Give `transformer` a new adapter that changes nothing yet (B is zero), ready to train.

    A is drawn as PEFT draws it (Kaiming uniform, a = sqrt 5), from counted randomness keyed by
    `seed`, `name` (the expert's) and the layer.
    """
    transformer.add_adapter(spec.peft_config(), adapter_name=_ADAPTER)
    for layer_name, layer in transformer.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        # Autocast does the casting; the float32 adapter must not make PEFT upcast activations.
        layer.cast_input_dtype_enabled = False
        a, b = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]
        assert isinstance(a, nn.Linear) and isinstance(b, nn.Linear)
        generator = torch.Generator().manual_seed(derive_seed(seed, "lora", name, layer_name))
        initial = torch.empty(a.weight.shape, dtype=torch.float32, device="cpu")
        nn.init.kaiming_uniform_(initial, a=math.sqrt(5), generator=generator)
        a.weight = nn.Parameter(initial.to(a.weight.device))
        b.weight = nn.Parameter(torch.zeros_like(b.weight, dtype=torch.float32))


def apply_lora(
    transformer: WanTransformer3DModel, modules: Mapping[str, ModuleAdapter], name: str
) -> None:
    """Add a finished adapter, of any kind, to `transformer`, beside those it may have already.

    Plain LoRAs stay beside the weights, in float32; ranks and alphas may differ from module to
    module. What other kinds and differences add goes into the weights and biases themselves.
    `name` tells the adapters of one transformer apart.
    """
    linears = {n for n, m in transformer.named_modules() if isinstance(m, nn.Linear | LoraLayer)}
    plain = {
        module: adapter
        for module, adapter in modules.items()
        if adapter.kind == "lora" and adapter.bias_difference() is None
    }
    if absent := sorted(plain.keys() - linears):
        raise CheckpointError(
            f"{name}: the model has no layer {', '.join(absent[:3])}; the LoRA is of another model"
        )
    for module in modules.keys() - plain.keys():
        _merge(transformer, module, modules[module], name)
    if plain:
        _attach(transformer, plain, name)


def _attach(
    transformer: WanTransformer3DModel, modules: Mapping[str, ModuleAdapter], name: str
) -> None:
    """Add plain LoRAs on linear layers through PEFT."""
    ranks = {module: int(adapter.rank or 0) for module, adapter in modules.items()}
    alphas = {module: adapter.scale * ranks[module] for module, adapter in modules.items()}
    weights = {
        f"{module}.{part}.weight": tensor
        for module, adapter in modules.items()
        for part, tensor in adapter.tensors.items()
    }
    config = LoraConfig(
        r=next(iter(ranks.values())),
        target_modules=sorted(ranks),
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )
    try:
        transformer.add_adapter(config, adapter_name=name)
        result = set_peft_model_state_dict(transformer, weights, adapter_name=name)
    except RuntimeError as error:  # torch's word for a wrong shape
        raise CheckpointError(f"{name}: does not fit the model ({error})") from error
    assert not result.unexpected_keys, result.unexpected_keys
    transformer.set_adapter(list(transformer.peft_config))
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False


@torch.no_grad()
def _merge(
    transformer: WanTransformer3DModel, module: str, adapter: ModuleAdapter, name: str
) -> None:
    """Add what `adapter` adds to the weight and bias of a layer, computed in float32."""
    parent, _, last = module.rpartition(".")
    try:
        owner: Any = getattr(transformer.get_submodule(parent), last)
        if isinstance(owner, LoraLayer):
            owner = owner.get_base_layer()
        if isinstance(owner, PackedLinear):
            raise CheckpointError(
                f"{name}: changes the weights of {module} themselves, which this model keeps "
                "quantised; load it with its weights expanded (model.quantised: expand)"
            )
        weight: Tensor = getattr(owner, "weight", owner)  # a table is a parameter itself
        added = adapter.difference(weight.cpu())
        if added is not None:
            weight += added.to(weight.device)
        if (bias := adapter.bias_difference()) is not None:
            owner.bias += bias.to(owner.bias.device)
    except AttributeError:
        raise CheckpointError(
            f"{name}: the model has no layer {module}; the LoRA is of another model"
        ) from None
    except (RuntimeError, TypeError) as error:  # torch's word for a wrong shape, None for a bias
        raise CheckpointError(f"{name}: does not fit the model at {module} ({error})") from error


def adapter_parameters(transformer: WanTransformer3DModel) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their names in the transformer, in a fixed order."""
    return {n: p for n, p in transformer.named_parameters() if ".lora_" in n}


def adapter_weights(transformer: WanTransformer3DModel) -> dict[str, Tensor]:
    """The adapter's weights, float32, on the CPU: ``blocks.0.attn1.to_q.lora_A.weight`` [rank, in]
    and ``....lora_B.weight`` [out, rank]."""
    state = get_peft_model_state_dict(transformer, adapter_name=_ADAPTER)
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def load_adapter_weights(
    transformer: WanTransformer3DModel, weights: Mapping[str, Tensor], source: str
) -> None:
    """Overwrite the attached adapter's weights. `source` names the file for the CheckpointError
    that missing, surplus or misshapen weights raise."""
    present = get_peft_model_state_dict(transformer, adapter_name=_ADAPTER)
    wrong = sorted(set(present) ^ set(weights))
    wrong += [n for n in present if n in weights and present[n].shape != weights[n].shape]
    if wrong:
        raise CheckpointError(
            f"{source}: does not fit the adapter of this run ({len(wrong)} weights differ, "
            f"such as {', '.join(wrong[:3])}); were rank, modules or layers changed?"
        )
    set_peft_model_state_dict(transformer, dict(weights), adapter_name=_ADAPTER)
