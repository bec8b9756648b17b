"""Finds the components of a model, describes each, and checks that they fit together.

The loader, the converter, the merger and the inspector all use this module, so that they accept the
same models with the same messages. A model's folder has one of three layouts:

==============  ======================  ========================================================
component       diffusers layout        official layout
==============  ======================  ========================================================
transformer     ``transformer/``        ``high_noise_model/``; TI2V-5B: shards in the folder itself
transformer_2   ``transformer_2/``      ``low_noise_model/``
vae             ``vae/``                ``Wan2.1_VAE.pth``, ``Wan2.2_VAE.pth``
text_encoder    ``text_encoder/``       ``models_t5_umt5-xxl-enc-bf16.pth``
tokenizer       ``tokenizer/``          ``google/umt5-xxl/``
==============  ======================  ========================================================

or one file for each component, whose kind is detected from its content. Only headers and
configurations are read, without torch.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from onewan.errors import CheckpointError, combined
from onewan.formats.configs import ComponentKind
from onewan.formats.container import open_tensors, weight_files
from onewan.formats.untrusted import named, read_json
from onewan.formats.weights import (
    ComponentFile,
    detect_expert,
    expert_in_name,
    looks_like_adapter,
    open_component,
)
from onewan.variants import VARIANTS, ExpertName, Variant, same_inputs, variant_of

ComponentName = Literal["transformer", "transformer_2", "vae", "text_encoder", "tokenizer"]
"""diffusers' names of the components that have files."""

COMPONENT_NAMES: tuple[ComponentName, ...] = get_args(ComponentName)

KIND_OF: Mapping[ComponentName, ComponentKind] = {
    "transformer": "transformer",
    "transformer_2": "transformer",
    "vae": "vae",
    "text_encoder": "text_encoder",
}
"""The components that have weights, and the kind of weights that each needs."""

OFFICIAL_PATHS: Mapping[ComponentName, tuple[str, ...]] = {
    "transformer": ("high_noise_model",),
    "transformer_2": ("low_noise_model",),
    "vae": ("Wan2.[12]_VAE.safetensors", "Wan2.[12]_VAE.pth"),
    "text_encoder": ("models_t5_umt5-xxl-enc-*.safetensors", "models_t5_umt5-xxl-enc-*.pth"),
    "tokenizer": ("google/umt5-xxl",),
}
"""Patterns of the official layout, the preferred one first."""

ROOT_SHARDS = "diffusion_pytorch_model*.safetensors*"
"""The shards of TI2V-5B, which are in the model's folder itself."""

ExpertSource = Literal["header", "name", "folder"]
"""What the expert of a file was inferred from."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentDescription:
    """The facts about a component that are known without reading its weights."""

    path: Path
    kind: ComponentKind
    config: Mapping[str, Any]
    """Arguments of the diffusers or transformers class."""
    variant: Variant | None
    """None where several variants share the component."""
    expert: ExpertName | None = None
    """None if it is not a transformer, or may be either expert."""
    expert_source: ExpertSource | None = None
    file: ComponentFile | None
    """None where only the configuration of a hub repository was downloaded."""


def label(component: ComponentName) -> str:
    """The component's name for messages, with the noise level of an expert."""
    noise = {"transformer": " (high noise)", "transformer_2": " (low noise)"}
    return f"{component}{noise.get(component, '')}"


# ----------------------------------------------------------------------------------- finding


def find_components(folder: Path) -> dict[ComponentName, Path]:
    """The paths of the components of the whole model in `folder`; empty if it is not a model's
    folder. CheckpointError if there are two files for one component."""
    found: dict[ComponentName, Path] = {}
    if not folder.is_dir():
        return found
    for component, patterns in OFFICIAL_PATHS.items():
        if (folder / component).is_dir():
            found[component] = folder / component
        elif matches := [path for pattern in patterns for path in sorted(folder.glob(pattern))]:
            found[component] = matches[0]
    # Shards alone can be of any component. Beside other components they are TI2V-5B's transformer.
    if found and "transformer" not in found and any(folder.glob(ROOT_SHARDS)):
        found["transformer"] = folder
    if found.keys() - {"tokenizer"}:
        return found
    return {**_find_single_files(folder), **found}


def _find_single_files(folder: Path) -> dict[ComponentName, Path]:
    """The components of a folder with one file for each; empty if it is another kind of folder."""
    files = weight_files(folder)
    shards = any(folder.glob("*.safetensors.index*.json")) or all("-of-" in p.name for p in files)
    if shards or len(files) < 2:
        return {}
    refuse_folder_of_adapters(folder)
    paths: dict[ComponentName, Path] = {}
    for file in files:
        component = component_name(describe_component(file))
        if component in paths:
            raise CheckpointError(
                f"{folder}: holds two files of the {component} ({paths[component].name}, "
                f"{file.name}); give the path of one"
            )
        paths[component] = file
    return paths


