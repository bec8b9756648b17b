"""What a run writes for other programs: a file for each expert, format and kind of weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from onewan.checkpoint.export import WanModelSaver
from onewan.formats.lora import LoraFormat
from onewan.runs.layout import RunLayout
from onewan.train.methods import EmbeddingTraining, ExportFacts
from onewan.train.run import DTYPES, Run
from onewan.train.state import TrainedPart, WeightsKind

_SUFFIX: dict[WeightsKind, str] = {"trained": "", "ema": "_ema"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedFile:
    """One file, or folder, that a step's weights go to."""

    path: Path
    part: TrainedPart
    kind: WeightsKind
    format: LoraFormat | None
    """None for embeddings, which have one."""
    embedding: int | None = None
    """Which of the embeddings."""


def exported_files(run: Run, layout: RunLayout) -> Iterator[ExportedFile]:
    """All that the weights of the present step are written to."""
    formats, step = run.config.output.formats, run.state.step
    for part in run.state.parts:
        kinds: tuple[WeightsKind, ...] = ("trained",) if part.ema is None else ("trained", "ema")
        for kind in kinds:
            if isinstance(part.weights, EmbeddingTraining):
                for number, embedding in enumerate(part.weights.embeddings):
                    name = f"_{embedding.name}{_SUFFIX[kind]}"
                    path = layout.weights(step, name)
                    yield ExportedFile(
                        path=path, part=part, kind=kind, format=None, embedding=number
                    )
                continue
            trained = run.state.experts[part.name]
            for fmt in formats:
                named = fmt if len(formats) > 1 else None
                suffix = trained.expert.file_suffix + _SUFFIX[kind]
                path = layout.weights(step, suffix, named, trained.method.extension(fmt))
                yield ExportedFile(path=path, part=part, kind=kind, format=fmt)


def export(run: Run, file: ExportedFile) -> list[str]:
    """Write `file` from the run's weights; returns what the user should know of it."""
    dtype = run.config.output.dtype
    stored = None if dtype is None else DTYPES[dtype]
    with file.part.as_(file.kind):
        if file.embedding is not None:
            embedding = file.part.weights.embeddings[file.embedding]
            WanModelSaver().save_embedding(
                embedding,
                file.path,
                dtype=stored,
                facts=_facts(run, file),
                date=datetime.now(timezone.utc),
            )
            return []
        method = run.state.experts[file.part.name].method
        title = f"{run.config.output.name} ({run.model.variant.title} {method.what})"
        about = ExportFacts(
            facts=_facts(run, file),
            title=title,
            resolution=max(clip.size for clip in run.dataset.clips),
            dtype=stored,
        )
        return method.export(file.path, file.format, about)


def _facts(run: Run, file: ExportedFile) -> dict[str, str | int | float]:
    """What a user may later want to know of an exported file."""
    config, step, part = run.config, run.state.step, file.part
    facts: dict[str, str | int | float] = {
        "variant": run.model.variant.name,
        "run": str(config.output.name),
        "steps": step,
        "clips": len(run.dataset.clips),
        "dataset_digest": run.dataset.digest,
        "seed": config.train.seed,
        "lr": part.updater.base_lr,
    }
    if part.name != "embeddings":
        expert = run.state.experts[part.name].expert
        facts["expert"] = part.name
        facts["base_model"] = _shareable(config.model.source_of(expert.component))
        facts["expert_steps"] = run.schedule.steps_before(step, part.name)
    if file.kind == "ema":
        assert config.train.ema is not None
        facts["ema_decay"] = config.train.ema.decay
    return facts


def _shareable(model: str) -> str:
    """The name of a base model for files that are passed on: of a local folder, its name alone."""
    return Path(model).name if Path(model).exists() else model
