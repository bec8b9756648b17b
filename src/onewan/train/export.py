"""Exports the weights of a run for other programs: one file for each trainable and format.

The exporter decides formats, names and headers; the trainables (`onewan.train.trainables`) only
return their tensors. With a moving average, each file has a second version with the averaged
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from onewan.adapters.lora import base_weight
from onewan.arithmetic.expert_schedule import ExpertSchedule
from onewan.checkpoint.convert import save_expert
from onewan.checkpoint.saver import AdapterHeader, WanModelSaver
from onewan.config.schema import ResolvedRun
from onewan.data.clip import count_clips
from onewan.dtypes import torch_dtype
from onewan.formats.lora import LoraFormat, WanShape
from onewan.formats.lora_writing import KIND_TITLES
from onewan.model.embedding import WanModelEmbedding
from onewan.runs.layout import RunLayout
from onewan.train.best import WEIGHT_SUFFIX, weights_name
from onewan.train.run import Run
from onewan.train.state import Trainable, TrainableName, TrainedExpert, TrainState, WeightSet
from onewan.train.trainables import AdapterTraining, EmbeddingTraining, ExpertMethod, FullFineTune
from onewan.variants import Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedFile:
    """One file, or folder, that the weights of a step are written to."""

    path: Path
    best_path: Path
    """Its name if the weights are the best of the run by validation."""
    trainable: TrainableName
    weights: str
    """`best.weights_name` of what is in it."""
    write: Callable[[Path], list[str]]
    """Writes it to a path; returns notices for the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exportable:
    """The weights of a run at a step, and what their files say of the run."""

    config: ResolvedRun
    variant: Variant
    state: TrainState
    schedule: ExpertSchedule
    dataset_digest: str
    clips: int | None
    """Number of training clips; None if it is not known."""
    resolution: tuple[int, int] | None
    """The largest size of a training clip; None if it is not known."""

    @classmethod
    def of(cls, run: Run) -> Exportable:
        """The present weights of a run that trains."""
        clips = run.dataset.clips
        return cls(
            config=run.config,
            variant=run.model.variant,
            state=run.state,
            schedule=run.schedule,
            dataset_digest=run.dataset.digest,
            clips=count_clips(clips),
            resolution=max(clip.size for clip in clips),
        )


def exported_files(
    run: Exportable, layout: RunLayout, *, format_in_name: bool = False
) -> Iterator[ExportedFile]:
    """All files for the weights of `run`; none is written yet. Their names have the format where
    there are several, or with `format_in_name`."""
    for trained in run.state.experts.values():
        if trained.trainable is not None and trained.method is not None:
            for weight_set in _weight_sets(trained.trainable):
                yield from _files_of_expert(
                    run, layout, trained, trained.trainable, weight_set, format_in_name
                )
    trainable = run.state.embeddings
    if trainable is not None and isinstance(trainable.weights, EmbeddingTraining):
        for weight_set in _weight_sets(trainable):
            for embedding in trainable.weights.embeddings:
                suffix = f"_{embedding.name}{WEIGHT_SUFFIX[weight_set]}"
                yield ExportedFile(
                    path=layout.weights(run.state.step, suffix),
                    best_path=layout.weights("best", suffix),
                    trainable=trainable.name,
                    weights=weights_name(trainable.name, weight_set),
                    write=partial(_write_embedding, run, trainable, weight_set, embedding),
                )


def _weight_sets(trainable: Trainable) -> tuple[WeightSet, ...]:
    return ("trained",) if trainable.ema is None else ("trained", "ema")


def _files_of_expert(
    run: Exportable,
    layout: RunLayout,
    trained: TrainedExpert,
    trainable: Trainable,
    weight_set: WeightSet,
    format_in_name: bool,
) -> Iterator[ExportedFile]:
    formats = run.config.output.formats
    suffix = trained.expert.file_suffix + WEIGHT_SUFFIX[weight_set]

    # The weights are read when the file is written: averages replace the trained weights for that
    # time only.
    def write(format: LoraFormat, path: Path) -> list[str]:
        facts = _facts(run, trainable, weight_set, trainable.lr)
        with trainable.using(weight_set), trained.whole() as is_here:
            if not is_here:
                return []
            if isinstance(trained.method, AdapterTraining):
                return _write_adapter(run, trained, trained.method, path, format, facts)
            return _write_expert(run, trained, path, format, facts)

    for fmt in formats:
        shown = fmt if len(formats) > 1 or format_in_name else None
        end = suffix, shown, _extension(trained.method, fmt)
        yield ExportedFile(
            path=layout.weights(run.state.step, *end),
            best_path=layout.weights("best", *end),
            trainable=trainable.name,
            weights=weights_name(trainable.name, weight_set),
            write=partial(write, fmt),
        )


