"""What a run writes for other programs: a file for each trainable, format and kind of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from onewan.checkpoint.saver import WanModelSaver
from onewan.dtypes import torch_dtype
from onewan.formats.lora import LoraFormat
from onewan.model.embedding import WanModelEmbedding
from onewan.runs.layout import RunLayout
from onewan.train.run import Run
from onewan.train.state import Trainable, TrainableName, TrainedExpert, WeightSet
from onewan.train.trainables import EmbeddingTraining, ExpertMethod, ExportFacts

_SUFFIX: dict[WeightSet, str] = {"trained": "", "ema": "_ema"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedFile:
    """One file, or folder, that the weights of a step go to."""

    path: Path
    trainable: TrainableName
    write: Callable[[], list[str]]
    """Writes it; returns what the user should know of it."""


def exported_files(run: Run, layout: RunLayout) -> Iterator[ExportedFile]:
    """All that the weights of the present step are written to."""
    for trained in run.state.experts.values():
        if trained.trainable is not None and trained.method is not None:
            for kind in _kinds(trained.trainable):
                yield from _of_expert(run, layout, trained, trained.trainable, trained.method, kind)
    trainable = run.state.embeddings
    if trainable is not None and isinstance(trainable.weights, EmbeddingTraining):
        for kind in _kinds(trainable):
            for embedding in trainable.weights.embeddings:
                path = layout.weights(run.state.step, f"_{embedding.name}{_SUFFIX[kind]}")
                facts = _facts(run, trainable, kind, trainable.weights.lr[embedding.name])
                write = partial(_write_embedding, run, trainable, kind, embedding, path, facts)
                yield ExportedFile(path=path, trainable=trainable.name, write=write)


def _kinds(trainable: Trainable) -> tuple[WeightSet, ...]:
    return ("trained",) if trainable.ema is None else ("trained", "ema")


def _of_expert(
    run: Run,
    layout: RunLayout,
    trained: TrainedExpert,
    trainable: Trainable,
    method: ExpertMethod,
    kind: WeightSet,
) -> Iterator[ExportedFile]:
    formats, suffix = run.config.output.formats, trained.expert.file_suffix + _SUFFIX[kind]

    def write(path: Path, format: LoraFormat) -> list[str]:
        about = ExportFacts(
            facts=_facts(run, trainable, kind, trainable.lr),
            title=f"{run.config.output.name} ({run.model.variant.title} {method.what})",
            resolution=max(clip.size for clip in run.dataset.clips),
            dtype=_dtype(run),
        )
        with trainable.using(kind):
            return method.export(path, format, about)

    for fmt in formats:
        named = fmt if len(formats) > 1 else None
        path = layout.weights(run.state.step, suffix, named, method.extension(fmt))
        yield ExportedFile(path=path, trainable=trainable.name, write=partial(write, path, fmt))


def _write_embedding(
    run: Run,
    trainable: Trainable,
    kind: WeightSet,
    embedding: WanModelEmbedding,
    path: Path,
    facts: Mapping[str, str | int | float],
) -> list[str]:
    with trainable.using(kind):
        WanModelSaver().save_embedding(embedding, path, dtype=_dtype(run), facts=facts)
    return []


def _dtype(run: Run) -> torch.dtype | None:
    dtype = run.config.output.dtype
    return None if dtype is None else torch_dtype(dtype)


def _facts(
    run: Run, trainable: Trainable, kind: WeightSet, lr: float
) -> dict[str, str | int | float]:
    """What a user may later want to know of an exported file."""
    config, step = run.config, run.state.step
    facts: dict[str, str | int | float] = {
        "variant": run.model.variant.name,
        "run": str(config.output.name),
        "steps": step,
        "clips": len(run.dataset.clips),
        "dataset_digest": run.dataset.digest,
        "seed": config.train.seed,
        "lr": lr,
    }
    if trainable.name != "embeddings":
        expert = run.state.experts[trainable.name].expert
        facts["expert"] = trainable.name
        facts["base_model"] = _shareable(config.model.source_of(expert.component))
        facts["expert_steps"] = run.steps_before(trainable.name, step)
    if kind == "ema" and config.train.ema is not None:
        facts["ema_decay"] = config.train.ema.decay
    return facts


def _shareable(model: str) -> str:
    """The name of a base model for files that are passed on: of a local folder, its name alone."""
    return Path(model).name if Path(model).exists() else model
