"""Finds the files of a variant in the folders of ComfyUI, for `onewan init --models`.

A file that has the name of ComfyUI's template is taken; where there is none, the headers of the
others tell what they are. Reads headers only, without torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from onewan.errors import CheckpointError
from onewan.formats.model_folder import ComponentDescription, ComponentName, describe_component
from onewan.formats.untrusted import named
from onewan.presets.starter import COMFYUI_FILES
from onewan.runs.layout import displayed
from onewan.variants import Variant

_FOLDERS: Mapping[ComponentName, tuple[str, ...]] = {
    "transformer": ("diffusion_models", "unet"),
    "transformer_2": ("diffusion_models", "unet"),
    "vae": ("vae",),
    "text_encoder": ("text_encoders", "clip"),
}
"""Folders of ComfyUI/models, the present name before the old one."""

_SUFFIXES = (".safetensors", ".gguf")


@dataclass(frozen=True, slots=True)
class FoundModel:
    """The files of a variant in a folder."""

    folder: Path
    """That of the models, absolute."""
    paths: Mapping[ComponentName, Path]
    """The components that were found, absolute."""
    notes: tuple[str, ...]
    """What was passed over, and why."""


def find_model_files(folder: Path, variant: Variant) -> FoundModel:
    """The files of `variant` in `folder`, which is ComfyUI/models, ComfyUI itself, or a folder with
    the files. CheckpointError if there is no such folder, or none of the files in it."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder; give that of ComfyUI's models")
    root = folder.absolute()
    if not any((root / name).is_dir() for names in _FOLDERS.values() for name in names):
        root = root / "models" if (root / "models").is_dir() else root
    paths: dict[ComponentName, Path] = {}
    notes = list[str]()
    for component, name in COMFYUI_FILES[variant.name].items():
        files = [*_files(root, component)]
        preferred = Path(name).name
        # By name first, so that the headers of other models need not be read.
        named_so = [file for file in files if file.name == preferred]
        others = [file for file in files if file.name != preferred]
        fitting = [f for f in named_so if _fits(f, component, variant, notes)]
        if not fitting:
            fitting = [f for f in others if _fits(f, component, variant)]
            if len(fitting) > 1:
                rest = named([str(file.relative_to(root)) for file in fitting[1:]])
                notes.append(f"{component}: also found, and not used: {rest}")
        if fitting:
            paths[component] = fitting[0]
    if not paths:
        expected = ", ".join(COMFYUI_FILES[variant.name].values())
        raise CheckpointError(
            f"{folder}: holds no files of {variant.name}; it should be ComfyUI/models with, for "
            f"example, {expected}"
        )
    return FoundModel(root, paths, tuple(notes))


def _files(root: Path, component: ComponentName) -> Iterator[Path]:
    """The files that may be this component: those in its folders, or in a `root` without any."""
    folders = [root / name for name in _FOLDERS[component] if (root / name).is_dir()]
    if not folders and not any((root / n).is_dir() for names in _FOLDERS.values() for n in names):
        folders = [root]
    for folder in folders:
        found = [file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES]
        # fp8 before others, since they are the smallest that stay as they are stored.
        yield from sorted(found, key=lambda file: ("fp8" not in file.name, str(file)))


def _fits(
    file: Path, component: ComponentName, variant: Variant, notes: list[str] | None = None
) -> bool:
    """Whether `file` is this component of `variant`. Why it can't be read goes to `notes`."""
    found = _description(file)
    if isinstance(found, CheckpointError):
        if notes is not None:
            notes.append(found.message)
        return False
    if found.kind != component.removesuffix("_2") or found.variant not in (None, variant):
        return False
    if found.kind == "vae" and found.config.get("z_dim", 16) != variant.latent_channels:
        return False
    expert = next((e for e in variant.experts if e.component == component), None)
    return expert is None or found.expert == expert.name


@cache
def _description(file: Path) -> ComponentDescription | CheckpointError:
    shown = displayed(file)  # messages name it as the user would
    try:
        return describe_component(shown)
    except CheckpointError as error:
        return error
    except OSError as error:
        return CheckpointError(f"{shown}: can't be read ({error.strerror})")
