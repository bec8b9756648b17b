"""Converts the full weights of models and components between layouts, and saves loaded models.

All functions take three steps: read the weights (`read_model`, or modules in memory), list the
files to write (`layouts.plan_component`), and write all of them or none (`publish`). Keys and types
are converted tensor by tensor; values change only if another precision is requested. The result is
opened and checked like any other file before it is renamed to the destination.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from onewan.checkpoint.atomic_write import ProgressCallback, publish, writing_to
from onewan.checkpoint.component import ComponentWeights, NotFiniteError, config_of, from_module
from onewan.checkpoint.layouts import (
    SHARD_BYTES,
    OutputFile,
    path_in_model,
    plan_component,
    plan_model_extras,
)
from onewan.checkpoint.model_files import ModelWeights, read_model, saved_tokenizer
from onewan.checkpoint.target_formats import ModelFormat
from onewan.dtypes import dtype_name
from onewan.errors import CheckpointError, combined
from onewan.formats.configs import HEAD_DIM
from onewan.formats.finite import all_finite
from onewan.formats.model_folder import KIND_OF, ComponentName
from onewan.formats.untrusted import named
from onewan.formats.weights import open_component
from onewan.model.meta_init import module_on_meta
from onewan.model.wan import WanModel
from onewan.variants import Expert, ExpertName, Variant

FP8_OTHER_DTYPES = (torch.float16, torch.bfloat16)
"""Types that fp8_scaled files may have for weights that are not fp8: those that were tested in
ComfyUI."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteResult:
    """The files that a conversion or a merge wrote."""

    files: tuple[Path, ...]
    notices: tuple[str, ...]
    """Notices for the user, one line each."""