def adapters_in(folder: Path) -> list[Path]:
    """The adapter files in `folder`, if it has several files of weights; empty otherwise."""
    files = weight_files(folder) if folder.is_dir() else []
    if len(files) < 2:
        return []
    found: list[Path] = []
    for file in files:
        with contextlib.suppress(CheckpointError):  # which is reported if it is a model's folder
            if looks_like_adapter(open_tensors(file)):
                found.append(file)
    return found


def refuse_folder_of_adapters(folder: Path) -> None:
    """CheckpointError if `folder` holds several files of weights, with adapters among them."""
    if files := adapters_in(folder):
        names = named([path.name for path in files])
        raise CheckpointError(
            f"{folder}: is a folder of {len(files)} LoRAs ({names}); give the path of one file"
        )


# -------------------------------------------------------------------------------- describing


def describe_component(path: Path) -> ComponentDescription:
    """The component at `path`. CheckpointError if it is not one of Wan 2.2."""
    file = open_component(path)
    expert, source = expert_of(file)
    return ComponentDescription(
        path=path,
        kind=file.kind,
        config=file.config,
        variant=file.variant,
        expert=expert,
        expert_source=source,
        file=file,
    )


def expert_of(file: ComponentFile) -> tuple[ExpertName | None, ExpertSource | None]:
    """(the expert that a transformer is, what that was inferred from): its header, its name, or
    diffusers' name of its folder."""
    if file.kind != "transformer" or file.variant is None:
        return None, None
    if len(file.variant.experts) == 1:
        return "single", None
    path = file.path.absolute()
    if detected := detect_expert(path, file.file.metadata):
        return detected
    by_folder: dict[str, ExpertName] = {e.component: e.name for e in file.variant.experts}
    expert = by_folder.get(path.name) if path.is_dir() else None
    return expert, None if expert is None else "folder"


def describe_components(
    paths: Mapping[ComponentName, Path], needed: Collection[str] | None = None
) -> dict[ComponentName, ComponentDescription]:
    """The components with weights among `paths`; CheckpointError lists all that can't be read.

    Components that are not `needed` (None: all are) are described from their configuration if their
    weights were not downloaded, and left out if the variant does not follow from it.
    """

    def describe(component: ComponentName) -> ComponentDescription | None:
        path = paths[component]
        weights = ("safetensors", "gguf")
        downloaded = not path.is_dir() or any(p for s in weights for p in path.glob(f"*.{s}"))
        if downloaded or needed is None or component in needed:
            return describe_component(path)
        file = path / "config.json"
        if KIND_OF[component] != "transformer" or not file.is_file():
            return None
        config = read_json(file)
        config = {"in_channels": config.get("in_dim"), **config}  # `in_dim` is the official key
        variant = variant_of(config, str(file))
        return ComponentDescription(
            path=path, kind="transformer", config=config, variant=variant, file=None
        )

    described = for_each(describe, [name for name in KIND_OF if name in paths])
    return {name: found for name, found in described.items() if found is not None}


def component_name(described: ComponentDescription) -> ComponentName:
    """The name of a component in a model; CheckpointError if it is an expert and neither header nor
    name says which."""
    if described.kind != "transformer":
        return described.kind
    variant = described.variant
    if variant is None or len(variant.experts) == 1:
        return "transformer"
    if described.expert is None:
        raise CheckpointError(
            f"{described.path}: is one of the two experts of {variant.name}, and neither its "
            "header nor its name says which; give it as model.transformer (high noise) or "
            "model.transformer_2 (low noise)"
        )
    return variant.expert(described.expert).component


# -------------------------------------------------------------------------------- checking


def infer_variant(components: Mapping[ComponentName, ComponentDescription]) -> Variant | None:
    """The variant of the transformers, or else of the VAE; None if it does not follow from them."""
    for name in ("transformer", "transformer_2", "vae"):
        if name in components and (variant := components[name].variant) is not None:
            return variant
    return None


def missing_components(found: Collection[str], variant: Variant) -> list[ComponentName]:
    """The components of a whole model of `variant` that are not in `found`."""
    unused = {"transformer_2"} if len(variant.experts) == 1 else set[str]()
    return [name for name in COMPONENT_NAMES if name not in found and name not in unused]


