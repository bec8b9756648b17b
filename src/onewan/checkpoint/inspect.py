"""Describes a file or folder of weights from headers alone, without importing torch.

`inspect` raises no error for files that onewan does not support: another model's file and an
unreadable file get an `Inspection` that says so. No tensor is loaded, so damaged values are not
noticed.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from onewan.checkpoint.compatibility import (
    ProgramSupport,
    programs_reading_adapter,
    programs_reading_weights,
)
from onewan.checkpoint.inspection import Inspection
from onewan.errors import CheckpointError
from onewan.formats.backends import TensorInfo
from onewan.formats.container import TensorFile, open_tensors
from onewan.formats.embedding import INPUT, looks_like_embedding
from onewan.formats.key_maps import transformer_names
from onewan.formats.lora import AdapterLayout, WanShape, layout_of
from onewan.formats.model_folder import (
    KIND_OF,
    ComponentDescription,
    ComponentName,
    adapters_in,
    describe_component,
    expert_of,
    find_components,
    infer_variant,
    missing_components,
    model_problems,
)
from onewan.formats.untrusted import named, parse_json
from onewan.formats.weights import (
    ComponentFile,
    detect_expert,
    foreign_model,
    looks_like_adapter,
    open_component,
)
from onewan.variants import VARIANTS, ExpertName, Variant, titles_by_inputs

_KIND_TITLES = {
    "transformer": "transformer",
    "vae": "VAE",
    "text_encoder": "text encoder (UMT5-XXL)",
}
_ADAPTER_TITLES = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT"}
_MAX_LORAS = 20


def inspect(path: Path) -> Inspection:
    """Describes `path`: a file, a folder with one component, or a folder with a whole model."""
    path = Path(path)
    try:
        if loras := adapters_in(path):
            return _inspect_loras(path, loras)
        paths = find_components(path)
        # A folder with nothing but the shards of TI2V-5B is one component.
        if paths and set(paths.values()) != {path}:
            return _inspect_model(path, paths)
        return _inspect_component(path)
    except CheckpointError as error:
        text = str(error).removeprefix(f"{path}: ")
        return Inspection(path=path, kind="unreadable", summary=text)


def _inspect_loras(folder: Path, files: Sequence[Path]) -> Inspection:
    """Describes a folder of LoRAs, of which commands take one by one."""
    return Inspection(
        path=folder,
        kind="adapters",
        summary=f"a folder of {len(files)} LoRAs; give the path of one to convert, merge or sample",
        components=tuple(inspect(file) for file in files[:_MAX_LORAS]),
        problems=()
        if len(files) <= _MAX_LORAS
        else (f"only the first {_MAX_LORAS} are described; inspect the others one by one",),
    )


def _inspect_model(folder: Path, paths: Mapping[ComponentName, Path]) -> Inspection:
    """Describes a whole model. A tokenizer is not described, but its absence is reported."""
    components: dict[ComponentName, Inspection] = {}
    described: dict[ComponentName, ComponentDescription] = {}
    for name in KIND_OF.keys() & paths.keys():
        path = paths[name]
        component = inspect(path) if path != folder else _inspect_component(folder)
        with contextlib.suppress(CheckpointError):  # `component` already says what is wrong
            described[name] = describe_component(path)
        variant = VARIANTS.get(component.variant or "")  # type: ignore[call-overload]
        if component.kind == "transformer" and variant is not None and len(variant.experts) == 2:
            component = _with_expert_of_folder(component, variant, name)
        components[name] = component
    inspections = [components[name] for name in KIND_OF if name in components]
    variant = infer_variant(described)
    problems = [
        f"{i.path.name}: {problem}"
        for i in inspections
        for problem in (i.problems if i.kind != "unreadable" else (i.summary,))
    ]
    problems += model_problems(str(folder), described)
    if variant is not None:
        encoder = described.get("text_encoder")
        included = encoder is not None and encoder.file is not None and encoder.file.tokenizer
        found = {*paths, "tokenizer"} if included else {*paths}
        problems += [f"has no {name}" for name in missing_components(found, variant)]
    path = paths.get("transformer") or next(iter(paths.values()))
    layout = "diffusers layout"
    if path == folder or path.name in ("high_noise_model", "low_noise_model"):
        layout = "official layout"
    elif path.is_file():
        layout = "single files"
    return Inspection(
        path=folder,
        kind="model",
        summary=f"{titles_by_inputs(variant) if variant else 'a Wan model'}, {layout}",
        variant=variant.name if variant else None,
        problems=tuple(problems),
        components=tuple(inspections),
    )


def _with_expert_of_folder(
    inspection: Inspection, variant: Variant, component: ComponentName
) -> Inspection:
    """`inspection` with the expert that the layout of the model's folder determines."""
    expert = next(e.name for e in variant.experts if e.component == component)
    summary = f"transformer of {titles_by_inputs(variant)}, for the {expert}-noise expert"
    return replace(inspection, expert=expert, expert_source="folder", summary=summary)


