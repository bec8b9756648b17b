"""Adapters on a diffusers transformer, through PEFT: new ones to train, finished ones to use.

What is added to PEFT: float32 master weights whatever the base is stored in, at the activation
memory of a bfloat16 adapter, and the right numbers on quantised bases (`onewan.adapters.layers`);
and initial weights that depend on the seed and the layer's name alone, not on the device, the order
of layers or what was drawn before.

Weights of a new adapter go by PEFT's names without the adapter's own:

==========  ========================================================================================
kind        names and shapes
==========  ========================================================================================
lora, dora  ``blocks.0.attn1.to_q.lora_A.weight`` [rank, in], ``.lora_B.weight`` [out, rank]
dora        ``.lora_magnitude_vector.weight`` [out]
pissa       ``.pissa_A`` and ``.pissa_B``, frozen: what lora_A and lora_B were at first
loha        ``.hada_w1_a`` [out, rank], ``.hada_w1_b`` [rank, in], and the same for w2
lokr        ``.lokr_w1`` and ``.lokr_w2``, or ``_a`` and ``_b`` for each
oft         ``.oft_R.weight`` [in / size, size (size - 1) / 2]
==========  ========================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from onewan.adapters.adapter_config import AdapterConfig
from onewan.adapters.layers import (
    DoraVariant,
    LohaLinear,
    LokrLinear,
    OftLinear,
    PissaVariant,
    base_numbers,
    row_lengths,
)
from onewan.errors import CheckpointError
from onewan.formats.adapter import ModuleAdapter
from onewan.formats.peft import from_peft
from onewan.model.quantized_linear import QuantizedLinear
from onewan.seeds import derive_seed

_ADAPTER = "default"
_ZERO_AT_FIRST = ("lora_B", "hada_w2_b", "lokr_w1", "lokr_w1_a", "oft_R")
"""Parts that PEFT sets to zero, so that a new adapter changes nothing."""
_FROZEN = ("pissa_A", "pissa_B")
_PART_NAMES = {"lora_magnitude_vector": "magnitude"}
"""`ModuleAdapter`'s names of parts, where PEFT's are others."""


def attach_adapter(
    transformer: WanTransformer3DModel,
    spec: AdapterConfig,
    seed: int,
    name: str,
    initial: Mapping[str, Tensor] | None = None,
) -> None:
    """Give `transformer` a new adapter, ready to train; all else of it is frozen.

    It changes nothing yet: parts are zero, or drawn as PEFT draws them (Kaiming uniform, a =
    sqrt 5) from counted randomness keyed by `seed`, `name` (the expert's), the layer and the part.
    Or it has the weights `initial`, by PEFT's names, as `adapter_config_from_file` gives them.
    """
    transformer.add_adapter(spec.peft_config(), adapter_name=_ADAPTER)
    layers = _adapted(transformer)
    assert layers.keys() == set(spec.modules), layers.keys() ^ set(spec.modules)
    for module, layer in layers.items():
        _make_right(layer, spec, module, initial)
    for full, parameter in adapter_parameters(transformer).items():
        module, part = _place(full)
        if initial is not None:
            tensor = initial[_plain(full)]
        elif part == "lora_magnitude_vector":
            continue  # a length of the base weight, below
        else:
            tensor = _drawn(part, parameter.shape, derive_seed(seed, "adapter", name, module, part))
        parameter.data = tensor.to(parameter.device, torch.float32, copy=True)
    for module, layer in layers.items():
        if spec.pissa:
            _start_from_principal_part(
                layer, spec, module, derive_seed(seed, "pissa", name, module)
            )
        if spec.kind == "dora" and initial is None:
            layer.lora_magnitude_vector[_ADAPTER].weight.data = row_lengths(layer, _ADAPTER)


def _adapted(transformer: WanTransformer3DModel) -> dict[str, Any]:
    """PEFT's layers by the names of those that they stand in for."""
    return {n: m for n, m in transformer.named_modules() if isinstance(m, BaseTunerLayer)}


def _make_right(
    layer: Any, spec: AdapterConfig, module: str, initial: Mapping[str, Tensor] | None
) -> None:
    """Let `layer`, fresh from PEFT, compute as `onewan.adapters.layers` says, with parameters of
    the right shapes. Their values are still to come."""
    # Autocast does the casting; a float32 adapter must not make PEFT upcast activations.
    layer.cast_input_dtype_enabled = False
    if spec.kind == "dora":
        magnitude = DoraLinearLayer(fan_in_fan_out=False)
        device = layer.lora_A[_ADAPTER].weight.device
        magnitude.weight = nn.Parameter(torch.empty(layer.out_features, device=device))
        layer.lora_magnitude_vector[_ADAPTER] = magnitude
        layer.lora_variant[_ADAPTER] = DoraVariant()
    elif spec.kind == "lora" and spec.pissa:
        layer.lora_variant[_ADAPTER] = PissaVariant()
    elif spec.kind == "loha":
        layer.__class__ = LohaLinear
        # PEFT takes the shape from the weight, which is one of bytes if it is quantised.
        shape = (layer.out_features, layer.in_features)
        layer.create_adapter_parameters(_ADAPTER, spec.ranks[module], shape)
    elif spec.kind == "lokr":
        layer.__class__ = LokrLinear
        if initial is not None:
            _reshape_lokr(layer, module, initial)
    elif spec.kind == "oft":
        layer.__class__ = OftLinear
    device = layer.get_base_layer().weight.device
    for part in layer.adapter_layer_names:
        getattr(layer, part).to(device)


def _reshape_lokr(layer: Any, module: str, initial: Mapping[str, Tensor]) -> None:
    """Factors as `initial` has them: other programs divide sides in other ways."""
    for part in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"):
        factors = getattr(layer, part)
        if _ADAPTER in factors:
            del factors[_ADAPTER]
        if (tensor := initial.get(f"{module}.{part}")) is not None:
            factors[_ADAPTER] = nn.Parameter(torch.empty_like(tensor, dtype=torch.float32))


def _drawn(part: str, shape: torch.Size, seed: int) -> Tensor:
    if part in _ZERO_AT_FIRST:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(shape, dtype=torch.float32, device="cpu")
    return nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)


