"""What the nulls of a run file stand for, and which of its values then mean nothing.

Hides where the variant's own values go. Never changes a value that was given, never raises: it is
for a config that keeps to all rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TypeVar

from onewan.config.method import (
    AdapterMethod,
    EmbeddingSection,
    FineTuneMethod,
    Method,
    RankedMethod,
)
from onewan.config.schema import ExpertSettings, PerExpertSection, RunConfig
from onewan.config.schema_paths import Place
from onewan.config.section import Section
from onewan.variants import NEGATIVE_PROMPT

_S = TypeVar("_S", bound=Section)

FILES_DECIDE = ("modules", "rank", "alpha", "per_module", "block_size")
"""Fields of an adapter method that files of `method.start_from` decide for their experts."""


def resolved(config: RunConfig) -> RunConfig:
    """`config` with every null that stands for another value replaced by it."""
    variant = config.model.facts()
    width, height = variant.sample_size
    ratios = {
        "spatial_compression_ratio": variant.spatial_compression,
        "temporal_compression_ratio": variant.temporal_compression,
    }
    train: dict[str, object] = {
        "timesteps": _filled(config.train.timesteps, shift=variant.flow_shift)
    }
    if (steps := divided_steps(config)) is not None:
        train["steps"] = sum(steps)
    return config.model_copy(
        update={
            "wan_config": config.wan_config.model_copy(update=ratios),
            "video_data": _filled(
                config.video_data,
                target_fps=float(variant.fps),
                resolution=(variant.training_area,),
            ),
            "method": _method(config),
            "embeddings": tuple(_filled(e, name=exported_name(e)) for e in config.embeddings),
            "per_expert": PerExpertSection(
                high=_settings(config.per_expert.high), low=_settings(config.per_expert.low)
            ),
            "train": config.train.model_copy(update=train),
            "sample": _filled(
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
        }
    )


def divided_steps(config: RunConfig) -> tuple[int, int] | None:
    """Steps of the high and the low expert, if the run file gives both; else None."""
    high, low = config.per_expert.high.steps, config.per_expert.low.steps
    return None if high is None or low is None else (high, low)


def exported_name(embedding: EmbeddingSection) -> str:
    """The name that was given, or the placeholder without its signs: "" if nothing is left."""
    return embedding.name or re.sub(r"[^A-Za-z0-9_-]", "", embedding.placeholder)


def inert(config: RunConfig) -> Iterator[Place]:
    """Places of values that mean nothing in this run, and that its file may not give."""
    variant, method = config.model.facts(), config.method
    if variant.condition != "first_frame_clean":
        yield "train", "first_frame_probability"
    experts = variant.selected(config.model.experts)
    if isinstance(method, AdapterMethod) and len(method.start_from) == len(experts):
        for name in FILES_DECIDE:
            if name in type(method).model_fields:
                yield "method", name
    for index, embedding in enumerate(config.embeddings):
        if embedding.start_from is not None:
            yield "embeddings", index, "initial_text"
    if divided_steps(config) is not None:
        yield "train", "high_share"


def _method(config: RunConfig) -> Method:
    """The method with its alphas, and weights in the precision that they are kept in."""
    method = config.method
    if isinstance(method, RankedMethod) and not method.start_from:
        layers = tuple(
            _filled(layer, alpha=method.alpha or (layer.rank and float(layer.rank)))
            for layer in method.per_module
        )
        update = {"alpha": method.alpha or float(method.rank), "per_module": layers}
        return method.model_copy(update=update)
    if isinstance(method, FineTuneMethod) and config.model.dtype == "float32":
        return method.model_copy(update={"weights": "float32"})
    return method


def _settings(expert: ExpertSettings) -> ExpertSettings:
    return _filled(expert, alpha=expert.rank and float(expert.rank))


def _filled(section: _S, **values: object) -> _S:
    """A copy of `section` with `values` where it has None."""
    missing = {name: v for name, v in values.items() if getattr(section, name) is None}
    return section.model_copy(update=missing)