def _inspect_component(path: Path) -> Inspection:
    file = open_tensors(path)
    common: dict[str, Any] = {
        "path": path,
        "container": file.container,
        "files": {part.name: part.stat().st_size for part in file.files},
        "metadata": {n: v for n, v in file.metadata.items() if n != "format"},
        "dtypes": _parameters_by_dtype(file.tensors.values()),
        "parameters": sum(i.elements for i in file.tensors.values()),
    }
    if looks_like_adapter(file):
        layout = layout_of(file.tensors, file.metadata)
        if layout is not None and layout.modules:
            return _inspect_adapter(path, file, layout, common)
        architecture = layout.other_architecture if layout else None
        summary = f"a LoRA of {architecture or 'another model'}, not of Wan 2.2"
        return Inspection(kind="other", summary=summary, **common)
    if looks_like_embedding(file):
        tokens = max((i.shape[0] for i in file.tensors.values() if len(i.shape) == 2), default=1)
        is_input = INPUT in file.tensors
        how = "with the node that `onewan comfyui-node` adds, as embedding:NAME in a prompt"
        comfyui = ProgramSupport("ComfyUI", is_input, how if is_input else "has no such embeddings")
        return Inspection(
            kind="embedding", summary=f"embedding of {tokens} tokens", programs=(comfyui,), **common
        )
    try:
        weights = open_component(file)
    except CheckpointError as error:
        model = foreign_model(file)
        reason = str(error).removeprefix(f"{path}: ")
        summary = f"{model}, not Wan 2.2" if model else reason
        return Inspection(kind="other", summary=summary, **common)
    return _inspect_weights(weights, common)


def _inspect_weights(weights: ComponentFile, common: Mapping[str, Any]) -> Inspection:
    # Only weights, since the other tensors of a file (scales, tokenizer) are not parameters.
    dtypes = _parameters_by_dtype(entry.info for entry in weights.entries.values())
    expert, source = expert_of(weights)
    summary = _KIND_TITLES[weights.kind]
    if weights.kind == "vae":
        version = "2.1" if weights.variant is None else "2.2"
        summary = f"Wan {version} VAE, of {'the A14B models' if version == '2.1' else 'TI2V-5B'}"
    elif weights.variant is not None:
        summary = f"{summary} of {titles_by_inputs(weights.variant)}"
        if expert in ("high", "low"):
            summary += f", for the {expert}-noise expert (by its {source})"
        elif len(weights.variant.experts) == 2:
            summary += " (high or low expert: neither its header nor its name says)"
    problems = list(_key_problems(weights))
    return Inspection(
        kind=weights.kind,
        summary=summary,
        variant=weights.variant.name if weights.variant else None,
        expert=expert,
        expert_source=source,
        key_format=weights.key_format,
        prefix=weights.prefix,
        quantization=weights.quantization,
        config=weights.config,
        programs=() if problems else programs_reading_weights(weights),
        problems=tuple(problems),
        **{**common, "dtypes": dtypes, "parameters": sum(dtypes.values())},
    )


def _key_problems(weights: ComponentFile) -> Iterator[str]:
    """Missing and unexpected keys. Shapes are checked only when the component is loaded, since that
    takes the module, and with it torch."""
    if weights.kind == "transformer":
        names = transformer_names(
            weights.config["num_layers"],
            takes_reference="reference_channels" in weights.config,
        )
        missing = sorted(names - weights.entries.keys())
        if missing:
            yield f"has {len(missing)} missing keys, such as {named(missing)}"
    if weights.unexpected:
        names = named(sorted(weights.unexpected))
        yield f"has {len(weights.unexpected)} unexpected keys, such as {names}"


