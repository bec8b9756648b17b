"""Full weights from one form into another, and out of memory into files.

One way for all: what is there (`read_model`, or modules), what will be written (`layouts.outputs`),
and its publication, all or nothing (`publish`). Names and types change on the way, tensor by
tensor; the numbers only where another precision is asked for. What was written is recognised and
checked like any other file before it gets its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from onewan.checkpoint.atomic_write import ProgressCallback, check_destination, publish
from onewan.checkpoint.component import ComponentWeights, config_of, from_module
from onewan.checkpoint.layouts import (
    SHARD_BYTES,
    ModelFormat,
    OutputFile,
    path_in_model,
    plan_component,
    plan_model_extras,
)
from onewan.checkpoint.model_files import ModelWeights, read_model, saved_tokenizer
from onewan.dtypes import dtype_name
from onewan.errors import CheckpointError
from onewan.formats.configs import HEAD_DIM
from onewan.formats.model_folder import KIND_OF, ComponentName
from onewan.formats.weights import open_component
from onewan.model.meta_init import module_on_meta
from onewan.model.wan import WanModel
from onewan.variants import Expert, ExpertName, Variant

FP8_REST = (torch.float16, torch.bfloat16)
"""What fp8_scaled files have beside fp8; ComfyUI was seen to read these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteResult:
    """What a conversion did."""

    files: tuple[Path, ...]
    notices: tuple[str, ...]
    """What the user should know, one line each."""


def convert_model(
    source: Path,
    destination: Path,
    to: ModelFormat,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
    report: ProgressCallback = lambda _done, _total: None,
    shard_bytes: int = SHARD_BYTES,
) -> WriteResult:
    """Write the model or component at `source` to `destination` in layout `to`.

    A whole model becomes a folder; a component a file or a folder, as the layout has it
    (`onewan.checkpoint.layouts`). Weights keep their type unless `dtype` asks for another; those
    that are quantized become bfloat16 then, and for ``fp8_scaled`` it is the type of all that is
    not fp8 (bfloat16 if None). The VAE of a whole model keeps its type in any case.

    CheckpointError if `source` is not whole, if something is at `destination` and not `force`, if
    the disk is too full, or a weight does not fit; nothing is changed on the disk then.
    """
    model = read_model(Path(source))
    arrangement: dict[ComponentName, ModelFormat] = dict.fromkeys(model.components, to)
    return write_model(
        model,
        Path(destination),
        arrangement,
        to,
        sources=[Path(source)],
        dtype=dtype,
        force=force,
        report=report,
        shard_bytes=shard_bytes,
    )


def save_model(
    model: WanModel,
    destination: Path,
    format: ModelFormat = "diffusers",
    dtype: torch.dtype | None = None,
    *,
    force: bool = False,
) -> WriteResult:
    """Write what `model` has loaded to `destination`: a folder, or, if that ends in .safetensors or
    .pth, the file of the only component.

    Active adapters are merged into the weights that are written (in float32, rounded once); the
    model in memory stays as it is. `dtype` and errors are as in `convert_model`.
    """
    destination = Path(destination)
    experts: dict[str, ExpertName] = {e.component: e.name for e in model.variant.experts}
    components: dict[ComponentName, ComponentWeights] = {}
    for placed, part in KIND_OF.items():
        module = getattr(model, placed)
        if module is None:
            continue
        component = from_module(module, part, model.source, experts.get(placed))
        components[placed] = replace(component, variant=model.variant)
    if not components:
        raise CheckpointError(f"{model.source}: no component is loaded, so there are no weights")
    whole = destination.suffix not in (".safetensors", ".pth")
    if not whole and len(components) > 1:
        raise CheckpointError(
            f"{destination}: is a file, and {len(components)} components are loaded "
            f"({', '.join(components)}); give a folder"
        )
    held = ModelWeights(
        name=model.source,
        components=components,
        arrangement={},
        whole=whole,
        tokenizer={} if model.tokenizer is None else saved_tokenizer(model.tokenizer),
    )
    to: dict[ComponentName, ModelFormat] = dict.fromkeys(components, format)
    return write_model(held, destination, to, format, sources=[], dtype=dtype, force=force)


def save_expert(
    transformer: WanTransformer3DModel,
    destination: Path,
    format: ModelFormat,
    *,
    variant: Variant,
    expert: Expert,
    source: str,
    dtype: torch.dtype | None = None,
    facts: Mapping[str, str | int | float],
) -> WriteResult:
    """Write one expert to `destination`: a file for ``single``, a folder for ``diffusers``.

    Replaces what is there. `source` is what it was trained from; `facts` join the header of a file.
    `dtype` and errors are as in `convert_model`.
    """
    component = from_module(transformer, "transformer", source, expert.name)
    held = ModelWeights(
        name=source,
        components={expert.component: replace(component, variant=variant, facts=facts)},
        arrangement={},
        whole=False,
        tokenizer={},
    )
    to: dict[ComponentName, ModelFormat] = {expert.component: format}
    return write_model(held, Path(destination), to, format, sources=[], dtype=dtype, force=True)


