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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor, nn

from onewan.dtypes import from_safetensors_name
from onewan.errors import CheckpointError
from onewan.formats.configs import read_json
from onewan.formats.weights import ComponentFile, expert_in_name, open_component
from onewan.model.meta_init import module_on_meta
from onewan.model.precision import keep_float32_islands
from onewan.model.quantized_linear import QuantizedLinear, can_stay_quantized
from onewan.model.sources import (
    ENCODERS,
    ComponentName,
    ModelSource,
    PipelineComponent,
    Sources,
    field_name,
    locate,
)
from onewan.model.tokenizer import load_tokenizer
from onewan.model.wan import WanModel
from onewan.variants import NUM_TRAIN_TIMESTEPS, VARIANTS, Variant, VariantName, variant_of

QuantizedLayers = Literal["keep", "dequantize"]
"""What becomes of linear layers that a file holds quantized: they stay so, or are expanded."""

_SLOTS: Mapping[ComponentName, str] = {
    "transformer": "transformer",
    "transformer_2": "transformer",
    "vae": "vae",
    "text_encoder": "text_encoder",
}
"""What kind of weights belongs under each name."""

_BLOCKS = ("blocks.", "encoder.block.")
"""Where linear layers may keep_mapped quantized; those outside are few and compute in float32."""


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
        facts, pieces = _examined(sources, variant, components, check_file_names)
        facts = facts.with_boundary(boundary)
        _refuse(_boundary_problems(sources, facts))
        wanted = _wanted(sources, facts, pieces, components)
        model = WanModel(
            variant=facts, source=sources.name, dtype=dtype, notices=list(sources.notices)
        )
        if "tokenizer" in wanted:
            model.tokenizer = load_tokenizer(sources.paths["tokenizer"])
        for component in ("text_encoder", "vae", "transformer", "transformer_2"):
            weights = pieces[component].weights if component in wanted else None
            if weights is None:
                continue
            place = torch.float32 if component == "vae" else dtype, torch.device(device)
            module, notices = _filled(weights, *place, keep=quantized == "keep")
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


# ---------------------------------------------------------------------------- what belongs together


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """What is known of a component before a weight of it is read."""

    place: Path
    kind: str
    config: Mapping[str, Any]
    variant: Variant | None
    weights: ComponentFile | None
    """None where only the configuration has been fetched."""


def _piece(component: ComponentName, place: Path, needed: bool) -> _Piece | None:
    """None for a component that is not `needed` and of which nothing can be said."""
    # Of a repository on the hub only the configuration was fetched, if that.
    fetched = not place.is_dir() or any(
        path for kind in ("safetensors", "gguf") for path in place.glob(f"*.{kind}")
    )
    if needed or fetched:
        weights = open_component(place)
        return _Piece(
            place=place,
            kind=weights.kind,
            config=weights.config,
            variant=weights.variant,
            weights=weights,
        )
    file = place / "config.json"
    if not file.is_file() or _SLOTS[component] != "transformer":
        return None
    config = read_json(file)
    config = {"in_channels": config.get("in_dim"), **config}  # as the official one calls it
    return _Piece(
        place=place,
        kind="transformer",
        config=config,
        variant=variant_of(config, str(file)),
        weights=None,
    )


def _examined(
    sources: Sources,
    asked: VariantName | None,
    components: Collection[PipelineComponent] | None,
    check_file_names: bool,
) -> tuple[Variant, Mapping[ComponentName, _Piece]]:
    """The variant, and what lies where, after checking that all of it fits together."""
    pieces: dict[ComponentName, _Piece] = {}
    problems: list[str] = []
    for component in _SLOTS.keys() & sources.paths.keys():
        needed = components is None or component in components
        try:
            piece = _piece(component, sources.paths[component], needed)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            if piece is not None:
                pieces[component] = piece
    _refuse(problems)
    _refuse(
        f"{piece.place}: was given as {field_name(component)}, and holds a "
        f"{piece.kind.replace('_', ' ')}; give it as model.{piece.kind}"
        for component, piece in pieces.items()
        if piece.kind != _SLOTS[component]
    )
    variant = _variant(sources, asked, pieces)
    _refuse(_mismatches(variant, asked, pieces))
    if check_file_names and len(variant.experts) == 2:
        _refuse(_name_problems(pieces))
    return variant, pieces


def _refuse(problems: Iterable[str]) -> None:
    """CheckpointError with all of `problems`, if there are any."""
    if found := sorted(set(problems)):
        raise CheckpointError("; ".join(found))