def _inspect_adapter(
    path: Path, file: TensorFile, layout: AdapterLayout, common: Mapping[str, Any]
) -> Inspection:
    variant, shape = _base_model_of(file, layout)
    expert, source = _expert_of_adapter(path, variant, file.metadata)
    # The keys are part of the adapter; a header or a name can be wrong.
    if len(layout.experts) == 1:
        expert, source = layout.experts[0], "keys"
    kinds = Counter(_ADAPTER_TITLES.get(kind, "difference") for kind in layout.kinds.values())
    title = " and ".join(kinds) or "adapter"
    summary = f"{title} for {variant.title if variant else _candidates(shape)}"
    if len(layout.experts) == 2:
        summary += ", both experts in one file"
    elif expert is not None and expert != "single":
        summary += f", for the {expert}-noise expert (by its {source})"
    blocks = sorted({int(m.split(".")[1]) for m in layout.modules if m.startswith("blocks.")})
    problems: list[str] = []
    if layout.module_errors:
        errors = named(layout.module_errors, "; ")
        problems.append(f"has {len(layout.module_errors)} damaged modules: {errors}")
    if layout.unknown:
        origin = f" of {layout.other_architecture}" if layout.other_architecture else ""
        names = named(layout.unknown)
        problems.append(f"has {len(layout.unknown)} unexpected keys{origin}, such as {names}")
    return Inspection(
        kind="adapter",
        summary=summary,
        variant=variant.name if variant else None,
        expert=expert,
        expert_source=source,
        key_format=layout.key_format,
        prefix=layout.prefix,
        adapter={
            "kinds": dict(kinds),
            "rank": _range(layout.ranks.values()),
            "alpha": _alphas(file, layout),
            "modules": len(layout.modules),
            "blocks": _range(blocks),
            "trainer": layout.trainer,
            "skipped": _skipped(layout),
        },
        programs=()
        if problems
        else programs_reading_adapter(layout, shape, is_scaled=_is_scaled(file, layout)),
        problems=tuple(problems),
        **common,
    )


def _skipped(layout: AdapterLayout) -> str | None:
    if not layout.skipped:
        return None
    count = len(layout.skipped)
    return f"{count} keys that Wan 2.2 has no weights for, as in ComfyUI: {named(layout.skipped)}"


def _base_model_of(
    file: TensorFile, layout: AdapterLayout
) -> tuple[Variant | None, WanShape | None]:
    """The variant that an adapter is for, and the shape of its transformer; None where unknown.

    onewan's header names the variant. Otherwise the width of the layers determines it, except that
    T2V-A14B and I2V-A14B have the same layers.
    """
    variant = VARIANTS.get(file.metadata.get("onewan.variant", ""))  # type: ignore[call-overload]
    width = next(
        (
            file.tensors[parts["lora_A"]].shape[-1]
            for module, parts in layout.modules.items()
            # The inputs of attention layers have the model's width, those of the FFN do not.
            if "lora_A" in parts and ".attn" in module
        ),
        None,
    )
    shape = WanShape.of_width(width) if width else None
    single = VARIANTS["ti2v-5b"]
    if variant is None and shape is not None and shape.num_layers == single.num_layers:
        variant = single
    return variant, shape


def _candidates(shape: WanShape | None) -> str:
    if shape is None:
        return "Wan of unknown width"
    return "Wan 2.2 (T2V-A14B or I2V-A14B, which have the same layers)"


def _alphas(file: TensorFile, layout: AdapterLayout) -> str | None:
    alphas = _alpha_tensors(file, layout)
    if alphas:
        return _range(alphas.values())
    text = file.metadata.get("lora_adapter_metadata")  # PEFT's settings, by diffusers
    try:
        settings = {k.rpartition(".")[2]: v for k, v in parse_json(text or "{}").items()}
    except (ValueError, AttributeError):
        return None
    alpha = settings.get("lora_alpha")
    return None if alpha is None else str(alpha)


def _is_scaled(file: TensorFile, layout: AdapterLayout) -> bool:
    """Whether the alpha of a module, as a tensor, differs from its rank."""
    alphas = _alpha_tensors(file, layout)
    return any(alpha != layout.ranks.get(module) for module, alpha in alphas.items())


def _alpha_tensors(file: TensorFile, layout: AdapterLayout) -> dict[str, float]:
    """By module. Without those of damaged modules, which may be of any size."""
    key_of = {m: parts["alpha"] for m, parts in layout.modules.items() if "alpha" in parts}
    arrays = file.arrays([key for module, key in key_of.items() if module in layout.kinds])
    return {m: float(arrays[key].reshape(-1)[0]) for m, key in key_of.items() if key in arrays}


def _expert_of_adapter(
    path: Path, variant: Variant | None, metadata: Mapping[str, str]
) -> tuple[ExpertName | None, str | None]:
    if variant is not None and len(variant.experts) == 1:
        return "single", None
    return detect_expert(path, metadata) or (None, None)


def _parameters_by_dtype(infos: Iterable[TensorInfo]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for info in infos:
        counts[info.dtype] += info.elements
    return dict(counts.most_common())


def _range(values: Any) -> str | None:
    """``4``, or ``4 to 16`` where they differ."""
    found = sorted(set(values))
    if not found:
        return None
    low, high = (f"{v:g}" for v in (found[0], found[-1]))
    return low if low == high else f"{low} to {high}"
