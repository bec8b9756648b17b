"""Where each component of a model lies: in a folder, in a file, in a repository on the hub.

==============  ======================  ========================================================
component       diffusers layout        official layout
==============  ======================  ========================================================
transformer     ``transformer/``        ``high_noise_model/``; TI2V-5B: shards in the folder itself
transformer_2   ``transformer_2/``      ``low_noise_model/``
vae             ``vae/``                ``Wan2.1_VAE.pth``, ``Wan2.2_VAE.pth``
text_encoder    ``text_encoder/``       ``models_t5_umt5-xxl-enc-bf16.pth``
tokenizer       ``tokenizer/``          ``google/umt5-xxl/``
==============  ======================  ========================================================

A third layout is a folder of single files, one for each component, told apart by what they hold. A
component can also be given by itself: as a file, as a folder that holds it alone, or as any of
the above, from which it is then taken. What the files hold is for the loader to check.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from onewan.errors import CheckpointError
from onewan.formats.backends import first_line
from onewan.formats.weights import ComponentFile, detect_expert, open_component
from onewan.variants import Variant

ComponentName = Literal["transformer", "transformer_2", "vae", "text_encoder", "tokenizer"]
PipelineComponent: TypeAlias = ComponentName | Literal["scheduler"]
ModelSource: TypeAlias = str | Path | Mapping[str, str | Path]
"""A path or hub repository for everything; or one by component, under ``path`` for all others."""

COMPONENT_NAMES: tuple[ComponentName, ...] = get_args(ComponentName)
ENCODERS: tuple[ComponentName, ...] = ("vae", "text_encoder", "tokenizer")
"""What turns clips and captions into entries."""

_OFFICIAL: Mapping[ComponentName, tuple[str, ...]] = {
    "transformer": ("high_noise_model",),
    "transformer_2": ("low_noise_model",),
    "vae": ("Wan2.[12]_VAE.safetensors", "Wan2.[12]_VAE.pth"),
    "text_encoder": ("models_t5_umt5-xxl-enc-*.safetensors", "models_t5_umt5-xxl-enc-*.pth"),
    "tokenizer": ("google/umt5-xxl",),
}
_ROOT_SHARDS = "diffusion_pytorch_model*.safetensors*"

_ON_THE_HUB: Mapping[ComponentName, tuple[str, ...]] = {
    "transformer": ("transformer/*", "high_noise_model/*", _ROOT_SHARDS),
    "transformer_2": ("transformer_2/*", "low_noise_model/*"),
    "vae": ("vae/*", *_OFFICIAL["vae"]),
    "text_encoder": ("text_encoder/*", *_OFFICIAL["text_encoder"]),
    "tokenizer": ("tokenizer*", "google/umt5-xxl/*", "spiece.model", "*_map.json"),
}
"""Patterns of the files of each component, in either layout; ``*`` goes across folders."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where the components are; what was given decides, not whether it is any good."""

    name: str
    """What was given, for messages and for the metadata of exported files."""
    paths: Mapping[ComponentName, Path]
    """Files and folders. A tokenizer that was not given has the place of the text encoder, whose
    file may carry it."""
    whole: Path | None = None
    """The folder of a whole model, if one was given."""
    notices: tuple[str, ...] = ()
    """What was concluded and should be known."""

    def require(self, components: Collection[PipelineComponent], variant: Variant) -> None:
        """CheckpointError that names all of `components` that have no place."""
        lacking: list[ComponentName] = [
            c for c in COMPONENT_NAMES if c in components and self.paths.get(c) is None
        ]
        if not lacking:
            return
        hint = ""
        if len(variant.experts) == 2 and "transformer_2" in lacking:
            alone = " (with transformer alone this is a Wan 2.1 model, or half of one)"
            hint = f"; {variant.name} has two experts{alone if 'transformer' in self.paths else ''}"
        raise CheckpointError(
            f"{self.name}: has no {', '.join(lacking)}; give a path for "
            f"{' and '.join(map(field_name, lacking))}, or a whole model{hint}"
        )


def field_name(component: PipelineComponent) -> str:
    """The field of the run file for a component, with what it means."""
    noise = {"transformer": " (high noise)", "transformer_2": " (low noise)"}
    return f"model.{component}{noise.get(component, '')}"


def locate(source: ModelSource, components: Collection[PipelineComponent] | None = None) -> Sources:
    """The paths of the components of `source`, after fetching what is needed of hub repositories.

    `components` are needed (None: all); others have a place too if they lie on this machine.
    CheckpointError for a path that is not there, and for an expert that may be either.
    """
    given = dict(source) if isinstance(source, Mapping) else {"path": source}
    if unknown := sorted(given.keys() - {"path", *COMPONENT_NAMES}):
        raise CheckpointError(
            f"model: has no {unknown[0]}; known are path, {', '.join(COMPONENT_NAMES)}"
        )
    needed: set[str] = set(COMPONENT_NAMES if components is None else components)
    paths: dict[ComponentName, Path] = {}
    for component in COMPONENT_NAMES:
        if component in given:
            value = given[component]
            if component in needed or Path(value).expanduser().exists():
                paths[component] = _of_component(value, component)
    whole, notices = None, ()
    if "path" in given:
        rest: list[ComponentName] = [c for c in COMPONENT_NAMES if c in needed - given.keys()]
        path = _on_this_machine(given["path"], rest)
        found = layout(path)
        if found:
            whole = path
        else:
            found, notices = _alone(path)
        paths = {**{c: p for c, p in found.items() if c not in given}, **paths}
    if "text_encoder" in paths:
        paths.setdefault("tokenizer", paths["text_encoder"])
    name = given.get("path") or next(iter(given.values()), "")
    return Sources(name=str(name), paths=paths, whole=whole, notices=notices)


