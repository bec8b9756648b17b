"""Run file -> `ResolvedRun`: fills null fields with the defaults that follow from the variant or
from other fields, and lists the fields that have no effect.

Never changes a value that was given and never raises: it expects a config that breaks no rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from onewan.config.method import (
    AdapterMethod,
    EmbeddingSection,
    FineTuneMethod,
    Method,
    PerModule,
    RankedMethod,
    ResolvedEmbedding,
)
from onewan.config.schema import (
    ExpertSettings,
    PerExpertSection,
    ResolvedOutput,
    ResolvedRun,
    ResolvedSample,
    ResolvedVideoData,
    RunConfig,
)
from onewan.config.schema_paths import Place
from onewan.config.section import Section
from onewan.variants import NEGATIVE_PROMPT

_S = TypeVar("_S", bound=Section)


FILES_DECIDE = ("modules", "rank", "alpha", "per_module", "block_size")
"""Fields of an adapter method that files of `method.init_from` decide for their experts."""


def resolve(config: RunConfig, folder: Path) -> ResolvedRun:
    """`config` with every null that stands for a default replaced by that default.

    `folder` is the run file's: the two defaults that are relative paths, those of
    `video_data.cache_dir` and `output.dir`, become absolute in it.
    """
    variant, video, output = config.model.facts(), config.video_data, config.output
    width, height = variant.sample_size
    ratios = {
        "spatial_compression_ratio": variant.spatial_compression,
        "temporal_compression_ratio": variant.temporal_compression,
    }
    train = config.train
    shift = train.timesteps.shift or variant.flow_shift
    updates: dict[str, object] = {"timesteps": train.timesteps.model_copy(update={"shift": shift})}
    if (steps := divided_steps(config)) is not None:
        updates["steps"] = sum(steps)
    sections = {
        "wan_config": config.wan_config.model_copy(update=ratios),
        "video_data": _filled(
            ResolvedVideoData,
            video.model_copy(update={"cache_dir": folder / video.cache_dir}),
            target_fps=float(variant.fps),
            resolution=(variant.training_area,),
        ),
        "method": _method(config),
        "embeddings": tuple(
            _filled(ResolvedEmbedding, e, name=exported_name(e)) for e in config.embeddings
        ),
        "per_expert": PerExpertSection(
            high=_settings(config.per_expert.high), low=_settings(config.per_expert.low)
        ),
        "train": train.model_copy(update=updates),
        "sample": _filled(
            ResolvedSample,
            config.sample,
            width=width,
            height=height,
            frames=variant.frames,
            fps=float(variant.fps),
            steps=variant.sampling_steps,
            shift=variant.flow_shift,
            guidance=tuple(expert.guidance_scale for expert in variant.experts),
            negative_prompt=NEGATIVE_PROMPT,
        ),
        "output": _filled(ResolvedOutput, output.model_copy(update={"dir": folder / output.dir})),
    }
    return ResolvedRun.model_validate({**dict(config), **sections})


def divided_steps(config: RunConfig | ResolvedRun) -> tuple[int, int] | None:
    """Steps of the high and the low expert, if the run file gives both; else None."""
    high, low = config.per_expert.high.steps, config.per_expert.low.steps
    return None if high is None or low is None else (high, low)


def exported_name(embedding: EmbeddingSection) -> str:
    """The name that was given, or the placeholder without its signs: "" if nothing is left."""
    return embedding.name or re.sub(r"[^A-Za-z0-9_-]", "", embedding.placeholder)


def inert(config: RunConfig | ResolvedRun) -> Iterator[Place]:
    """Places of values that mean nothing in this run, and that its file may not give."""
    variant, method = config.model.facts(), config.method
    if not variant.has_clean_first_frame:
        yield "train", "first_frame_probability"
    experts = variant.selected(config.model.experts)
    if isinstance(method, AdapterMethod) and len(method.init_from) == len(experts):
        for name in FILES_DECIDE:
            if name in type(method).model_fields:
                yield "method", name
    for index, embedding in enumerate(config.embeddings):
        if embedding.init_from is not None:
            yield "embeddings", index, "initial_text"
    if divided_steps(config) is not None:
        yield "train", "high_expert_share"


def _method(config: RunConfig) -> Method:
    """The method with its alphas, and weights in the precision that they are kept in."""
    method = config.method
    if isinstance(method, RankedMethod) and not method.init_from:
        layers = tuple(
            _filled(PerModule, layer, alpha=method.alpha or (layer.rank and float(layer.rank)))
            for layer in method.per_module
        )
        update = {"alpha": method.alpha or float(method.rank), "per_module": layers}
        return method.model_copy(update=update)
    if isinstance(method, FineTuneMethod) and config.model.dtype == "float32":
        return method.model_copy(update={"weights": "float32"})
    return method


def _settings(expert: ExpertSettings) -> ExpertSettings:
    return _filled(ExpertSettings, expert, alpha=expert.rank and float(expert.rank))


def _filled(into: type[_S], section: Section, **defaults: object) -> _S:
    """`section` as one of type `into`, with `defaults` where it has None."""
    given = {name: value for name, value in section if value is not None}
    return into.model_validate({**defaults, **given})
