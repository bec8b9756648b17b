"""`WanModelLoader`: model files in any form -> `WanModel`.

One way for all forms: `locate` says where each component lies, `open_component` what a file holds,
`module_on_meta` builds the module without memory, and each tensor is loaded into its parameter. On
the CPU, weights that need no conversion stay mapped from the file (copy on write, so that training
may write to them), and loading never holds a model twice.

Scales of fp8 weights are applied; the float32 islands stay float32; a missing or unexpected key is
an error and never a random initialization; the components must belong to one another and to the
requested variant. No code from a checkpoint runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor, nn

from onewan.dtypes import from_safetensors_name
from onewan.formats.configs import read_json
from onewan.formats.model_folder import (
    ComponentDescription,
    ComponentName,
    describe_components,
    infer_variant,
    model_problems,
    raise_problems,
)
from onewan.formats.weights import ComponentFile
from onewan.model.meta_init import module_on_meta
from onewan.model.precision import keep_float32_islands
from onewan.model.quantized_linear import QuantizedLinear, can_stay_quantized
from onewan.model.sources import ENCODERS, ModelSource, PipelineComponent, Sources, locate
from onewan.model.tokenizer import load_tokenizer
from onewan.model.wan import WanModel
from onewan.variants import NUM_TRAIN_TIMESTEPS, VARIANTS, Variant, VariantName

QuantizedLayers = Literal["keep", "dequantize"]
"""What becomes of linear layers that a file holds quantized: they stay so, or are expanded."""

_BLOCKS = ("blocks.", "encoder.block.")
"""Where linear layers may stay quantized; those outside are few and compute in float32."""


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
        code. All are placed on `device`. Linear layers that a file holds in fp8 or GGUF stay packed
        and are expanded at each use (`quantized` "keep"), or are expanded once, now. With
        `check_file_names` a file named low-noise is refused as the high-noise expert, and the
        reverse. `boundary` is the noise level between the experts, if not the variant's own.
        CheckpointError names the file and what is wrong with it.
        """
        sources = locate(source, components)
        facts, described = _describe(sources, variant, components, check_file_names)
        facts = facts.with_boundary(boundary)
        raise_problems(_boundary_problems(sources, facts))
        wanted = _components_to_load(sources, facts, described, components)
        model = WanModel(
            variant=facts, source=sources.name, dtype=dtype, notices=list(sources.notices)
        )
        if "tokenizer" in wanted:
            model.tokenizer = load_tokenizer(sources.paths["tokenizer"])
        for component in ("text_encoder", "vae", "transformer", "transformer_2"):
            weights = described[component].file if component in wanted else None
            if weights is None:
                continue
            place = torch.float32 if component == "vae" else dtype, torch.device(device)
            module, notices = _load_module(weights, *place, keep=quantized == "keep")
            setattr(model, component, module)
            model.notices += notices
        if "scheduler" in wanted:
            model.noise_scheduler = official_scheduler(facts)
        return model


def official_scheduler(variant: Variant, shift: float | None = None) -> UniPCMultistepScheduler:
    """UniPC as the official code samples with, at the variant's official shift unless one is given.

    The scheduler files on the hub say shift 3.0 for A14B; the official code uses 12 and 5.
    """
    return UniPCMultistepScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=variant.flow_shift if shift is None else shift,
    )


# -------------------------------------------------------------------------------- what is there


def _describe(
    sources: Sources,
    requested: VariantName | None,
    components: Collection[PipelineComponent] | None,
    check_file_names: bool,
) -> tuple[Variant, Mapping[ComponentName, ComponentDescription]]:
    """The variant, and the components, after checking that they fit together."""
    described = describe_components(sources.paths, components)
    variant = None if requested is None else VARIANTS[requested]
    raise_problems(
        model_problems(sources.name, described, variant, check_file_names=check_file_names)
    )
    variant = variant or infer_variant(described)
    assert variant is not None  # else it is a problem
    return variant, described


def _boundary_problems(sources: Sources, variant: Variant) -> Iterable[str]:
    index = None if sources.whole is None else sources.whole / "model_index.json"
    if index is None or not index.is_file():
        return
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
        wanted: set[PipelineComponent] = set(components)
    elif sources.whole is not None:
        wanted = {*(e.component for e in variant.experts), *ENCODERS, "scheduler"}
    else:
        wanted = {*sources.paths, "scheduler"}
        text = described["text_encoder"].file if "text_encoder" in described else None
        if text is not None and text.tokenizer is None:
            apart = sources.paths["tokenizer"] != sources.paths["text_encoder"]
            wanted -= set() if apart else {"tokenizer"}
    sources.require(wanted, variant)
    return wanted


# ------------------------------------------------------------------------------------------ loading


def _load_module(
    weights: ComponentFile, dtype: torch.dtype, device: torch.device, *, keep: bool
) -> tuple[nn.Module, list[str]]:
    """The module of `weights` with all of them in place, frozen, in evaluation mode; and notices.

    With `keep` the quantized linear layers of its blocks keep_mapped as they are.
    """
    module = module_on_meta(weights)
    islands = _float32_islands(module, weights.kind, dtype)
    expanded = Counter[str]()
    for name, entry in weights.entries.items():
        path, _, leaf = name.rpartition(".")
        owner: Any = module.get_submodule(path)
        wanted = torch.float32 if islands.intersection(name.split(".")) else dtype
        in_a_block = isinstance(owner, nn.Linear) and name.startswith(_BLOCKS)
        if keep and in_a_block and entry.packing != "plain" and wanted == dtype:
            if can_stay_quantized(entry):
                parent, _, last = path.rpartition(".")
                packed = QuantizedLinear(weights, name, owner.bias, device)
                setattr(module.get_submodule(parent), last, packed)
                continue
            expanded[entry.info.dtype] += 1
        # What is converted or moved is copied, and its mapping let go at once.
        keep_mapped = (
            device.type == "cpu"
            and entry.packing == "plain"
            and from_safetensors_name(entry.info.dtype) == wanted
        )
        _assign(owner, leaf, weights.read(name, wanted, keep_mapped=keep_mapped).to(device))
    if weights.kind == "text_encoder":
        embedding: Any = module
        embedding.encoder.embed_tokens.weight = embedding.shared.weight
    if weights.kind == "transformer":
        transformer: Any = module
        keep_float32_islands(transformer)
    module.to(device)  # the buffers; and no dtype here, which would destroy the float32 islands
    left = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
    assert not left, left
    notices = [
        f"{weights.path}: {count} weights of type {kind} were expanded, since no decoder for this "
        "type runs on the device"
        for kind, count in expanded.items()
    ]
    return module.requires_grad_(False).eval(), notices


def _float32_islands(module: Any, part: str, dtype: torch.dtype) -> set[str]:
    """Components of the names of weights that keep_mapped float32 whatever `dtype` the others have.

    As the classes say it: diffusers keeps its islands in both halves, transformers in float16 only
    (UMT5's ``wo`` overflows there).
    """
    narrow = {torch.float16} if part == "text_encoder" else {torch.float16, torch.bfloat16}
    return set(module._keep_in_fp32_modules or ()) if dtype in narrow else set()


def _assign(owner: nn.Module, leaf: str, tensor: Tensor) -> None:
    # Past nn.Module's check, which knows no way from the meta device to another.
    owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
