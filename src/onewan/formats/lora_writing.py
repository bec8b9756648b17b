"""Converts adapters to the key format of each program.

=========  ===========================================  ===========================================
format     keys of a LoRA                               other kinds
=========  ===========================================  ===========================================
comfyui    ``diffusion_model.<official>.lora_A.weight``  LoHa, LoKr, OFT by outputs, differences
no_alpha   the same, alpha / rank in ``lora_B``          none
kohya      ``lora_unet_<official_>.lora_down.weight``    as comfyui
diffusers  ``transformer.<diffusers>.lora_A.weight``     DoRA
=========  ===========================================  ===========================================

comfyui and kohya store alpha as a tensor, diffusers in the header, as PEFT's settings. ai-toolkit
ignores alphas and diffusion-pipe refuses them; no_alpha is for these two. A kohya file is complete,
since diffusers accepts no other: layers without an adapter get zeros of rank 1, which
`read_adapter` drops. So a LoRA can be converted through comfyui, kohya and diffusers without
changing a bit.

ComfyUI has no keys for PEFT's DoRA, which scales outputs, and PEFT's OFT, which rotates inputs:
they are written as plain differences, which needs the base model's weights. ``official`` is comfyui
without the prefix.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from onewan.errors import CheckpointError
from onewan.formats.adapter import BIASES, ModuleAdapter
from onewan.formats.adapter_parts import AdapterKind
from onewan.formats.lora import KeyFormat, WanShape, module_key
from onewan.formats.lora_files import PEFT_SETTINGS
from onewan.formats.peft import as_peft_alpha, default_and_patterns
from onewan.formats.write import LazyTensor

KIND_TITLES: dict[AdapterKind, str] = {
    "lora": "LoRA",
    "dora": "DoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "oft": "OFT",
    "difference": "a plain difference",
}

_PATCH_SIZE = (1, 2, 2)
"""Frames, rows and columns of latents in a patch, in every Wan model."""

BaseWeights = Callable[[str], Tensor]
"""The base model's tensor by diffusers' name, such as ``blocks.0.attn1.to_q.weight``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FormattedAdapter:
    """An adapter in one key format, ready to be written."""

    tensors: dict[str, Tensor | LazyTensor]
    metadata: dict[str, str]
    """Required by the format: PEFT's settings for diffusers."""
    notices: list[str]
    """Notices for the user, one line each."""


def to_format(
    modules: Mapping[str, ModuleAdapter],
    format: KeyFormat,
    *,
    dtype: torch.dtype | None = None,
    base: BaseWeights | None = None,
    shape: WanShape | None = None,
) -> FormattedAdapter:
    """`modules` with the keys of `format`, each tensor as `dtype` or, for None, as it is.

    `base` gives the weights from which plain differences are computed. `shape` determines the
    layers of a complete kohya file; without it they are inferred from the variants and `base`.
    CheckpointError if the format can't hold an adapter, or a value does not fit `dtype`.
    """
    check_expressible(modules, format)
    if format == "no_alpha":
        modules = {m: _without_alpha(m, adapter, dtype) for m, adapter in modules.items()}
    # Modules that the format can hold only as a plain difference.
    as_difference = {
        m: a for m, a in modules.items() if format != "diffusers" and _is_not_expressible(a)
    }
    tensors: dict[str, Tensor | LazyTensor] = {}
    for module, adapter in modules.items():
        start = module_key(module, format)
        if module in as_difference:
            tensors[f"{start}.diff"] = _difference(module, adapter, dtype, base)
        else:
            for part, tensor in adapter.tensors.items():
                if part not in BIASES:
                    key = f"{start}.{_key(part, format)}"
                    if format == "diffusers" and module == "patch_embedding":
                        tensor = _as_convolution(part, tensor)
                    tensors[key] = stored(f"{module}.{part}", tensor, dtype)
            alpha = _written_alpha(adapter, format)
            if format != "diffusers" and alpha is not None:
                tensors[f"{start}.alpha"] = torch.tensor(alpha)
        # PEFT scales the bias of a LoRA; ``diff_b`` is added to the layer's bias without a scale.
        bias = adapter.bias_difference()
        if bias is not None:
            own = next(adapter.tensors[part] for part in BIASES if part in adapter.tensors)
            tensors[f"{start}.diff_b"] = stored(f"{module}.diff_b", bias, dtype or own.dtype)
    notices = _notices(modules, as_difference, tensors, format)
    # diffusers reads no other kind from a kohya file, so only a LoRA has to be complete.
    if format == "kohya" and all(a.kind == "lora" for a in modules.values()):
        tensors |= _zero_padding(modules, dtype, shape or _shape(modules, base))
    metadata = {PEFT_SETTINGS: _peft_settings(modules)} if format == "diffusers" else {}
    return FormattedAdapter(tensors=tensors, metadata=metadata, notices=notices)