def convert_model(
    source: Path,
    destination: Path,
    to: ModelFormat,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
    on_progress: ProgressCallback = lambda _done, _total: None,
    shard_bytes: int = SHARD_BYTES,
) -> WriteResult:
    """Write the model or component at `source` to `destination` in layout `to`.

    A whole model becomes a folder; a component becomes a file or a folder, depending on the layout
    (`onewan.checkpoint.layouts`). `dtype` is the type of the weights; for None each keeps its type,
    and quantized ones become bfloat16. For ``fp8_scaled`` it is the type of the weights that are
    not fp8 (None: bfloat16). The VAE of a whole model always keeps its type.

    CheckpointError if `source` is incomplete, if `destination` exists without `force`, if the disk
    is too full, or a value overflows `dtype`; nothing is changed on the disk then.
    """
    model = read_model(Path(source))
    formats: dict[ComponentName, ModelFormat] = dict.fromkeys(model.components, to)
    return write_model(
        model,
        Path(destination),
        formats,
        to,
        sources=[Path(source)],
        dtype=dtype,
        force=force,
        on_progress=on_progress,
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
    """Write the loaded components of `model` to `destination`: a folder, or, if that ends in
    .safetensors or .pth, a file with the only component.

    Active adapters are merged into the weights that are written (in float32, rounded once); the
    model in memory stays as it is. `dtype` and errors are as in `convert_model`.
    """
    destination = Path(destination)
    experts: dict[str, ExpertName] = {e.component: e.name for e in model.variant.experts}
    components: dict[ComponentName, ComponentWeights] = {}
    for name, kind in KIND_OF.items():
        module = getattr(model, name)
        if module is None:
            continue
        component = from_module(module, kind, model.source, experts.get(name))
        # The model knows its variant. The configuration of a component may fit several.
        components[name] = replace(component, variant=model.variant)
    if not components:
        raise CheckpointError(
            f"{model.source}: no component with weights is loaded; load one before saving"
        )
    whole = destination.suffix not in (".safetensors", ".pth")
    if not whole and len(components) > 1:
        raise CheckpointError(
            f"{destination}: is the name of a file, but {len(components)} components are loaded "
            f"({', '.join(components)}); give a folder"
        )
    weights = ModelWeights(
        name=model.source,
        components=components,
        formats={},
        whole=whole,
        tokenizer={} if model.tokenizer is None else saved_tokenizer(model.tokenizer),
    )
    to: dict[ComponentName, ModelFormat] = dict.fromkeys(components, format)
    return write_model(weights, destination, to, format, sources=[], dtype=dtype, force=force)


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

    Replaces what exists there. `source` names the base model that it was trained from; `facts` are
    entries of the header (of a file only). `dtype` and errors are as in `convert_model`.
    """
    component = from_module(transformer, "transformer", source, expert.name)
    weights = ModelWeights(
        name=source,
        components={expert.component: replace(component, variant=variant, facts=facts)},
        formats={},
        whole=False,
        tokenizer={},
    )
    to: dict[ComponentName, ModelFormat] = {expert.component: format}
    return write_model(weights, Path(destination), to, format, sources=[], dtype=dtype, force=True)


def write_model(  # noqa: PLR0913  (shared by converting, saving and merging)
    model: ModelWeights,
    destination: Path,
    formats: Mapping[ComponentName, ModelFormat],
    to: ModelFormat,
    *,
    sources: Sequence[Path],
    dtype: torch.dtype | None = None,
    force: bool = False,
    on_progress: ProgressCallback = lambda _done, _total: None,
    shard_bytes: int = SHARD_BYTES,
) -> WriteResult:
    """Write `model`, each component in its layout of `formats`; the files of a whole model besides
    weights (index, scheduler, tokenizer) as in layout `to`. `sources` are never overwritten."""
    paths: dict[ComponentName, str] = {}
    notices: list[str] = []
    planned: list[OutputFile] = []
    for name, component in model.components.items():
        format = formats[name]
        out_dtype = _output_dtype(model, component, format, dtype)
        paths[name] = _output_path(model, name, component, format, out_dtype)
        planned += plan_component(
            component, format, paths[name], dtype=out_dtype, shard_bytes=shard_bytes
        )
        notices += _notices(component, format, out_dtype, model.whole)
    variant = model.variant
    if model.whole:
        assert variant is not None
        planned += plan_model_extras(to, variant, list(model.components), model.tokenizer)
        if missing := model.missing:
            notices.append(
                f"{model.name}: has no {', '.join(missing)}, so the result has none either"
            )
    folder = any(output.path for output in planned)
    _check_suffix(destination, formats, folder)

    def verify(written: Path) -> None:
        for name, component in model.components.items():
            path = written / paths[name] if paths[name] else written
            notices.extend(_lost_settings(path, component))

    with writing_to(destination, sources, folder=folder, force=force) as leftovers:
        try:
            files = publish(destination, planned, verify, on_progress)
        except NotFiniteError:
            raise _not_finite(model) from None
    return WriteResult(files=tuple(files), notices=tuple(dict.fromkeys([*leftovers, *notices])))


def _not_finite(model: ModelWeights) -> CheckpointError:
    """The error that names all weights with values that are NaN or infinite."""
    problems: list[str] = []
    for component in model.components.values():
        wrong = [name for name, w in component.weights.items() if not all_finite(w.read())]
        if wrong:
            problems.append(
                f"{component.source}: {len(wrong)} of {len(component.weights)} weights hold values "
                f"that are NaN or infinite, such as {named(wrong)}; the file is damaged or its "
                "training diverged, give another one"
            )
    return combined(CheckpointError, problems)


def _output_dtype(
    model: ModelWeights, component: ComponentWeights, to: ModelFormat, dtype: torch.dtype | None
) -> torch.dtype | None:
    # A VAE is small and its precision shows in every frame, so the options for the transformers do
    # not apply to that of a whole model.
    if component.kind == "vae":
        if to == "fp8_scaled" and not model.whole:
            raise CheckpointError(
                f"{component.source}: is a VAE, which has no fp8_scaled format; use --to single"
            )
        return None if model.whole else dtype
    if to == "fp8_scaled" and dtype not in (None, *FP8_OTHER_DTYPES):
        raise CheckpointError(
            f"--dtype {dtype_name(dtype)}: can't be used with --to fp8_scaled, where it is "
            "the type of the weights that are not fp8; choose bfloat16 or float16"
        )
    return dtype


def _output_path(
    model: ModelWeights,
    name: ComponentName,
    component: ComponentWeights,
    to: ModelFormat,
    dtype: torch.dtype | None,
) -> str:
    if not model.whole:
        return ""
    assert model.variant is not None
    return path_in_model(name, component, model.variant, to, dtype or component.dtype)


def _check_suffix(
    destination: Path, formats: Mapping[ComponentName, ModelFormat], folder: bool
) -> None:
    """CheckpointError if the extension of `destination` does not match the output."""
    suffix = destination.suffix
    if folder:
        if suffix in (".safetensors", ".pth", ".gguf"):
            raise CheckpointError(
                f"{destination}: the output is a folder; give a name without {suffix}"
            )
        return
    expected = ".pth" if "official" in formats.values() else ".safetensors"
    if suffix != expected:
        raise CheckpointError(
            f"{destination}: the output is a {expected} file; give a name that ends in {expected}"
        )


def _notices(
    component: ComponentWeights, to: ModelFormat, dtype: torch.dtype | None, whole: bool
) -> list[str]:
    notices: list[str] = []
    if component.is_quantized and to != "fp8_scaled" and dtype is None:
        notices.append(
            f"{component.source}: its quantized weights are written as bfloat16; add --dtype for "
            "another type"
        )
    if to not in ("single", "fp8_scaled"):
        if component.kind == "text_encoder" and component.tokenizer is not None and not whole:
            notices.append(
                f"{component.source}: contains a tokenizer, which this layout stores in a folder "
                "beside the text encoder; convert the whole model folder to keep it"
            )
        return notices
    head_dim = component.config.get("attention_head_dim", HEAD_DIM)
    if component.kind == "transformer" and head_dim != HEAD_DIM:
        notices.append(
            f"{component.source}: has attention heads of {head_dim} channels, but ComfyUI assumes "
            f"{HEAD_DIM} for all Wan models; its outputs will be wrong"
        )
    if component.kind == "text_encoder" and component.tokenizer is None:
        notices.append(
            f"{component.source}: has no spiece.model, which ComfyUI needs in the file of the text "
            "encoder; convert the whole model folder to include it"
        )
    return notices


def _lost_settings(written: Path, component: ComponentWeights) -> list[str]:
    """A notice if the files at `written` do not store all settings of the configuration.

    CheckpointError if they are not the complete component.
    """
    config = config_of(module_on_meta(open_component(written)))
    # Neither changes what the component computes, and transformers fills them in by itself.
    ignored = ("architectures", "transformers_version")
    lost = [
        name
        for name, value in component.config.items()
        if name[0] != "_" and name not in ignored and config.get(name, value) != value
    ]
    if not lost:
        return []
    return [
        f"{component.source}: {', '.join(sorted(lost))} can't be stored in this layout; programs "
        "that read the result use the official values"
    ]
