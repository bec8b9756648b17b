"""Finds the path of each component of a model, and downloads what is on the hub.

A component can be given by itself (a file, or a folder of its own) or as part of a whole model's
folder, in any layout of `onewan.formats.model_folder`. The loader checks the content of the files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from onewan.errors import CheckpointError
from onewan.files import check_input, moved_aside
from onewan.formats.model_folder import (
    COMPONENT_NAMES,
    OFFICIAL_PATHS,
    ROOT_SHARDS,
    ComponentName,
    component_name,
    describe_component,
    find_components,
    label,
)
from onewan.formats.untrusted import first_line
from onewan.variants import Variant

PipelineComponent: TypeAlias = ComponentName | Literal["scheduler"]
ModelSource: TypeAlias = str | Path | Mapping[str, str | Path]
"""A path or hub repository for all components, or a mapping from component names to these, with
``path`` for the components that are not listed."""

ENCODERS: tuple[ComponentName, ...] = ("vae", "text_encoder", "tokenizer")
"""The components that encode clips and captions."""

_HUB_PATTERNS: Mapping[ComponentName, tuple[str, ...]] = {
    "transformer": ("transformer/*", "high_noise_model/*", ROOT_SHARDS),
    "transformer_2": ("transformer_2/*", "low_noise_model/*"),
    "vae": ("vae/*", *OFFICIAL_PATHS["vae"]),
    "text_encoder": ("text_encoder/*", *OFFICIAL_PATHS["text_encoder"]),
    "tokenizer": ("tokenizer*", "google/umt5-xxl/*", "spiece.model", "*_map.json"),
}
"""Patterns of the files of each component, in both layouts; ``*`` also matches slashes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """The path of each component, determined without opening weights where the user named it."""

    name: str
    """The source as the user gave it, for messages and for the metadata of exported files."""
    paths: Mapping[ComponentName, Path]
    """Files and folders. A tokenizer that was not given gets the path of the text encoder, whose
    file may contain one."""
    whole: Path | None = None
    """The folder of a whole model, if one was given."""
    notices: tuple[str, ...] = ()
    """What was inferred, for the user."""

    def require(self, components: Collection[PipelineComponent], variant: Variant) -> None:
        """CheckpointError that names all of `components` that have no path."""
        missing: list[ComponentName] = [
            c for c in COMPONENT_NAMES if c in components and self.paths.get(c) is None
        ]
        if not missing:
            return
        # The files of a Wan 2.1 14B model are those of one expert, so this is a likely mistake.
        hint = ""
        if len(variant.experts) == 2 and "transformer_2" in missing:
            alone = " (with transformer alone this is a Wan 2.1 model, or half of one)"
            hint = f"; {variant.name} has two experts{alone if 'transformer' in self.paths else ''}"
        raise CheckpointError(
            f"{self.name}: has no {', '.join(missing)}; give a path for "
            f"{' and '.join(f'model.{label(c)}' for c in missing)}, or a whole model{hint}"
        )