def model_problems(
    name: str,
    components: Mapping[ComponentName, ComponentDescription],
    requested: Variant | None = None,
    *,
    check_file_names: bool = True,
) -> list[str]:
    """Why `components` are not one model of the `requested` variant (None: of any one variant).

    `name` is that of the model for messages. With `check_file_names`, a file that is named as the
    other expert is a problem. Missing components are no problem here (`missing_components`).
    """
    if wrong := list(_wrong_kinds(components)):
        return wrong  # the checks below compare the configurations of the right kinds
    variant = requested or infer_variant(components)
    if variant is None:
        return [
            f"{name}: has no transformer, so its variant is unknown; name the variant "
            f"({', '.join(VARIANTS)}), or use its components one by one"
        ]
    problems = [
        *_transformer_problems(components, variant, requested is not None),
        *_vae_problems(components, variant),
    ]
    if check_file_names and len(variant.experts) == 2:
        problems += _file_name_problems(components)
    return problems


def _wrong_kinds(components: Mapping[ComponentName, ComponentDescription]) -> Iterator[str]:
    for name, component in components.items():
        if component.kind != KIND_OF[name]:
            yield (
                f"{component.path}: is used as {label(name)}, but holds a "
                f"{component.kind.replace('_', ' ')}; give it as model.{component.kind}"
            )


def _transformer_problems(
    components: Mapping[ComponentName, ComponentDescription], variant: Variant, requested: bool
) -> Iterator[str]:
    """Transformers of another variant than `variant`, or for another width than that of the text
    encoder."""
    text = components.get("text_encoder")
    for name, component in components.items():
        if component.kind != "transformer":
            continue
        found = component.variant
        if found is not None and not same_inputs(found, variant):
            instead = f", or set model.variant to {found.name}" if requested else ""
            yield (
                f"{component.path}: is a transformer of {found.name} ({found.in_channels} input "
                f"channels), but {variant.name} has {variant.in_channels}; use one of "
                f"{variant.name}{instead}"
            )
        elif name == "transformer_2" and len(variant.experts) == 1:
            yield (
                f"{component.path}: is used as {label(name)}, but {variant.name} has one "
                "transformer; leave it out"
            )
        width = component.config.get("text_dim")
        if text is not None and width is not None and text.config.get("d_model") != width:
            yield (
                f"{text.path}: is a text encoder of width {text.config.get('d_model')}, but "
                f"{component.path} takes text of width {width}; use components of one model"
            )


def _vae_problems(
    components: Mapping[ComponentName, ComponentDescription], variant: Variant
) -> Iterator[str]:
    vae = components.get("vae")
    channels = variant.latent_channels if vae is None else vae.config.get("z_dim", 16)
    if vae is not None and channels != variant.latent_channels:
        yield (
            f"{vae.path}: is a VAE with {channels} latent channels, but {variant.name} needs "
            f"{variant.latent_channels}; the A14B models use the Wan 2.1 VAE (16), TI2V-5B the "
            "Wan 2.2 VAE (48)"
        )


def _file_name_problems(components: Mapping[ComponentName, ComponentDescription]) -> Iterator[str]:
    """Experts that are named as the other one, and a file that is used for both. The files of both
    have the same keys and shapes, so only names can show a mistake."""
    paths = Counter[Path]()
    experts: tuple[tuple[ComponentName, str], ...] = (
        ("transformer", "high"),
        ("transformer_2", "low"),
    )
    for name, noise in experts:
        component = components.get(name)
        if component is None:
            continue
        paths[component.path] += 1
        files = component.file.file.files if component.file else ()
        named = {expert_in_name(path) for path in (component.path, *files)} - {None, noise}
        if named:
            yield (
                f"{component.path}: is used as {label(name)}, but is named as the "
                f"{named.pop()}-noise expert; swap the two, or set model.check_file_names to false "
                "if the name is wrong"
            )
    for path, count in paths.items():
        if count > 1:
            yield (
                f"{path}: is used for both experts; give each its own, or set "
                "model.check_file_names to false"
            )


# ------------------------------------------------------------------------- collecting errors


def raise_problems(problems: Iterable[str]) -> None:
    """CheckpointError with a line for each of `problems`, without duplicates; does nothing if there
    are none."""
    if found := sorted(set(problems)):
        raise combined(CheckpointError, found)


def for_each(
    function: Callable[[ComponentName], _T], names: Iterable[ComponentName]
) -> dict[ComponentName, _T]:
    """The results of `function` by name; one CheckpointError with the messages of all that fail, so
    that the user can correct them at once."""
    results: dict[ComponentName, _T] = {}
    problems: list[str] = []
    for name in names:
        try:
            results[name] = function(name)
        except CheckpointError as error:  # noqa: PERF203  (all errors are wanted)
            problems += error.details or [error.message]
    raise_problems(problems)
    return results