def layout(folder: Path) -> dict[ComponentName, Path]:
    """The components in `folder` if that is a whole model, else none: in one of the two layouts, or
    as single files side by side, as ComfyUI's users have them."""
    found: dict[ComponentName, Path] = {}
    if not folder.is_dir():
        return found
    for component, patterns in _OFFICIAL.items():
        if (folder / component).is_dir():
            found[component] = folder / component
        elif there := [path for pattern in patterns for path in sorted(folder.glob(pattern))]:
            found[component] = there[0]
    # By itself, a folder of shards can be any component.
    if found and "transformer" not in found and any(folder.glob(_ROOT_SHARDS)):
        found["transformer"] = folder
    return found if found.keys() - {"tokenizer"} else {**_singles(folder), **found}


def _singles(folder: Path) -> dict[ComponentName, Path]:
    """The components of a folder with one file for each; none if it is of another kind."""
    files = sorted(p for s in ("safetensors", "gguf", "pth") for p in folder.glob(f"*.{s}"))
    shards = any(folder.glob("*.safetensors.index*.json")) or all("-of-" in p.name for p in files)
    if shards or len(files) < 2:
        return {}
    paths: dict[ComponentName, Path] = {}
    for file in files:
        component, _ = _slot(open_component(file))
        if component in paths:
            raise CheckpointError(
                f"{folder}: holds two files of the {component} ({paths[component].name}, "
                f"{file.name}); give the path of one"
            )
        paths[component] = file
    return paths


def _of_component(value: str | Path, component: ComponentName) -> Path:
    """The place of a component that was given by itself."""
    path = _on_this_machine(value, [component])
    found = layout(path)
    if found and component not in found:
        raise CheckpointError(
            f"{value}: was given as model.{component}, and holds only {', '.join(found)}; "
            "give another path"
        )
    return found.get(component, path)


def _alone(path: Path) -> tuple[dict[ComponentName, Path], tuple[str, ...]]:
    """The one component at `path`, and what had to be concluded to tell which it is."""
    component, told_by = _slot(open_component(path))
    if told_by != "name":
        return {component: path}, ()
    other = "transformer_2" if component == "transformer" else "transformer"
    notice = (
        f"{path}: taken for {field_name(component)} by its name; if it is the other expert, give "
        f"it as model.{other}"
    )
    return {component: path}, (notice,)


def _slot(weights: ComponentFile) -> tuple[ComponentName, str]:
    """The component that `weights` are, and what told it: ``shapes``, ``header`` or ``name``."""
    if weights.kind != "transformer":
        return weights.kind, "shapes"
    if weights.variant is None or len(weights.variant.experts) == 1:
        return "transformer", "shapes"
    told = detect_expert(weights.path, weights.file.metadata)
    if told is None:
        raise CheckpointError(
            f"{weights.path}: is one of the two experts of {weights.variant.name}, and its name "
            "does not say which; give it as model.transformer (high noise) or model.transformer_2 "
            "(low noise)"
        )
    return weights.variant.expert(told[0]).component, told[1]


def _on_this_machine(value: str | Path, components: Collection[ComponentName]) -> Path:
    """`value` itself, or the folder into which its files for `components` were fetched."""
    path = Path(value).expanduser()
    if path.exists():
        return path
    text = str(value)
    here = path.is_absolute() or text.startswith((".", "~")) or "\\" in text
    if here or text.count("/") != 1 or path.suffix in (".safetensors", ".gguf", ".pth", ".pt"):
        raise CheckpointError(
            f"{value}: there is no such file or folder, and it is not the name of a repository on "
            "the hub (OWNER/NAME); correct it"
        )
    # The configurations of all components are small and tell the variant.
    patterns = ["*.json", *(p for c in components for p in _ON_THE_HUB[c])]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{value}: is neither a file or folder here nor a repository that could be downloaded "
            f"({first_line(error)}); check the name and the connection"
        ) from error


def fingerprint(place: Path) -> str:
    """A digest of the file, or of the files in the folder, by which cached results are keyed.

    Files up to 64 MiB count whole. Of larger ones the size, the first MiB (safetensors header) and
    255 pieces of 64 KiB spread over the file count: another training of the same architecture
    differs in nearly every piece, and 11 GB need not be read for it.
    """
    digest = hashlib.blake2b(digest_size=16)
    paths = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
    for path in paths:
        size = path.stat().st_size
        name = path.relative_to(place).as_posix()  # "." for a file: its name makes no difference
        digest.update(f"{name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= 64 << 20:
                digest.update(file.read())
                continue
            digest.update(file.read(1 << 20))
            for piece in range(1, 256):
                file.seek(size * piece // 256)
                digest.update(file.read(64 << 10))
    return digest.hexdigest()