def _extension(method: ExpertMethod | None, format: LoraFormat) -> str:
    """The ending of an exported name; "" for a folder, diffusers' layout of a whole model."""
    folder = isinstance(method, FullFineTune) and format != "comfyui"
    return "" if folder else ".safetensors"


def _write_adapter(
    run: Exportable,
    trained: TrainedExpert,
    method: AdapterTraining,
    path: Path,
    format: LoraFormat,
    facts: Mapping[str, str | int | float],
) -> list[str]:
    config, title = run.config, KIND_TITLES[method.config.kind]
    header = AdapterHeader(
        facts=facts,
        title=f"{config.output.name} ({run.variant.title} {title})",
        resolution=run.resolution,
    )
    return WanModelSaver().save_adapter(
        method.adapter(),
        path,
        format,
        header,
        # Adapters are trained in float32 and small, so they are rounded only on request.
        dtype=_dtype(run) or torch.float32,
        base=partial(_base_tensor, trained.transformer),
        shape=WanShape.of_config(trained.transformer.config),
    )


def _base_tensor(transformer: WanTransformer3DModel, name: str) -> Tensor:
    layer, _, which = name.rpartition(".")
    return base_weight(transformer, layer, which)


def _write_expert(
    run: Exportable,
    trained: TrainedExpert,
    path: Path,
    format: LoraFormat,
    facts: Mapping[str, str | int | float],
) -> list[str]:
    written = save_expert(
        trained.transformer,
        path,
        "single" if format == "comfyui" else "diffusers",
        dtype=_dtype(run),
        variant=run.variant,
        expert=trained.expert,
        source=run.config.model.source_of(trained.expert.component),
        facts=facts,
    )
    return list(written.notices)


def _write_embedding(
    run: Exportable,
    trainable: Trainable,
    weight_set: WeightSet,
    embedding: WanModelEmbedding,
    path: Path,
) -> list[str]:
    assert isinstance(trainable.weights, EmbeddingTraining)
    facts = _facts(run, trainable, weight_set, trainable.weights.lr[embedding.name])
    with trainable.using(weight_set):
        WanModelSaver().save_embedding(embedding, path, dtype=_dtype(run), facts=facts)
    return []


def _dtype(run: Exportable) -> torch.dtype | None:
    dtype = run.config.output.dtype
    return None if dtype is None else torch_dtype(dtype)


def _facts(
    run: Exportable, trainable: Trainable, weight_set: WeightSet, lr: float
) -> dict[str, str | int | float]:
    """Facts about the run for the header of an exported file, to be looked up later."""
    config, step = run.config, run.state.step
    facts: dict[str, str | int | float] = {
        "variant": run.variant.name,
        "run": str(config.output.name),
        "steps": step,
        **({} if run.clips is None else {"clips": run.clips}),
        "dataset_digest": run.dataset_digest,
        "seed": config.train.seed,
        "lr": lr,
    }
    if trainable.name != "embeddings":
        expert = run.state.experts[trainable.name].expert
        facts["expert"] = trainable.name
        facts["base_model"] = _shareable(config.model.source_of(expert.component))
        facts["expert_steps"] = run.schedule.steps_before(step, trainable.name)
    if weight_set == "ema" and config.train.ema is not None:
        facts["ema_decay"] = config.train.ema.decay
    if (name := weights_name(trainable.name, weight_set)) in run.state.best_now:
        facts["validation_loss"] = run.state.best_weights[name].loss
    return facts


def _shareable(model: str) -> str:
    """The name of a base model, without the path of a local folder: exported files are shared."""
    return Path(model).name if Path(model).exists() else model
