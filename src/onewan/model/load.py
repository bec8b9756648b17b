"""`WanModelLoader`: loads model files in any layout as a `WanModel`.

All layouts are loaded alike: `locate` finds the path of each component, `open_component` maps its
keys, `module_on_meta` builds the module without memory, and each tensor is loaded into its
parameter. On the CPU, weights that need no conversion stay mapped from the file (copy on write, so
that training may write to them), and loading never holds a model twice.

Scales of fp8 weights are applied; the float32 islands stay float32; a missing or unexpected key is
an error and never a random initialization; the components must fit each other and the requested
variant. No code from a checkpoint runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor, nn

from onewan.dtypes import dtype_name, from_safetensors_name
from onewan.errors import CheckpointError
from onewan.formats.configs import ComponentKind
from onewan.formats.finite import all_finite
from onewan.formats.model_folder import (
    ComponentDescription,
    ComponentName,
    describe_components,
    infer_variant,
    model_problems,
    raise_problems,
)
from onewan.formats.untrusted import named, read_json
from onewan.formats.weights import ComponentFile
from onewan.model.meta_init import module_on_meta
from onewan.model.precision import keep_float32_islands
from onewan.model.quantized_linear import QuantizedLinear, can_stay_quantized
from onewan.model.sources import ENCODERS, ModelSource, PipelineComponent, Sources, locate
from onewan.model.tokenizer import load_tokenizer
from onewan.model.wan import WanModel
from onewan.variants import NUM_TRAIN_TIMESTEPS, VARIANTS, Variant, VariantName

QuantizedLayers = Literal["keep", "dequantize"]
"""Whether linear layers that a file stores quantized stay so in memory or are dequantized."""

_BLOCKS = ("blocks.", "encoder.block.")
"""Prefixes of linear layers that may stay quantized; those outside are few and mostly compute in
float32."""


class WanModelLoader:
    """Loads Wan 2.2 models; holds no state."""

    def load(
        self,
        source: ModelSource,
        variant: VariantName | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        components: Collection[PipelineComponent] | None = None,
        *,
        quantized: QuantizedLayers = "keep",
        check_file_names: bool = True,
        boundary: float | None = None,
    ) -> WanModel:
        """The model at `source`: a folder or hub repository in the diffusers or the official
        layout, the file of one component, or a mapping from components to any of these.

        `variant` is checked against the weights if given. `components` limits what is loaded (None:
        all of a whole model, or what was given). The transformers get `dtype` but for their float32
        islands, the text encoder gets `dtype`, and the VAE is always float32, as in the official
        code. All are moved to `device`. Linear layers that a file stores in fp8 or GGUF stay packed
        and are dequantized at each use (`quantized` "keep"), or once while loading ("dequantize").
        With `check_file_names` a file named low-noise is refused as the high-noise expert, and the
        reverse. `boundary` is the timestep between the experts, if not the variant's own.
        CheckpointError names each file and what is wrong with it.
        """
        sources = locate(source, components)
        found, described = describe_model(
            sources, variant, components, check_file_names=check_file_names, boundary=boundary
        )
        to_load = _components_to_load(sources, found, described, components)
        model = WanModel(
            variant=found, source=sources.name, dtype=dtype, notices=list(sources.notices)
        )
        if "tokenizer" in to_load:
            model.tokenizer = load_tokenizer(sources.paths["tokenizer"])
        for component in ("text_encoder", "vae", "transformer", "transformer_2"):
            weights = described[component].file if component in to_load else None
            if weights is None:
                continue
            module_dtype = torch.float32 if component == "vae" else dtype
            module, notices = _load_module(
                weights, module_dtype, torch.device(device), keep_quantized=quantized == "keep"
            )
            setattr(model, component, module)
            model.notices += notices
        if "scheduler" in to_load:
            model.noise_scheduler = official_scheduler(found)
        return model


def official_scheduler(variant: Variant, shift: float | None = None) -> UniPCMultistepScheduler:
    """UniPC as in the official code, with the variant's official shift unless `shift` is given.

    The scheduler files on the hub are not used: they have shift 3.0 for A14B, but the official code
    uses 12 and 5.
    """
    return UniPCMultistepScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=variant.flow_shift if shift is None else shift,
    )


# ------------------------------------------------------------------------------- describing


def describe_model(
    sources: Sources,
    requested: VariantName | None,
    components: Collection[PipelineComponent] | None,
    *,
    check_file_names: bool = True,
    boundary: float | None = None,
) -> tuple[Variant, Mapping[ComponentName, ComponentDescription]]:
    """The variant and the components, from headers alone; CheckpointError if they do not fit
    together. The arguments are those of `WanModelLoader.load`."""
    described = describe_components(sources.paths, components)
    variant = None if requested is None else VARIANTS[requested]
    raise_problems(
        model_problems(sources.name, described, variant, check_file_names=check_file_names)
    )
    variant = variant or infer_variant(described)
    assert variant is not None  # otherwise `model_problems` returned one
    variant = variant.with_boundary(boundary)
    raise_problems(_boundary_problems(sources, variant))
    return variant, described


def _boundary_problems(sources: Sources, variant: Variant) -> Iterable[str]:
    index = None if sources.whole is None else sources.whole / "model_index.json"
    if index is None or not index.is_file():
        return
    # A fine-tune may move the boundary. Each expert would then get timesteps that it was not
    # trained on, and nothing would show it.
    ratio = read_json(index).get("boundary_ratio")
    if ratio is not None and ratio != variant.boundary:
        yield (
            f"{index}: boundary_ratio is {ratio}, but {variant.name} has {variant.boundary}; if "
            f"the model was trained with that boundary, set model.boundary to {ratio}"
        )


def _components_to_load(
    sources: Sources,
    variant: Variant,
    described: Mapping[ComponentName, ComponentDescription],
    components: Collection[PipelineComponent] | None,
) -> Collection[PipelineComponent]:
    """The components to load; CheckpointError names those that are missing."""
    if components is not None:
        to_load: set[PipelineComponent] = set(components)
    elif sources.whole is not None:
        to_load = {*(e.component for e in variant.experts), *ENCODERS, "scheduler"}
    else:
        to_load = {*sources.paths, "scheduler"}
        text = described["text_encoder"].file if "text_encoder" in described else None
        # `locate` gives the tokenizer the path of the text encoder, whose file may contain one.
        separate = sources.paths.get("tokenizer") != sources.paths.get("text_encoder")
        if text is not None and text.tokenizer is None and not separate:
            to_load.discard("tokenizer")
    sources.require(to_load, variant)
    return to_load


# ------------------------------------------------------------------------------------------ loading


def _load_module(
    weights: ComponentFile, dtype: torch.dtype, device: torch.device, *, keep_quantized: bool
) -> tuple[nn.Module, list[str]]:
    """(the module of `weights`, loaded, frozen and in evaluation mode; notices for the user).

    With `keep_quantized` the quantized linear layers of its blocks become `QuantizedLinear`.
    """
    module = module_on_meta(weights)
    islands = _float32_islands(module, weights.kind, dtype)
    dequantized = Counter[str]()
    damaged: list[str] = []
    for name, entry in weights.entries.items():
        path, _, leaf = name.rpartition(".")
        owner: Any = module.get_submodule(path)
        target = torch.float32 if islands.intersection(name.split(".")) else dtype
        in_a_block = isinstance(owner, nn.Linear) and name.startswith(_BLOCKS)
        # A layer that computes in float32 is dequantized: packed, it would compute in `dtype`.
        if keep_quantized and in_a_block and entry.packing != "plain" and target == dtype:
            if can_stay_quantized(entry):
                parent, _, last = path.rpartition(".")
                layer = QuantizedLinear(weights, name, owner.bias, device)
                if not layer.is_finite():
                    damaged.append(name)
                setattr(module.get_submodule(parent), last, layer)
                continue
            dequantized[entry.info.dtype] += 1
        # A weight that is converted or moved is copied, so its mapping is released at once.
        keep_mapped = (
            device.type == "cpu"
            and entry.packing == "plain"
            and from_safetensors_name(entry.info.dtype) == target
        )
        tensor = weights.read(name, target, keep_mapped=keep_mapped).to(device)
        if not all_finite(tensor):
            damaged.append(name)
        _assign(owner, leaf, tensor)
    if damaged:
        raise CheckpointError(
            f"{weights.path}: {len(damaged)} of {len(weights.entries)} weights hold values that "
            f"are NaN or infinite in {dtype_name(dtype)}, such as {named(damaged)}; give another "
            "file, or bfloat16 if this is float16"
        )
    if weights.kind == "text_encoder":
        encoder: Any = module
        # `_assign` replaced the parameter, which breaks the tie.
        encoder.encoder.embed_tokens.weight = encoder.shared.weight
    if weights.kind == "transformer":
        transformer: Any = module
        keep_float32_islands(transformer)
    # The buffers. No dtype here, which would round the float32 islands.
    module.to(device)
    on_meta = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
    assert not on_meta, on_meta
    notices = [
        f"{weights.path}: {count} weights of type {gguf_type} were dequantized, since no decoder "
        "for this type runs on the device"
        for gguf_type, count in dequantized.items()
    ]
    return module.requires_grad_(False).eval(), notices


def _float32_islands(module: Any, kind: ComponentKind, dtype: torch.dtype) -> set[str]:
    """Parts of the names of weights that are loaded in float32 if the others are loaded in `dtype`.

    From the module's class, as its library applies it: diffusers keeps these weights in float32 for
    float16 and bfloat16, transformers for float16 only (UMT5's ``wo`` overflows there).
    """
    affected = {torch.float16} if kind == "text_encoder" else {torch.float16, torch.bfloat16}
    return set(module._keep_in_fp32_modules or ()) if dtype in affected else set()


def _assign(owner: nn.Module, leaf: str, tensor: Tensor) -> None:
    # `load_state_dict` would leave a meta parameter as it is, and `.data` refuses another device.
    owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
