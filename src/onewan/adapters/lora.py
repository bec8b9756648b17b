"""Adapters on a diffusers transformer, through PEFT: a new one to train, finished ones to apply.

Added to PEFT are float32 master weights for any precision of the base, at the activation memory of
a bfloat16 adapter, and correct results on quantized bases (`onewan.adapters.layers`); and initial
weights that depend only on the seed and the layer's name, not on the device, the order of layers or
earlier random draws.

The weights of a new adapter have PEFT's names without the adapter's own:

==========  ========================================================================================
kind        names and shapes
==========  ========================================================================================
lora, dora  ``blocks.0.attn1.to_q.lora_A.weight`` [rank, in], ``.lora_B.weight`` [out, rank]
dora        ``.lora_magnitude_vector.weight`` [out]
pissa       ``.pissa_A`` and ``.pissa_B``, frozen: the initial lora_A and lora_B
loha        ``.hada_w1_a`` [out, rank], ``.hada_w1_b`` [rank, in], and the same for w2
lokr        ``.lokr_w1`` and ``.lokr_w2``, or ``_a`` and ``_b`` for each
oft         ``.oft_R.weight`` [in / size, size (size - 1) / 2]
==========  ========================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import WanTransformer3DModel
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
    base_weight_float32,
    row_norms,
)
from onewan.adapters.merging import check_modules_exist, merge_adapters
from onewan.adapters.overlay import Overlay
from onewan.errors import CheckpointError
from onewan.formats.adapter import ModuleAdapter
from onewan.formats.peft import from_peft
from onewan.model.quantized_linear import QuantizedLinear
from onewan.seeds import derive_seed

_ADAPTER = "default"
_INITIALLY_ZERO = ("lora_B", "hada_w2_b", "lokr_w1", "lokr_w1_a", "oft_R")
"""Parts that PEFT initializes to zero, so that a new adapter does not change the model."""
_FROZEN = ("pissa_A", "pissa_B")
_PART_NAMES = {"lora_magnitude_vector": "magnitude"}
"""`ModuleAdapter`'s names of parts, where PEFT's are others."""


def attach_adapter(
    transformer: WanTransformer3DModel,
    config: AdapterConfig,
    seed: int,
    name: str,
    initial: Mapping[str, Tensor] | None = None,
) -> None:
    """Attach a new adapter to `transformer`, ready to train; all other parameters are frozen.

    The model's output does not change: parts are zero, or initialized as in PEFT (Kaiming uniform,
    a = sqrt 5) by generators seeded from `seed`, `name` (the expert's), the layer and the part. Or
    the adapter gets the weights `initial`, by PEFT's names, as `adapter_config_from_file` or
    `adapter_weights` returns; then `transformer` may be without weights, on the meta device.
    """
    transformer.add_adapter(config.peft_config(), adapter_name=_ADAPTER)
    layers = _adapted(transformer)
    # A layer that PEFT did not match would remain untrained without any message.
    assert layers.keys() == set(config.modules), layers.keys() ^ set(config.modules)
    for module, layer in layers.items():
        _patch_peft_layer(layer, config, module, initial)
    for full, parameter in adapter_parameters(transformer).items():
        module, part = _module_and_part(full)
        if initial is not None:
            tensor = initial[_without_adapter_name(full)]
        elif part == "lora_magnitude_vector":
            continue  # the norms of the base weight, below
        else:
            part_seed = derive_seed(seed, "adapter", name, module, part)
            tensor = _initial_values(part, parameter.shape, part_seed)
        device = "cpu" if parameter.is_meta else parameter.device
        _set_value(transformer, full, tensor.to(device, torch.float32, copy=True))
    for module, layer in layers.items():
        if config.pissa and initial is not None and f"{module}.pissa_A" in initial:
            for part in _FROZEN:
                layer.register_buffer(part, initial[f"{module}.{part}"].clone(), persistent=False)
        elif config.pissa:
            pissa_seed = derive_seed(seed, "pissa", name, module)
            _initialize_pissa(layer, config, module, pissa_seed)
        if config.kind == "dora" and initial is None:
            layer.lora_magnitude_vector[_ADAPTER].weight.data = row_norms(layer, _ADAPTER)


def _set_value(transformer: WanTransformer3DModel, name: str, value: Tensor) -> None:
    """Give the parameter `name` a value; one without memory is replaced."""
    parameter = transformer.get_parameter(name)
    if parameter.is_meta:
        module, _, last = name.rpartition(".")
        owner = transformer.get_submodule(module)
        setattr(owner, last, nn.Parameter(value, requires_grad=parameter.requires_grad))
    else:
        parameter.data = value


def _adapted(transformer: WanTransformer3DModel) -> dict[str, Any]:
    """PEFT's layers by the names of the layers that they wrap."""
    return {n: m for n, m in transformer.named_modules() if isinstance(m, BaseTunerLayer)}


def _patch_peft_layer(
    layer: Any, config: AdapterConfig, module: str, initial: Mapping[str, Tensor] | None
) -> None:
    """Make `layer`, which PEFT has just attached, compute as in `onewan.adapters.layers`, with
    parameters of the right shapes on the base weight's device. The caller sets their values."""
    # Autocast does the casting; a float32 adapter must not make PEFT upcast activations.
    layer.cast_input_dtype_enabled = False
    if config.kind == "dora":
        magnitude = DoraLinearLayer(fan_in_fan_out=False)
        device = layer.lora_A[_ADAPTER].weight.device
        magnitude.weight = nn.Parameter(torch.empty(layer.out_features, device=device))
        layer.lora_magnitude_vector[_ADAPTER] = magnitude
        layer.lora_variant[_ADAPTER] = DoraVariant()
    elif config.kind == "lora" and config.pissa:
        layer.lora_variant[_ADAPTER] = PissaVariant()
    elif config.kind == "loha":
        layer.__class__ = LohaLinear
        # PEFT takes the shape from the weight, which for a quantized one is that of its bytes.
        shape = (layer.out_features, layer.in_features)
        layer.create_adapter_parameters(_ADAPTER, config.ranks[module], shape)
    elif config.kind == "lokr":
        layer.__class__ = LokrLinear
        if initial is not None:
            _reshape_lokr(layer, module, initial)
    elif config.kind == "oft":
        layer.__class__ = OftLinear
    # Parts that were created above, and not by PEFT, are on the CPU.
    device = layer.get_base_layer().weight.device
    for part in layer.adapter_layer_names:
        getattr(layer, part).to(device)


def _reshape_lokr(layer: Any, module: str, initial: Mapping[str, Tensor]) -> None:
    """Replace the factors by ones of the shapes in `initial`: other programs factorize the sides of
    a weight differently."""
    for part in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"):
        factors = getattr(layer, part)
        if _ADAPTER in factors:
            del factors[_ADAPTER]
        if (tensor := initial.get(f"{module}.{part}")) is not None:
            factors[_ADAPTER] = nn.Parameter(torch.empty_like(tensor, dtype=torch.float32))


def _initial_values(part: str, shape: torch.Size, seed: int) -> Tensor:
    """float32 on the CPU: drawn there, so that each device starts from the same values."""
    if part in _INITIALLY_ZERO:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(shape, dtype=torch.float32, device="cpu")
    return nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)


