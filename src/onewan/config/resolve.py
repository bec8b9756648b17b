"""Run file -> `ResolvedRun`: fills null fields with the defaults that follow from the variant or
from other fields; what follows from several fields, such as the trained experts.

Never changes a value that was given and never raises: it expects a config that breaks no rule.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from onewan.arithmetic.condition_shares import ConditionShares, default_shares
from onewan.arithmetic.expert_schedule import ExpertSchedule, expert_schedule
from onewan.config.clips import (
    ResolvedVideoData,
    ResolvedWanTrainConfig,
    SourceSection,
    Strategy,
)
from onewan.config.method import (
    EmbeddingSection,
    FineTuneMethod,
    Method,
    PerModule,
    RankedMethod,
    ResolvedEmbedding,
)
from onewan.config.objective import ConditionSharesSection
from onewan.config.sample_defaults import sample_defaults
from onewan.config.schema import (
    ExpertSettings,
    ResolvedOutput,
    ResolvedRun,
    ResolvedSample,
    RunConfig,
    TrainSection,
)
from onewan.config.section import Section
from onewan.variants import NEGATIVE_PROMPT, Expert, ExpertName, Variant

_S = TypeVar("_S", bound=Section)


def resolve(config: RunConfig, folder: Path) -> ResolvedRun:
    """`config` with every null that stands for a default replaced by that default.

    `folder` is the run file's: the two defaults that are relative paths, those of
    `video_data.cache_dir` and `output.dir`, become absolute in it.
    """
    variant, video, output = config.model.facts(), config.video_data, config.output
    resolutions = _training_sizes(video.resolution or ("480p",), variant)
    sample = sample_defaults(config, resolutions)
    sections = {
        "wan_config": _filled(
            ResolvedWanTrainConfig,
            config.wan_config.model_copy(update=compression_ratios(variant)),
            max_frames=variant.frames,
            clips_per_video=default_clips_per_video(config.wan_config.frame_sample_strategy),
        ),
        "video_data": _filled(
            ResolvedVideoData,
            video.model_copy(
                update={
                    "cache_dir": folder / video.cache_dir,
                    "resolution": resolutions,
                    "sources": _sources(video.sources, variant),
                }
            ),
            target_fps=float(variant.fps),
        ),
        "validation": config.validation.model_copy(
            update={"sources": _sources(config.validation.sources, variant)}
        ),
        "method": _method(config),
        "embeddings": tuple(
            _filled(ResolvedEmbedding, e, name=exported_name(e)) for e in config.embeddings
        ),
        "per_expert": {
            name: _filled(ExpertSettings, expert, alpha=expert.rank and float(expert.rank))
            for name, expert in dict(config.per_expert).items()
        },
        "train": _train(config),
        "sample": _filled(
            ResolvedSample,
            config.sample,
            width=sample.width,
            height=sample.height,
            frames=sample.frames,
            fps=float(variant.fps),
            steps=sample.steps,
            shift=variant.flow_shift,
            guidance=tuple(expert.guidance_scale for expert in variant.experts),
            negative_prompt=NEGATIVE_PROMPT,
        ),
        "output": _filled(ResolvedOutput, output.model_copy(update={"dir": folder / output.dir})),
    }
    return ResolvedRun.model_validate({**dict(config), **sections})


def _train(config: RunConfig) -> TrainSection:
    """`train` with its steps, the shift of its timesteps and the shares of its samples."""
    train, timesteps = config.train, config.train.timesteps
    shift = timesteps.shift or config.model.facts().flow_shift
    shares = ConditionSharesSection(**asdict(condition_shares(config)))
    return train.model_copy(
        update={
            "timesteps": timesteps.model_copy(update={"shift": shift}),
            "steps": total_steps(config),
            "condition_shares": shares,
        }
    )


def compression_ratios(variant: Variant) -> dict[str, int]:
    """The values of the fields of `wan_config` that are facts of the variant's VAE."""
    return {
        "spatial_compression_ratio": variant.spatial_compression,
        "temporal_compression_ratio": variant.temporal_compression,
    }