def stored(name: str, weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A contiguous copy of `weight` on the CPU as `dtype`, for a file; CheckpointError if a value
    overflows `dtype`."""
    # A copy, since training goes on while the file is written; contiguous and without shared
    # storage, since safetensors stores each tensor by itself.
    copied = weight.detach().to("cpu", dtype or weight.dtype, copy=True).contiguous()
    if not torch.isfinite(copied.float()).all() and torch.isfinite(weight.float()).all():
        largest = weight.abs().max().item()
        raise CheckpointError(
            f"{name}: holds {largest:.3g}, too large for {copied.dtype}; write it as bfloat16"
        )
    return copied


# ---------------------------------------------------------------------------------------- in parts


def _has_magnitude_by_input(adapter: ModuleAdapter) -> bool:
    """Whether its magnitude has one value per input, [1, in]."""
    magnitude = adapter.tensors.get("magnitude")
    return magnitude is not None and magnitude.ndim == 2 and magnitude.shape[0] == 1


def _is_not_expressible(adapter: ModuleAdapter) -> bool:
    """Whether ComfyUI has no keys for it."""
    by_output = "magnitude" in adapter.tensors and not _has_magnitude_by_input(adapter)
    return by_output or "rotation" in adapter.tensors


def check_expressible(modules: Mapping[str, ModuleAdapter], format: KeyFormat) -> None:
    """CheckpointError if `format` can't hold one of `modules`: `to_format` would refuse them."""
    for module, adapter in modules.items():
        title = KIND_TITLES[adapter.kind]
        if format == "kohya" and module.rpartition(".")[2] == "scale_shift_table":
            raise CheckpointError(
                f"{module}: is a table, not a layer, and kohya's keys name layers only; write "
                "it as comfyui"
            )
        if format == "no_alpha" and (
            adapter.kind != "lora" or adapter.bias_difference() is not None
        ):
            part = title if adapter.kind != "lora" else "LoRA and changes a bias too"
            raise CheckpointError(
                f"{module}: is {part}, but the programs that no_alpha is for read only LoRA; write "
                "it as comfyui"
            )
        if format != "diffusers":
            continue
        if adapter.kind not in ("lora", "dora") or _has_magnitude_by_input(adapter):
            how = " by inputs" if adapter.kind == "dora" else ""
            raise CheckpointError(
                f"{module}: is {title}{how}, which diffusers reads in no key format; write it as "
                "comfyui or kohya, or merge it into the base model"
            )
        if adapter.bias_difference() is not None:
            raise CheckpointError(
                f"{module}: changes a bias too, which diffusers reads for all modules or none; "
                "write it as comfyui or kohya"
            )
    kinds = {adapter.kind for adapter in modules.values()}
    if format == "diffusers" and len(kinds) > 1:
        raise CheckpointError(
            "the adapter is LoRA in some modules and DoRA in others, and diffusers' settings have "
            "one kind for all; write it as comfyui"
        )


def _as_convolution(part: str, tensor: Tensor) -> Tensor:
    """A factor of a LoRA on the patch embedding with the axes of a convolution, as PEFT has it."""
    if part == "lora_A":
        return tensor.reshape(len(tensor), -1, *_PATCH_SIZE)
    return tensor.reshape(*tensor.shape[:2], 1, 1, 1) if part == "lora_B" else tensor


def _key(part: str, format: KeyFormat) -> str:
    """The ending of a tensor's key."""
    endings = {"magnitude": "lora_magnitude_vector" if format == "diffusers" else "dora_scale"}
    for name, kohya in (("lora_A", "lora_down"), ("lora_B", "lora_up")):
        endings[name] = f"{kohya if format == 'kohya' else name}.weight"
    return endings.get(part, part)


def _without_alpha(module: str, adapter: ModuleAdapter, dtype: torch.dtype | None) -> ModuleAdapter:
    """The LoRA with its scale alpha / rank multiplied into ``lora_B`` and without an alpha. The
    product is rounded once, to `dtype` or its own; a power of two changes no bit of the result."""
    up = adapter.tensors["lora_B"]
    if adapter.scale != 1:
        up = stored(f"{module}.lora_B", up.double() * adapter.scale, dtype or up.dtype)
    return replace(adapter, tensors={**adapter.tensors, "lora_B": up}, alpha=None)


def _written_alpha(adapter: ModuleAdapter, format: KeyFormat) -> float | None:
    """The alpha to write, None for none. kohya's readers require one where there is a rank."""
    if not adapter.tensors or adapter.kind == "difference":
        return None
    if adapter.alpha is None and format == "kohya" and adapter.rank is not None:
        return float(adapter.rank)
    return adapter.alpha


def _difference(
    module: str, adapter: ModuleAdapter, dtype: torch.dtype | None, base: BaseWeights | None
) -> LazyTensor:
    """The difference that the adapter makes to its weight, computed when it is written."""
    if base is None:
        raise CheckpointError(
            f"{module}: is {KIND_TITLES[adapter.kind]}, which ComfyUI reads only as a plain "
            "difference, and that depends on the base model's weights; give --base"
        )
    name = f"{module}.weight"
    stored_dtype = dtype or next(iter(adapter.tensors.values())).dtype

    # Lazy, since the differences of a whole model are as large as the model.
    def make() -> Tensor:
        added = adapter.difference(base(name))
        assert added is not None
        return stored(name, added, stored_dtype)

    return LazyTensor(tuple(base(name).shape), stored_dtype, make)


def _notices(
    modules: Mapping[str, ModuleAdapter],
    as_difference: Mapping[str, ModuleAdapter],
    tensors: Mapping[str, Tensor | LazyTensor],
    format: KeyFormat,
) -> list[str]:
    """Notices for the user about the file and the programs that read it."""
    if format == "diffusers":
        return []
    notices: list[str] = []
    if as_difference:
        size = sum(
            prod(tensor.shape) * tensor.dtype.itemsize
            for key, tensor in tensors.items()
            if key.endswith(".diff")
        )
        titles = " and ".join(sorted({KIND_TITLES[a.kind] for a in as_difference.values()}))
        notices.append(
            f"ComfyUI has no keys for PEFT's {titles} ({len(as_difference)} modules): written as "
            f"plain differences, {size / 1e9:.3g} GB, which are valid for this base model only"
        )
    others: set[AdapterKind] = {a.kind for a in modules.values() if a.kind != "lora"}
    if others:
        notices.append(
            f"ComfyUI reads this file; diffusers does not read "
            f"{', '.join(KIND_TITLES[kind] for kind in sorted(others))} in it"
        )
    if outside := [m for m in modules if not m.startswith("blocks.")]:
        notices.append(f"diffusers may refuse this file for {', '.join(sorted(outside)[:3])}")
    return notices


def _shape(modules: Mapping[str, ModuleAdapter], base: BaseWeights | None) -> WanShape | None:
    """The shape of the transformer that a LoRA of `modules` belongs to; None if none of them is in
    a block."""
    sizes = {m: _size(a) for m, a in modules.items() if m.startswith("blocks.")}
    if not sizes:
        return None
    # A lower bound, since the last blocks may have no adapter. For official widths the number of
    # blocks is known.
    blocks = 1 + max(int(module.split(".")[1]) for module in sizes)
    width, ffn = 0, 0
    for module, (out, into) in sizes.items():
        if module.endswith("ffn.net.0.proj"):
            ffn, width = out, into
        elif module.endswith("ffn.net.2"):
            width, ffn = out, into
        else:
            width = out
    known = WanShape.of_width(width)
    if known and ffn in (0, known.ffn_width):
        return replace(known, num_layers=max(known.num_layers, blocks))
    if not ffn and base is not None:
        ffn = base("blocks.0.ffn.net.0.proj.weight").shape[0]
    if not ffn:
        raise CheckpointError(
            f"the adapter was trained on a transformer of width {width}, which no Wan 2.2 model "
            "has, and kohya's complete files need the width of its FFN, on which it has no layer; "
            "give --base"
        )
    return WanShape(width=width, ffn_width=ffn, num_layers=blocks)


def _size(adapter: ModuleAdapter) -> tuple[int, int]:
    """(outputs, inputs) of a LoRA's layer."""
    return adapter.tensors["lora_B"].shape[0], adapter.tensors["lora_A"].shape[1]


def _zero_padding(
    modules: Mapping[str, ModuleAdapter], dtype: torch.dtype | None, shape: WanShape | None
) -> dict[str, Tensor]:
    """Zeros of rank 1 for the linear layers without an adapter: diffusers' converter for kohya
    files looks up every layer of every block."""
    if shape is None:
        return {}
    stored_dtype = dtype or next(iter(modules.values())).tensors["lora_A"].dtype
    tensors: dict[str, Tensor] = {}
    for module, (out, into) in shape.linears().items():
        if module not in modules:
            start = module_key(module, "kohya")
            tensors[f"{start}.lora_down.weight"] = torch.zeros(1, into, dtype=stored_dtype)
            tensors[f"{start}.lora_up.weight"] = torch.zeros(out, 1, dtype=stored_dtype)
            tensors[f"{start}.alpha"] = torch.tensor(1.0)
    return tensors


def _peft_settings(modules: Mapping[str, ModuleAdapter]) -> str:
    """PEFT's settings as diffusers' ``save_lora_weights`` writes them into the header.

    Only those that diffusers itself derives for a file without a header (``utils/peft_utils.py``).
    The others stay out: an older PEFT refuses keys it does not know (each release adds some), and
    ``lora_dropout`` would drop inputs at inference, since diffusers leaves the new layers in
    training mode.
    """
    ranks = {module: int(adapter.rank or 0) for module, adapter in modules.items()}
    alphas = {
        module: float(ranks[module] if adapter.alpha is None else adapter.alpha)
        for module, adapter in modules.items()
    }
    rank, rank_pattern = default_and_patterns(ranks)
    alpha, alpha_pattern = default_and_patterns(alphas)
    settings = {
        "r": rank,
        "lora_alpha": as_peft_alpha(alpha),
        "rank_pattern": rank_pattern,
        "alpha_pattern": {m: as_peft_alpha(a) for m, a in alpha_pattern.items()},
        "target_modules": sorted(modules),
        "use_dora": any(adapter.kind == "dora" for adapter in modules.values()),
        "lora_bias": False,
    }
    named = {f"transformer.{name}": value for name, value in settings.items()}
    return json.dumps(named, indent=2, sort_keys=True)