def locate(
    source: ModelSource,
    components: Collection[PipelineComponent] | None = None,
    *,
    download: bool = True,
) -> Sources:
    """The paths of the components of `source`, after downloading what is needed from the hub;
    without `download`, what is on the hub and was not downloaded before has no path.

    `components` are the needed ones (None: all); others get a path too if they are on this machine.
    CheckpointError for a path that does not exist, and for an expert that may be either.
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
            # A wrong path is reported even if it is not needed.
            is_looked_for = component in needed or is_here(value) or not may_be_repository(value)
            own = _component_path(value, component, download=download) if is_looked_for else None
            if own is not None:
                paths[component] = own
    whole, notices = None, ()
    if "path" in given:
        others: list[ComponentName] = [c for c in COMPONENT_NAMES if c in needed - given.keys()]
        path = _local_path(given["path"], others, download=download)
        found: Mapping[ComponentName, Path] = {} if path is None else find_components(path)
        if found:
            whole = path
        elif path is not None:
            found, notices = _single_component(path)
        paths = {**{c: p for c, p in found.items() if c not in given}, **paths}
    if "text_encoder" in paths:
        paths.setdefault("tokenizer", paths["text_encoder"])
    name = given.get("path") or next(iter(given.values()), "")
    return Sources(name=str(name), paths=paths, whole=whole, notices=notices)


def _component_path(value: str | Path, component: ComponentName, *, download: bool) -> Path | None:
    """The path of a component that was given by itself."""
    path = _local_path(value, [component], download=download)
    if path is None:
        return None
    found = find_components(path)
    if found and component not in found:
        raise CheckpointError(
            f"{value}: is used as model.{component}, but contains only {', '.join(found)}; "
            "give another path"
        )
    return found.get(component, path)


def _single_component(path: Path) -> tuple[dict[ComponentName, Path], tuple[str, ...]]:
    """The one component at `path`, and a notice if only its name says which expert it is."""
    described = describe_component(path)
    component = component_name(described)
    if described.expert_source not in ("name", "folder"):
        return {component: path}, ()
    other = "transformer_2" if component == "transformer" else "transformer"
    notice = (
        f"{path}: is used as model.{label(component)} because of its {described.expert_source}; if "
        f"it is the other expert, give it as model.{other}"
    )
    return {component: path}, (notice,)


def _local_path(
    value: str | Path, components: Collection[ComponentName], *, download: bool
) -> Path | None:
    """`value` itself, or the folder into which its files for `components` were downloaded; None if
    they were not, without `download`."""
    path = Path(value).expanduser()
    if path.exists():
        return path
    # A mistyped path is reported as such, instead of as a repository that does not exist.
    text = str(value)
    if aside := moved_aside(path):
        raise CheckpointError(
            f"{value}: there is no such file; rename {aside} back, where a killed process left it"
        )
    if not may_be_repository(value):
        raise CheckpointError(
            f"{value}: there is no such file or folder, and it is not a repository name of the hub "
            "(OWNER/NAME); correct it"
        )
    # The configurations of all components are small, and the variant is inferred from them.
    patterns = ["*.json", *(p for c in components for p in _HUB_PATTERNS[c])]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns, local_files_only=not download))
    except LocalEntryNotFoundError as error:
        if not download:
            return None
        raise _not_downloaded(value, error) from error
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise _not_downloaded(value, error) from error


def _not_downloaded(value: str | Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{value}: is neither a file or folder here nor a repository that could be downloaded "
        f"({first_line(error)}); check the name and the connection"
    )


def is_here(value: str | Path) -> bool:
    """Whether `value`, a path or a repository of the hub, is a file or folder of this machine."""
    return Path(value).expanduser().exists()


def may_be_repository(value: str | Path) -> bool:
    """Whether `value`, which does not exist here, may be the name of a repository of the hub
    (OWNER/NAME)."""
    text, path = str(value), Path(value).expanduser()
    is_path = path.is_absolute() or text.startswith((".", "~")) or "\\" in text
    is_file = path.suffix in (".safetensors", ".gguf", ".pth", ".pt")
    return not is_path and not is_file and text.count("/") == 1


def fingerprint(path: Path) -> str:
    """A digest of a file, or of the files in a folder, for cache keys.

    Files up to 64 MiB are read completely. For larger ones it covers the size, the first MiB (the
    safetensors header) and 255 pieces of 64 KiB spread over the file: another fine-tune of the same
    architecture differs in nearly every piece, and reading 11 GB is avoided.
    """
    digest = hashlib.blake2b(digest_size=16)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for member in files:
        size = check_input(member).stat().st_size
        name = member.relative_to(path).as_posix()  # "." for a file: its name makes no difference
        digest.update(f"{name}\0{size}\0".encode())
        with member.open("rb") as file:
            if size <= 64 << 20:
                digest.update(file.read())
                continue
            digest.update(file.read(1 << 20))
            for piece in range(1, 256):
                file.seek(size * piece // 256)
                digest.update(file.read(64 << 10))
    return digest.hexdigest()
