"""Rules between the fields of a run file about the method, the embeddings and the optimizer."""

from __future__ import annotations

import os
from collections.abc import Iterator

from onewan.config.method import (
    AdapterMethod,
    EmbeddingMethod,
    EmbeddingSection,
    FineTuneMethod,
    LohaMethod,
    LokrMethod,
    LoraMethod,
    OftMethod,
)
from onewan.config.optimizer import AdamWOffloadOptimizer, SgdOptimizer
from onewan.config.resolve import exported_name, steps_per_expert, trained_experts
from onewan.config.schema import RunConfig
from onewan.config.schema_paths import Problem, format_value


def method_rules(config: RunConfig) -> Iterator[Problem]:
    """Rules of `method`, `embeddings`, `optimizer` and `per_expert`."""
    method, formats = config.method, config.output.formats
    if isinstance(method, AdapterMethod):
        yield from _init_from_rules(config, method)
    if isinstance(method, FineTuneMethod):
        yield from _fine_tune_rules(config, method)
    if isinstance(method, LohaMethod | LokrMethod | OftMethod) and "diffusers" in formats:
        yield (
            "output.formats",
            f"diffusers can't read {method.kind}, got {format_value(formats)}; use comfyui or "
            "kohya",
        )
    yield from _base_target_rules(config)
    yield from _embedding_rules(config)
    yield from _step_rules(config)
    optimizer = config.optimizer
    if isinstance(optimizer, SgdOptimizer) and optimizer.nesterov and optimizer.momentum == 0:
        yield (
            "optimizer.nesterov",
            "needs a momentum, and optimizer.momentum is 0; set one such as 0.9, or leave it out",
        )


def _init_from_rules(config: RunConfig, method: AdapterMethod) -> Iterator[Problem]:
    files, field = method.init_from, "method.init_from"
    for index, file in enumerate(files):
        if not os.path.isfile(file):
            yield f"{field}.{index}", f"there is no file {file}; correct it"
    experts = [expert.name for expert in trained_experts(config)]
    if len(files) > len(experts):
        number = "1 expert" if len(experts) == 1 else f"{len(experts)} experts"
        names = "" if experts == ["single"] else f" ({', '.join(experts)})"
        yield (
            field,
            f"must have at most one file for each expert that trains, got {len(files)} for "
            f"{number}{names}; remove the others",
        )
    if files and isinstance(method, LoraMethod) and method.init == "pissa":
        yield (
            "method.init",
            f"initializes new adapters, and {field} gives trained ones, got 'pissa'; remove one "
            "of them",
        )


def _fine_tune_rules(config: RunConfig, method: FineTuneMethod) -> Iterator[Problem]:
    train = config.train
    if method.fused_step:
        if train.accumulation != 1:
            yield (
                "train.accumulation",
                f"must be 1 for method.fused_step, got {train.accumulation}; raise "
                "train.batch_size instead, or set method.fused_step to false",
            )
        if train.max_grad_norm is not None:
            yield (
                "train.max_grad_norm",
                "must be null for method.fused_step, which never sees the gradient of all weights "
                f"at once, got {train.max_grad_norm:g}; set it to null, or method.fused_step to "
                "false",
            )
        if isinstance(config.optimizer, AdamWOffloadOptimizer):
            yield (
                "optimizer.name",
                "'adamw_cpu_offload' moves all gradients together, and method.fused_step never "
                "has them; choose another optimizer, or set method.fused_step to false",
            )
    if "kohya" in config.output.formats:
        yield (
            "output.formats",
            f"kohya is a form of adapters, and method.kind is fine_tune, got "
            f"{format_value(config.output.formats)}; use comfyui or diffusers",
        )


def _base_target_rules(config: RunConfig) -> Iterator[Problem]:
    """The untrained model must be at hand while the method trains; and it is no measure."""
    for index, source in enumerate(config.video_data.sources):
        if source.target == "base" and not isinstance(config.method, AdapterMethod):
            yield (
                f"video_data.sources.{index}.target",
                f"needs an adapter that can be switched off, and method.kind is "
                f"{config.method.kind}, got 'base'; use data, or an adapter such as lora",
            )
    for index, source in enumerate(config.validation.sources):
        if source.target == "base":
            yield (
                f"validation.sources.{index}.target",
                "what is measured is how well clips are learned, got 'base'; leave it out",
            )


def _embedding_rules(config: RunConfig) -> Iterator[Problem]:
    embeddings = config.embeddings
    if isinstance(config.method, EmbeddingMethod) and not any(e.train for e in embeddings):
        got = "none of them trains" if embeddings else "got none"
        yield (
            "embeddings",
            f"must have one to train for method.kind embedding, {got}; add one such as "
            "{placeholder: <fox>, initial_text: fox}",
        )
    for index, embedding in enumerate(embeddings):
        field = f"embeddings.{index}"
        yield from _vector_rules(field, embedding)
        before = embeddings[:index]
        same = [e.placeholder for e in before if e.placeholder == embedding.placeholder]
        within = [e.placeholder for e in before if _nested(e.placeholder, embedding.placeholder)]
        if same:
            yield (
                f"{field}.placeholder",
                f"is a duplicate, got {same[0]!r}; change it",
            )
        elif within:
            yield (
                f"{field}.placeholder",
                "must not contain another placeholder or be a part of one, got "
                f"{embedding.placeholder!r} beside {within[0]!r}; change one, such as to <fox>",
            )
        name = exported_name(embedding)
        if not name:
            yield (
                f"{field}.name",
                f"is required for the placeholder {embedding.placeholder!r}, which has no "
                "letters or digits of ASCII, got nothing; give one",
            )
        elif not same and name.lower() in [exported_name(e).lower() for e in before]:
            yield f"{field}.name", f"is a duplicate, got {name!r}; change it"


def _nested(one: str, other: str) -> bool:
    return one in other or other in one


def _vector_rules(field: str, embedding: EmbeddingSection) -> Iterator[Problem]:
    """Where the vectors of one embedding come from, and whether they move."""
    start = embedding.init_from
    if start is None:
        if not embedding.train:
            yield (
                f"{field}.init_from",
                f"is required where {field}.train is false, got nothing; give its file",
            )
        if not embedding.initial_text.strip():
            yield f"{field}.initial_text", "must have a word to start from, got none; give one"
    elif not os.path.isfile(start):
        yield f"{field}.init_from", f"there is no file {start}; correct it"


def _step_rules(config: RunConfig) -> Iterator[Problem]:
    """Steps of two experts are given for both, and are those of the run."""
    if len(trained_experts(config)) < 2:
        return
    counts = steps_per_expert(config)
    high, low = config.per_expert.high.steps, config.per_expert.low.steps
    if counts is None and (high, low) != (None, None):
        expert, other = ("high", "low") if high is None else ("low", "high")
        yield (
            f"per_expert.{expert}.steps",
            f"is required where per_expert.{other}.steps is given, got nothing; give it, or divide "
            "train.steps by train.high_expert_share",
        )
    given = "steps" in config.train.model_fields_set
    if counts is not None and given and config.train.steps != sum(counts):
        yield (
            "train.steps",
            f"must be {sum(counts)}, the sum of per_expert.high.steps and per_expert.low.steps, "
            f"got {config.train.steps}; leave it out",
        )
