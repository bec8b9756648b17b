"""`ExportChoices`: which weights of a run can be exported and in which formats, and the files that
are exported already, for programs that offer them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onewan.config.load import load_run
from onewan.config.method import AdapterMethod
from onewan.files import total_bytes
from onewan.runs import steering
from onewan.runs.layout import RunLayout

ADAPTER_FORMATS: Mapping[str, str] = {
    "comfyui": "ComfyUI, diffusers, musubi-tuner, DiffSynth-Studio",
    "no_alpha": "as comfyui, and also ai-toolkit and diffusion-pipe",
    "diffusers": "diffusers",
    "kohya": "ComfyUI, diffusers, musubi-tuner",
}
"""Which programs read the key formats of exported adapters."""
MODEL_FORMATS: Mapping[str, str] = {
    "comfyui": "ComfyUI: one file",
    "diffusers": "diffusers: a folder",
}
"""The same for whole transformers."""
NOW = "now"
"""The choice of the weights that are trained at the moment."""
_NEWEST_STEPS = 3
"""Steps whose exported files are listed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportChoices:
    """What of a run can be exported, and what is."""

    weights: Mapping[int | str, str]
    """`NOW` while the run is trained, and the steps of saved states, each in words."""
    formats: Mapping[str, str]
    """Each with the programs that read it."""
    own_format: str
    """The first format of the run's settings."""
    files: tuple[tuple[Path, int], ...]
    """The newest exported files, and those of the best weights, with their bytes."""

    @classmethod
    def of(cls, layout: RunLayout) -> ExportChoices:
        """ConfigError if the run's settings can't be read."""
        config = load_run(layout.root)
        weights: dict[int | str, str] = {}
        if steering.is_running(layout):
            weights[NOW] = "of the step that is trained now, in the run's own formats"
        weights |= {step: f"of the state of step {step:,}" for step in layout.saved_steps()[::-1]}
        formats = ADAPTER_FORMATS if isinstance(config.method, AdapterMethod) else MODEL_FORMATS
        exported = layout.exported()
        paths = [path for step in [*exported][-_NEWEST_STEPS:] for path in exported[step]]
        paths += sorted(layout.weights_dir.glob("*_best_*"))
        return cls(
            weights=weights,
            formats={name: f"{name} ({readers})" for name, readers in formats.items()},
            own_format=config.output.formats[0],
            files=tuple((path, total_bytes(path)) for path in dict.fromkeys(paths)),
        )


def export_arguments(layout: RunLayout, step: int, key_format: str) -> list[str]:
    """The arguments for onewan that export the state of a step, also where its files exist."""
    options = ["--step", str(step), "--format", key_format, "--force"]
    return ["export", str(layout.root), *options]
