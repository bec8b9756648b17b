"""A run file made from a request: its model's files found, its values fitted to a device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from onewan.errors import ConfigError
from onewan.presets.fitting import fitted
from onewan.presets.model_files import find_model_files
from onewan.presets.starter import StarterRequest, starter


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A run file to start from."""

    text: str
    request: StarterRequest
    """What was asked for, with the files that were found and the values that fit."""
    notes: tuple[str, ...]
    """Which of the model's files were passed over, and why."""


def make(
    request: StarterRequest,
    folder: Path,
    *,
    models: Path | None = None,
    vram: int | None = None,
    ram: int | None = None,
) -> Made:
    """The run file for `request`, which will be in `folder`.

    With `models`, the folder of ComfyUI's models, it names the files in there; with `vram` its
    values fit a device of that many bytes, and a host of `ram` bytes (None: this one). ConfigError
    for what can't be trained, CheckpointError if there are no models, MemoryPlanError if not even
    the smallest values fit.
    """
    if problem := request.problem():
        raise ConfigError("the request", [problem])
    notes: tuple[str, ...] = ()
    if models is not None:
        found = find_model_files(models, request.facts)
        shown = path_from(folder, found.folder)
        request = replace(request, models=found.paths, models_folder=shown)
        notes = found.notes
    if vram is not None:
        values, _ = fitted(request, vram, ram)
        request = replace(request, fitted=values)
    paths = {name: Path(path_from(folder, path)) for name, path in request.models.items()}
    return Made(text=starter(replace(request, models=paths)), request=request, notes=notes)


def path_from(folder: Path, path: Path) -> str:
    """`path` as a run file in `folder` names it: relative where it lies in there."""
    return (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()