def _variant(
    sources: Sources, asked: VariantName | None, pieces: Mapping[ComponentName, _Piece]
) -> Variant:
    if asked is not None:
        return VARIANTS[asked]
    for component in ("transformer", "transformer_2", "vae"):
        if component in pieces and (variant := pieces[component].variant) is not None:
            return variant
    raise CheckpointError(
        f"{sources.name}: without a transformer it can't be told which model this is; say the "
        f"variant: {', '.join(VARIANTS)}"
    )


def _mismatches(
    variant: Variant, asked: VariantName | None, pieces: Mapping[ComponentName, _Piece]
) -> Iterable[str]:
    """Components of another variant, or of another width, than the rest."""
    experts: tuple[ComponentName, ...] = ("transformer", "transformer_2")
    for component in experts:
        piece = pieces.get(component)
        if piece is None:
            continue
        found = piece.variant
        if found is not None and found is not variant:
            instead = f", or set model.variant to {found.name}" if asked else ""
            yield (
                f"{piece.place}: is a transformer of {found.name} ({found.in_channels} input "
                f"channels), and one of {variant.name} ({variant.in_channels}) is wanted; give "
                f"another{instead}"
            )
        elif component == "transformer_2" and len(variant.experts) == 1:
            yield (
                f"{piece.place}: was given as {field_name(component)}, and {variant.name} has one "
                "transformer; leave it out"
            )
        text = pieces.get("text_encoder")
        width = piece.config.get("text_dim")
        if text is not None and width is not None and text.config.get("d_model") != width:
            yield (
                f"{text.place}: the text encoder is {text.config.get('d_model')} wide, and "
                f"{piece.place} takes text of width {width}; they do not belong together"
            )
    vae = pieces.get("vae")
    if vae is not None and vae.config.get("z_dim", 16) != variant.latent_channels:
        yield (
            f"{vae.place}: is a VAE with {vae.config.get('z_dim', 16)} latent channels, and "
            f"{variant.name} needs {variant.latent_channels}; the A14B models use the Wan 2.1 VAE "
            "(16), TI2V-5B the Wan 2.2 VAE (48)"
        )


def _boundary_problems(sources: Sources, variant: Variant) -> Iterable[str]:
    index = None if sources.whole is None else sources.whole / "model_index.json"
    if index is None or not index.is_file():
        return
    ratio = read_json(index).get("boundary_ratio")
    if ratio is not None and ratio != variant.boundary:
        yield (
            f"{index}: boundary_ratio is {ratio}, and {variant.boundary} is what {variant.name} is "
            f"to have; if the model was trained so, set model.boundary to {ratio}"
        )


def _name_problems(pieces: Mapping[ComponentName, _Piece]) -> Iterable[str]:
    """Experts whose names say that they are the other one; one file for both."""
    override = "swap them, or set model.check_file_names to false if the name is wrong"
    places = Counter[Path]()
    slots: tuple[tuple[ComponentName, str], ...] = (
        ("transformer", "high"),
        ("transformer_2", "low"),
    )
    for component, noise in slots:
        piece = pieces.get(component)
        if piece is None:
            continue
        places[piece.place] += 1
        files = piece.weights.file.files if piece.weights else ()
        said = {expert_in_name(path) for path in (piece.place, *files)} - {None, noise}
        if said:
            yield (
                f"{piece.place}: was given as {field_name(component)}, and by its name is the "
                f"{said.pop()}-noise expert; {override}"
            )
    for place, count in places.items():
        if count > 1:
            yield (
                f"{place}: was given for both experts; give each its own, or set "
                "model.check_file_names to false"
            )


def _wanted(
    sources: Sources,
    variant: Variant,
    pieces: Mapping[ComponentName, _Piece],
    components: Collection[PipelineComponent] | None,
) -> Collection[PipelineComponent]:
    """The components to load; CheckpointError for those that there are not."""
    if components is not None:
        wanted: set[PipelineComponent] = set(components)
    elif sources.whole is not None:
        wanted = {*(e.component for e in variant.experts), *ENCODERS, "scheduler"}
    else:
        wanted = {*sources.paths, "scheduler"}
        text = pieces["text_encoder"].weights if "text_encoder" in pieces else None
        if text is not None and text.tokenizer is None:
            apart = sources.paths["tokenizer"] != sources.paths["text_encoder"]
            wanted -= set() if apart else {"tokenizer"}
    sources.require(wanted, variant)
    return wanted


# ------------------------------------------------------------------------------------------ loading


def _filled(
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