def write_model(  # noqa: PLR0913  (shared by converting, saving and merging)
    model: ModelWeights,
    destination: Path,
    arrangement: Mapping[ComponentName, ModelFormat],
    to: ModelFormat,
    *,
    sources: Sequence[Path],
    dtype: torch.dtype | None = None,
    force: bool = False,
    report: ProgressCallback = lambda _done, _total: None,
    shard_bytes: int = SHARD_BYTES,
) -> WriteResult:
    """Write `model`, each component in the layout that `arrangement` says, and the files
    of a whole model besides weights as `to` has them. `sources` are never overwritten."""
    places: dict[ComponentName, str] = {}
    notices: list[str] = []
    planned: list[OutputFile] = []
    for placed, component in model.components.items():
        form = arrangement[placed]
        asked = _output_dtype(model, component, form, dtype)
        places[placed] = _output_path(model, placed, component, form, asked)
        planned += plan_component(
            component, form, places[placed], dtype=asked, shard_bytes=shard_bytes
        )
        notices += _notices(component, form, asked, model.whole)
    variant = model.variant
    if model.whole:
        assert variant is not None
        planned += plan_model_extras(to, variant, list(model.components), model.tokenizer)
        if missing := model.missing:
            notices.append(f"{model.name}: has no {', '.join(missing)}, and neither has the result")
    folder = any(output.path for output in planned)
    _check_suffix(destination, arrangement, folder)
    check_destination(destination, sources, folder, force)

    def verify(written: Path) -> None:
        for placed, component in model.components.items():
            place = places[placed]
            notices.extend(_lost_settings(written / place if place else written, component))

    files = publish(destination, planned, verify, report)
    return WriteResult(files=tuple(files), notices=tuple(dict.fromkeys(notices)))


def _output_dtype(
    model: ModelWeights, component: ComponentWeights, to: ModelFormat, dtype: torch.dtype | None
) -> torch.dtype | None:
    if component.kind == "vae":
        if to == "fp8_scaled" and not model.whole:
            raise CheckpointError(
                f"{component.source}: is a VAE, which is not stored as fp8_scaled; use --to single"
            )
        return None if model.whole else dtype
    if to == "fp8_scaled" and dtype not in (None, *FP8_REST):
        raise CheckpointError(
            f"--dtype {dtype_name(dtype)}: is not for --to fp8_scaled, where it is "
            "the type of what is not fp8; choose bfloat16 or float16"
        )
    return dtype


def _output_path(
    model: ModelWeights,
    placed: ComponentName,
    component: ComponentWeights,
    to: ModelFormat,
    dtype: torch.dtype | None,
) -> str:
    if not model.whole:
        return ""
    assert model.variant is not None
    return path_in_model(placed, component, model.variant, to, dtype or component.dtype)


def _check_suffix(
    destination: Path, arrangement: Mapping[ComponentName, ModelFormat], folder: bool
) -> None:
    """CheckpointError if the name does not say what will be under it."""
    suffix = destination.suffix
    if folder:
        if suffix in (".safetensors", ".pth", ".gguf"):
            raise CheckpointError(
                f"{destination}: a folder will be written; give its name, without {suffix}"
            )
        return
    wanted = ".pth" if "official" in arrangement.values() else ".safetensors"
    if suffix != wanted:
        raise CheckpointError(
            f"{destination}: a file {wanted} will be written; give a name that ends so"
        )


def _notices(
    component: ComponentWeights, to: ModelFormat, dtype: torch.dtype | None, whole: bool
) -> list[str]:
    found: list[str] = []
    if component.is_quantized and to != "fp8_scaled" and dtype is None:
        found.append(
            f"{component.source}: its quantized weights are written as bfloat16; --dtype chooses "
            "another type"
        )
    if to not in ("single", "fp8_scaled"):
        if component.kind == "text_encoder" and component.tokenizer is not None and not whole:
            found.append(
                f"{component.source}: carries a tokenizer, which this layout has beside the text "
                "encoder and not in it; convert the whole model folder to keep it"
            )
        return found
    heads = component.config.get("attention_head_dim", HEAD_DIM)
    if component.kind == "transformer" and heads != HEAD_DIM:
        found.append(
            f"{component.source}: has heads of {heads} channels; ComfyUI takes all Wan models to "
            f"have {HEAD_DIM}, and will compute something else"
        )
    if component.kind == "text_encoder" and component.tokenizer is None:
        found.append(
            f"{component.source}: comes without spiece.model, which ComfyUI needs in the file of "
            "the text encoder; convert the whole model folder to have it in"
        )
    return found


def _lost_settings(written: Path, component: ComponentWeights) -> list[str]:
    """What a reader of the files at `written` can't know of the configuration, in words.

    CheckpointError if they are not the whole component.
    """
    config = config_of(module_on_meta(open_component(written)))
    ignored = ("architectures", "transformers_version")
    lost = [
        name
        for name, value in component.config.items()
        if name[0] != "_" and name not in ignored and config.get(name, value) != value
    ]
    if not lost:
        return []
    return [
        f"{component.source}: {', '.join(sorted(lost))} can't be said in this layout; readers "
        "of the result take the official values"
    ]