@torch.no_grad()
def _initialize_pissa(layer: Any, config: AdapterConfig, module: str, seed: int) -> None:
    """Set A and B of the layer so that s B A is the best approximation of the weight with their
    rank, sqrt(S) going to each side (PiSSA, arXiv 2404.02948, section 3); keep them as buffers."""
    rank, scale = config.ranks[module], config.scale(module)
    left, values, right = top_singular_vectors(base_weight_float32(layer), rank, seed)
    root = (values / scale).sqrt()
    for name, start in (("A", root[:, None] * right), ("B", left * root)):
        weight = getattr(layer, f"lora_{name}")[_ADAPTER].weight
        weight.data = start.to(weight.device).contiguous()
        # Not persistent: the state of a run stores them with the adapter's weights.
        layer.register_buffer(f"pissa_{name}", weight.data.clone(), persistent=False)


def top_singular_vectors(weight: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """float32 U [out, rank], S [rank], V^T [rank, in] of the `rank` largest singular values.

    Randomized subspace iteration (Halko et al., arXiv 0909.4061, algorithm 4.4): seconds for a
    layer of a 14B model, where a full SVD takes a minute. Exact where the weight is not much wider
    than the rank.
    """
    # 16 more columns than needed: Halko et al. advise 5 to 10 for fast decaying singular values
    # (section 4.2), and those of trained weights decay slowly. For the same reason 16 iterations
    # instead of the usual 2: each shrinks the error by the square of a ratio of singular values
    # that is close to 1. Together they are right to 2 % even on a matrix of noise (tested).
    columns = min(rank + 16, *weight.shape)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(weight.shape[1], columns, generator=generator).to(weight.device)
    for _ in range(16):
        # Orthonormalized on both sides: powers of the matrix alone would lose the small directions
        # to rounding.
        basis = torch.linalg.qr(weight.T @ torch.linalg.qr(weight @ basis).Q).Q
    left, values, right = torch.linalg.svd(weight @ basis, full_matrices=False)
    return left[:, :rank], values[:rank], (right @ basis.T)[:rank]


def adapter_parameters(transformer: WanTransformer3DModel) -> dict[str, nn.Parameter]:
    """The trainable parameters of the adapter, by their names in the transformer, in the model's
    order."""
    layers = _adapted(transformer)
    return {
        f"{module}.{name}": parameter
        for module, layer in layers.items()
        for name, parameter in layer.named_parameters()
        if _ADAPTER in name.split(".")
    }


def is_lora_b(name: str) -> bool:
    """Whether a parameter of `adapter_parameters` is B of a LoRA, which has its own learning rate
    in LoRA+ (arXiv 2402.12354)."""
    return ".lora_B." in name


def adapter_weights(transformer: WanTransformer3DModel) -> dict[str, Tensor]:
    """The adapter's weights, float32, copied to the CPU, by PEFT's names (see above). They include
    PiSSA's frozen initial values, which the forward pass subtracts."""
    tensors = _adapter_tensors(transformer)
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


@torch.no_grad()
def load_adapter_weights(
    transformer: WanTransformer3DModel, weights: Mapping[str, Tensor], source: str
) -> None:
    """Overwrite the attached adapter's weights. `source` names the file for the CheckpointError
    that missing, unexpected or misshapen weights raise."""
    present = _adapter_tensors(transformer)
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
    """The trained adapter of `transformer`, by module, as copies on the CPU: the form that
    `apply_lora` and the writers of files take.

    PiSSA becomes a plain LoRA of twice the rank: s (B A - B0 A0) is s [B, -B0] [A; A0].
    """
    weights = adapter_weights(transformer)
    if config.pissa:
        return {module: _as_plain_lora(weights, config, module) for module in config.modules}
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        module, part = _module_and_part(name)
        tensors.setdefault(module, {})[_PART_NAMES.get(part, part)] = tensor
    return {m: from_peft(parts, config.peft_settings(m)) for m, parts in tensors.items()}


def _as_plain_lora(
    weights: Mapping[str, Tensor], config: AdapterConfig, module: str
) -> ModuleAdapter:
    """The product of a PiSSA minus its initial product, as a plain LoRA of twice the rank."""
    a, b = (weights[f"{module}.lora_{which}.weight"] for which in "AB")
    a0, b0 = (weights[f"{module}.pissa_{which}"] for which in "AB")
    return ModuleAdapter(
        kind="lora",
        tensors={"lora_A": torch.cat([a, a0]), "lora_B": torch.cat([b, -b0], dim=1)},
        alpha=config.scale(module) * 2 * config.ranks[module],
    )


def base_weight(transformer: WanTransformer3DModel, layer: str, which: str) -> Tensor:
    """Weight or bias (`which`) of a layer without its adapters, on the CPU: float32 [out, in] for
    the weight of an adapted or quantized layer, otherwise in the stored precision."""
    found = transformer.get_submodule(layer)
    if isinstance(found, BaseTunerLayer):
        if which == "weight":
            return base_weight_float32(found).detach().cpu()
        found = found.get_base_layer()
    if isinstance(found, QuantizedLinear) and which == "weight":
        return found.dequantized_weight().detach().cpu()
    return found.get_parameter(which).detach().cpu()


@contextmanager
def adapters_disabled(transformer: WanTransformer3DModel) -> Iterator[None]:
    """A context in which the model computes without its adapters. Trainable parameters and their
    accumulated gradients are not touched."""
    layers = list(_adapted(transformer).values())
    before = [layer._disable_adapters for layer in layers]
    # PEFT's own switch, `enable_adapters`, also changes `requires_grad` of the parameters.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was_disabled in zip(layers, before, strict=True):
            layer._disable_adapters = was_disabled


def _adapter_tensors(transformer: WanTransformer3DModel) -> dict[str, Tensor]:
    """All tensors of the adapter, trained and frozen, by PEFT's names."""
    parameters = adapter_parameters(transformer)
    found: dict[str, Tensor] = {_without_adapter_name(n): p for n, p in parameters.items()}
    for module, layer in _adapted(transformer).items():
        found |= {f"{module}.{n}": t for n, t in layer.named_buffers() if n in _FROZEN}
    return found


def _without_adapter_name(name: str) -> str:
    """A parameter's name, without PEFT's name of the adapter in it."""
    return name.replace(f".{_ADAPTER}", "")


def _module_and_part(name: str) -> tuple[str, str]:
    """(module, part) of a parameter's name, such as (``blocks.0.attn1.to_q``, ``lora_A``)."""
    module, _, part = _without_adapter_name(name).removesuffix(".weight").rpartition(".")
    return module, part


# ------------------------------------------------------------------------------- finished adapters


def apply_lora(
    transformer: WanTransformer3DModel,
    modules: Mapping[str, ModuleAdapter],
    name: str,
    strength: float = 1.0,
) -> None:
    """Apply a finished adapter of any kind to `transformer`, on top of those applied before.

    LoRAs of linear layers are laid over the weights, in float32, so that the weights may be
    quantized; ranks and alphas may differ from module to module. All other differences are merged
    into the weights and biases.
    `strength` multiplies what the adapter adds to weights and biases, whatever its kind, as in
    `onewan merge`. For DoRA and OFT that is a weighted mean of the base model's weight and the
    adapted one, as ComfyUI computes DoRA; a rotation by a part of the angle would be another.
    `name` stands in the CheckpointError for an adapter that does not fit the model.
    """
    linears = {n for n, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    check_modules_exist(transformer, modules, name)
    plain = {m: a for m, a in modules.items() if a.kind == "lora" and m in linears}
    merge_adapters(transformer, modules, name, strength=strength, only_biases=plain)
    low_rank = {
        module: replace(adapter, tensors={n: adapter.tensors[n] for n in ("lora_A", "lora_B")})
        for module, adapter in plain.items()
    }
    Overlay(transformer, low_rank, name, strength=strength).attach()