def expert_schedule_of(config: RunConfig) -> ExpertSchedule:
    """Which expert each step of the run trains."""
    variant, train = config.model.facts(), config.train
    return expert_schedule(
        trained_experts(config),
        train.high_expert_share,
        train.switch_expert_every,
        train.timesteps.density(variant.flow_shift),
        steps_per_expert(config),
    )


def trained_experts(config: RunConfig) -> tuple[Expert, ...]:
    """The experts that are trained. The only expert of a variant is always among them."""
    variant = config.model.facts()
    return variant.selected(config.model.experts if len(variant.experts) > 1 else "both")


def total_steps(config: RunConfig) -> int:
    """Optimizer steps of the run: those of both experts if they are given, else `train.steps`."""
    counts = steps_per_expert(config)
    return config.train.steps if counts is None else sum(counts)


def with_steps_of_epochs(
    config: ResolvedRun, batches_per_epoch: Mapping[ExpertName, int]
) -> ResolvedRun:
    """`config` with `train.epochs` turned into steps, for a data set of which each trained expert
    has `batches_per_epoch` micro-batches; `config` itself if it has no epochs.

    Each trained expert gets the steps that it needs for its own clips. Where
    `train.high_expert_share` is not "equal", the sum of them is divided by it.
    """
    train, experts = config.train, config.per_expert
    if train.epochs is None:
        return config
    each = {
        name: -(-train.epochs * count // train.accumulation)
        for name, count in batches_per_epoch.items()
    }
    if len(each) == 2 and train.high_expert_share == "equal":
        # Exactly, where a share would be rounded to whole periods of `train.switch_expert_every`.
        high = experts.high.model_copy(update={"steps": each["high"]})
        low = experts.low.model_copy(update={"steps": each["low"]})
        experts = experts.model_copy(update={"high": high, "low": low})
    train = train.model_copy(update={"steps": sum(each.values()), "epochs": None})
    return config.model_copy(update={"train": train, "per_expert": experts})


def condition_shares(config: RunConfig) -> ConditionShares:
    """How often samples are given which frames: as the run file says, or as the variant has it."""
    if (given := config.train.condition_shares) is not None:
        return ConditionShares(**dict(given))
    return default_shares(config.model.facts())


def steps_per_expert(config: RunConfig) -> tuple[int, int] | None:
    """Steps of the high and the low expert, if the run file gives both; else None."""
    high, low = config.per_expert.high.steps, config.per_expert.low.steps
    return None if high is None or low is None else (high, low)


def default_clips_per_video(strategy: Strategy) -> int:
    """The number of clips of a video where the run file gives none."""
    return 4 if strategy == "random" else 1


def _training_sizes(sizes: tuple[int | str, ...], variant: Variant) -> tuple[int | str, ...]:
    """Areas in pixels and exact sizes, without the names of areas."""
    return tuple(
        variant.named_areas.get(size, size) if isinstance(size, str) else size for size in sizes
    )


def _sources(sources: tuple[SourceSection, ...], variant: Variant) -> tuple[SourceSection, ...]:
    """The sources, with their own training sizes as those of all."""
    return tuple(
        source.model_copy(update={"resolution": _training_sizes(source.resolution, variant)})
        if source.resolution
        else source
        for source in sources
    )


def exported_name(embedding: EmbeddingSection) -> str:
    """The name that was given, or the placeholder without its signs: "" if nothing is left."""
    return embedding.name or re.sub(r"[^A-Za-z0-9_-]", "", embedding.placeholder)


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


def _filled(into: type[_S], section: Section, **defaults: object) -> _S:
    """`section` as one of type `into`, with `defaults` where it has None."""
    values = dict(section)
    # A null without a default here is a value of its own, such as "keep all".
    return into.model_validate(
        values | {name: default for name, default in defaults.items() if values[name] is None}
    )
