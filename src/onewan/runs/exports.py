"""Which exported weights a run has: complete sets of files, by step and of the best step.

Reads names in the run's folder alone, under the names that `onewan.train.export` writes; of a
folder that was renamed too, whose files have the run's former name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onewan.config.method import EmbeddingMethod, FineTuneMethod
from onewan.config.resolve import trained_experts
from onewan.config.schema import ResolvedRun
from onewan.errors import CheckpointError
from onewan.runs.layout import RunLayout, displayed, step_name
from onewan.variants import ExpertName

WeightsChoice = int | Literal["newest", "best"]
_SHOWN_STEPS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedWeights:
    """One file for each expert and embedding that the run trains: all of one step, or of each the
    best by its own validation loss."""

    label: str
    """``step 2000`` or ``best``."""
    short_label: str
    """``002000`` or ``best``, as in the names of the files."""
    experts: Mapping[ExpertName, Path]
    """Adapters, or whole transformers of full fine-tuning (of diffusers' layout: folders)."""
    embeddings: Mapping[str, Path]
    """By the name of the embedding."""

    @property
    def files(self) -> dict[str, Path]:
        """All files, by expert and by name of the embedding."""
        return {**self.experts, **self.embeddings}


def exported_weights(
    config: ResolvedRun, layout: RunLayout, *, averaged: bool = False
) -> dict[int, ExportedWeights]:
    """The complete sets by step, ascending; those with the moving average if `averaged`."""
    found: dict[int, ExportedWeights] = {}
    for step, files in layout.exported().items():
        name = step_name(step)
        complete = _complete(config, files, name, f"step {step}", averaged=averaged)
        if complete is not None:
            found[step] = complete
    return found


def best_weights(
    config: ResolvedRun, layout: RunLayout, *, averaged: bool = False
) -> ExportedWeights | None:
    """The files with the lowest validation losses, if the run has all of them."""
    files = sorted(layout.weights_dir.glob("*best*"))
    return _complete(config, files, "best", "best", averaged=averaged)


def choose_weights(
    config: ResolvedRun, layout: RunLayout, choice: WeightsChoice, *, averaged: bool = False
) -> ExportedWeights:
    """The set that `choice` names: a step, the newest one or the best one.

    CheckpointError, which says what there is, if the run has no such set.
    """
    if averaged and config.train.ema is None:
        raise CheckpointError(
            f"{displayed(layout.root)}: has no moving average of its weights (train.ema is null); "
            "leave --ema out"
        )
    steps = exported_weights(config, layout, averaged=averaged)
    best = best_weights(config, layout, averaged=averaged)
    if choice == "best":
        chosen = best
    elif choice == "newest":
        chosen = steps[max(steps)] if steps else None
    else:
        chosen = steps.get(choice)
    if chosen is not None:
        return chosen
    folder = displayed(layout.weights_dir)
    if not steps and best is None:
        raise CheckpointError(
            f"{folder}: holds no complete exported weights yet; train further, or take the base "
            "model with --weights none"
        )
    names = {"best": "the best validation loss", "newest": "a single step"}
    wanted = f"step {choice}" if isinstance(choice, int) else names[choice]
    raise CheckpointError(f"{folder}: holds no weights of {wanted}; it has {_listed(steps, best)}")


def _listed(steps: Mapping[int, ExportedWeights], best: ExportedWeights | None) -> str:
    shown = [str(step) for step in steps][-_SHOWN_STEPS:]
    more = ["..."] if len(steps) > len(shown) else []
    names = [*more, *shown, *(["best"] if best is not None else [])]
    return f"those of {', '.join(names)} (--weights {names[-1]})"


def _complete(
    config: ResolvedRun, files: list[Path], name: str, label: str, *, averaged: bool
) -> ExportedWeights | None:
    """The files among `files`, whose names have `name`, as a set; None if one is missing."""
    end = "_ema" if averaged else ""
    embeddings = {
        section.name: _named(files, f"{name}_{section.name}{end}.safetensors")
        for section in config.embeddings
        if section.train
    }
    only_embeddings = isinstance(config.method, EmbeddingMethod)
    experts = () if only_embeddings else trained_experts(config)
    for format_end in _format_ends(config):
        transformers: dict[ExpertName, Path | None] = {
            expert.name: _named(files, f"{name}{expert.file_suffix}{end}{format_end}")
            for expert in experts
        }
        if all((*transformers.values(), *embeddings.values())):
            return ExportedWeights(
                label=label,
                short_label=name,
                experts={n: path for n, path in transformers.items() if path is not None},
                embeddings={n: path for n, path in embeddings.items() if path is not None},
            )
    return None


def _format_ends(config: ResolvedRun) -> Iterator[str]:
    """The ends of the names of an expert's files, one for each exported format."""
    formats = config.output.formats
    for fmt in formats:
        is_folder = isinstance(config.method, FineTuneMethod) and fmt != "comfyui"
        part = f"_{fmt}" if len(formats) > 1 else ""
        yield f"{part}{'' if is_folder else '.safetensors'}"


def _named(files: list[Path], end: str) -> Path | None:
    """The file whose name is `end`, or the run's name before it."""
    return next((f for f in files if f.name == end or f.name.endswith(f"_{end}")), None)