@torch.no_grad()
def _start_from_principal_part(layer: Any, spec: AdapterConfig, module: str, seed: int) -> None:
    """A and B of the layer, and what they started as: s B A is the part of the weight with the
    largest singular values (PiSSA, arXiv 2404.02948)."""
    rank, scale = spec.ranks[module], spec.scale(module)
    left, values, right = _principal_part(base_numbers(layer), rank, seed)
    root = (values / scale).sqrt()
    for name, start in (("A", root[:, None] * right), ("B", left * root)):
        weight = getattr(layer, f"lora_{name}")[_ADAPTER].weight
        weight.data = start.to(weight.device).contiguous()
        layer.register_buffer(f"pissa_{name}", weight.data.clone(), persistent=False)


def _principal_part(weight: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """float32 U [out, rank], S [rank], V^T [rank, in] of the largest singular values.

    Subspace iteration from a random start (Halko et al., arXiv 0909.4061): seconds for a layer of
    14B, where all singular values take a minute. Exact where the layer is not much wider than
    the rank.
    """
    columns = min(rank + 16, *weight.shape)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(weight.shape[1], columns, generator=generator).to(weight.device)
    for _ in range(16):
        basis = torch.linalg.qr(weight.T @ torch.linalg.qr(weight @ basis).Q).Q
    left, values, right = torch.linalg.svd(weight @ basis, full_matrices=False)
    return left[:, :rank], values[:rank], (right @ basis.T)[:rank]


def adapter_parameters(transformer: WanTransformer3DModel) -> dict[str, nn.Parameter]:
    """The parameters of the adapter that trains, by their names in the transformer, in a fixed
    order."""
    layers = _adapted(transformer)
    return {
        f"{module}.{name}": parameter
        for module, layer in layers.items()
        for name, parameter in layer.named_parameters()
        if _ADAPTER in name.split(".")
    }


def is_lora_b(name: str) -> bool:
    """Whether a parameter of `adapter_parameters` is a LoRA's B, for which LoRA+ has a rate."""
    return ".lora_B." in name


def adapter_weights(transformer: WanTransformer3DModel) -> dict[str, Tensor]:
    """The adapter's weights, float32, copied to the CPU, by PEFT's names (see above). PiSSA's
    frozen ones are among them, as an adapter without them is another."""
    return {name: t.detach().to("cpu", copy=True) for name, t in _tensors(transformer).items()}


@torch.no_grad()
def load_adapter_weights(
    transformer: WanTransformer3DModel, weights: Mapping[str, Tensor], source: str
) -> None:
    """Overwrite the attached adapter's weights. `source` names the file for the CheckpointError
    that missing, surplus or misshapen weights raise."""
    present = _tensors(transformer)
    wrong = sorted(set(present) ^ set(weights))
    wrong += [n for n in present if n in weights and present[n].shape != weights[n].shape]
    if wrong:
        raise CheckpointError(
            f"{source}: does not fit the adapter of this run ({len(wrong)} weights differ, "
            f"such as {', '.join(wrong[:3])}); were kind, rank, modules or layers changed?"
        )
    for name, tensor in present.items():
        tensor.copy_(weights[name])


def adapter_of(
    transformer: WanTransformer3DModel, config: AdapterConfig
) -> dict[str, ModuleAdapter]:
    """The adapter that trains on `transformer`, by module, as copies on the CPU: the form that
    `apply_lora` and the writers of files take.

    PiSSA becomes a plain LoRA of twice the rank: s (B A - B0 A0) is s [B, -B0] [A; A0].
    """
    weights = adapter_weights(transformer)
    if config.pissa:
        return {module: _as_plain_lora(weights, config, module) for module in config.modules}
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        module, part = _place(name)
        tensors.setdefault(module, {})[_PART_NAMES.get(part, part)] = tensor
    return {m: from_peft(parts, config.peft_settings(m)) for m, parts in tensors.items()}


def _as_plain_lora(
    weights: Mapping[str, Tensor], config: AdapterConfig, module: str
) -> ModuleAdapter:
    """A PiSSA's product less what it started as, as a LoRA of twice the rank."""
    a, b = (weights[f"{module}.lora_{which}.weight"] for which in "AB")
    a0, b0 = (weights[f"{module}.pissa_{which}"] for which in "AB")
    return ModuleAdapter(
        kind="lora",
        tensors={"lora_A": torch.cat([a, a0]), "lora_B": torch.cat([b, -b0], dim=1)},
        alpha=config.scale(module) * 2 * config.ranks[module],
    )


def base_weight(transformer: WanTransformer3DModel, layer: str, which: str) -> Tensor:
    """Weight or bias (`which`) of a layer without what adapters add, on the CPU: float32 [out, in]
    for the weight of an adapted or quantised layer, else as it is stored."""
    found = transformer.get_submodule(layer)
    if isinstance(found, BaseTunerLayer):
        if which == "weight":
            return base_numbers(found).detach().cpu()
        found = found.get_base_layer()
    if isinstance(found, QuantizedLinear) and which == "weight":
        return found.expanded_weight().detach().cpu()
    return found.get_parameter(which).detach().cpu()


@contextmanager
def adapters_disabled(transformer: WanTransformer3DModel) -> Iterator[None]:
    """The model without its adapters, for as long as the block lasts. What trains, and gradients
    that have been gathered, stay as they are."""
    layers = list(_adapted(transformer).values())
    before = [layer._disable_adapters for layer in layers]
    # PEFT's own switch would freeze the parameters, and thaw all of them afterwards.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


def _tensors(transformer: WanTransformer3DModel) -> dict[str, Tensor]:
    """What makes up the adapter, trained and frozen, by PEFT's names."""
    found: dict[str, Tensor] = {_plain(n): p for n, p in adapter_parameters(transformer).items()}
    for module, layer in _adapted(transformer).items():
        found |= {f"{module}.{n}": t for n, t in layer.named_buffers() if n in _FROZEN}
    return found


def _plain(name: str) -> str:
    """A parameter's name without the adapter's."""
    return name.replace(f".{_ADAPTER}", "")


def _place(name: str) -> tuple[str, str]:
    """(module, part) of a parameter's name."""
    module, _, part = _plain(name).removesuffix(".weight").rpartition(".")
    return module, part


# ------------------------------------------------------------------------------- finished adapters


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
        if isinstance(owner, QuantizedLinear):
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
