"""`WanModelLoader`: loads model files in any layout as a `WanModel`.

All layouts are loaded alike: `locate` finds the path of each component, `open_component` maps its
keys, `module_on_meta` builds the module without memory, and `WeightLoader` loads each tensor into
its parameter. On the CPU, weights that need no conversion stay mapped from the file (copy on write,
so that training may write to them), and loading never holds a model twice.

Scales of fp8 weights are applied; the float32 islands stay float32; a missing or unexpected key is
an error and never a random initialization; the components must fit each other and the requested
variant. No code from a checkpoint runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from torch import nn

from onewan.dtypes import WeightStorage
from onewan.formats.model_folder import (
    ComponentDescription,
    ComponentName,
    describe_components,
    infer_variant,
    model_problems,
    raise_problems,
)
from onewan.formats.untrusted import read_json
from onewan.formats.weights import ComponentFile
from onewan.model.meta_init import module_on_meta
from onewan.model.precision import keep_float32_islands
from onewan.model.sources import ENCODERS, ModelSource, PipelineComponent, Sources, locate
from onewan.model.tokenizer import load_tokenizer
from onewan.model.wan import WanModel
from onewan.model.weight_loading import WeightLoader
from onewan.variants import NUM_TRAIN_TIMESTEPS, VARIANTS, Variant, VariantName


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
        weights: WeightStorage = "as_stored",
        check_file_names: bool = True,
        boundary: float | None = None,
    ) -> WanModel:
        """The model at `source`: a folder or hub repository in the diffusers or the official
        layout, the file of one component, or a mapping from components to any of these.

        `variant` is checked against the weights if given. `components` limits what is loaded (None:
        all of a whole model, or what was given). The transformers get `dtype` but for their float32
        islands, the text encoder gets `dtype`, and the VAE is always float32, as in the official
        code. All are moved to `device`. `weights` says how the matrices of the blocks are kept: as
        the file stores them, where fp8 and GGUF stay packed ("as_stored"), in `dtype` ("bf16"), or,
        those of transformers, packed while loading. Packed ones are expanded at each use.
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
            file = described[component].file if component in to_load else None
            if file is None:
                continue
            module_dtype = torch.float32 if component == "vae" else dtype
            module, notices = _load_module(file, module_dtype, torch.device(device), weights)
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
    weights: ComponentFile, dtype: torch.dtype, device: torch.device, storage: WeightStorage
) -> tuple[nn.Module, list[str]]:
    """(the module of `weights`, loaded, frozen and in evaluation mode; notices for the user)."""
    module = module_on_meta(weights)
    notices = WeightLoader(weights, dtype, device, storage).load(module)
    if weights.kind == "text_encoder":
        encoder: Any = module
        # Loading replaced the parameter, which breaks the tie.
        encoder.encoder.embed_tokens.weight = encoder.shared.weight
    if weights.kind == "transformer":
        transformer: Any = module
        keep_float32_islands(transformer)
    # The buffers. No dtype here, which would round the float32 islands.
    module.to(device)
    on_meta = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
    assert not on_meta, on_meta
    return module.requires_grad_(False).eval(), notices
