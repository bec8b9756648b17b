"""Rules between the fields of a run file about the method, the embeddings and the optimizer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from onewan.arithmetic.placeholders import placeholder_error
from onewan.arithmetic.words import contains_word
from onewan.config.clips import SourceSection
from onewan.config.fields import Problem
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
from onewan.config.optimizer import Optimizer, SgdOptimizer, joint_only_reason
from onewan.config.resolve import exported_name, trained_experts
from onewan.config.schema import RunConfig
from onewan.documents import format_value


def method_rules(config: RunConfig) -> Iterator[Problem]:
    """Rules of `method`, `embeddings`, `optimizer`, and of the targets and formats they allow."""
    method, kind, formats = config.method, config.method.kind, config.output.formats
    got = f"got {format_value(formats)}"
    if isinstance(method, AdapterMethod):
        yield from _init_from_rules(config, method)
    if isinstance(method, FineTuneMethod):
        yield from _fine_tune_rules(config, method)
        for format in sorted({"kohya", "no_alpha"} & {*formats}):
            why = f"{format} is a form of adapters, and method.kind is fine_tune"
            yield "output.formats", f"{why}, {got}; use comfyui or diffusers"
    if isinstance(method, LohaMethod | LokrMethod | OftMethod) and "diffusers" in formats:
        yield "output.formats", f"diffusers can't read {kind}, {got}; use comfyui or kohya"
    other_adapter = isinstance(method, AdapterMethod) and not isinstance(method, LoraMethod)
    if other_adapter and "no_alpha" in formats:
        why = f"no_alpha is for programs that read only LoRA, and method.kind is {kind}"
        yield "output.formats", f"{why}, {got}; use comfyui"
    for index, source in enumerate(config.video_data.sources):
        if source.target == "base" and not isinstance(method, AdapterMethod):
            why = f"needs an adapter that can be switched off, and method.kind is {kind}"
            remedy = "use data, or an adapter such as lora"
            yield f"video_data.sources.{index}.target", f"{why}, got 'base'; {remedy}"
        yield from _class_word_rules(config, f"video_data.sources.{index}", source)
    for index, source in enumerate(config.validation.sources):
        if source.class_word:
            why = "nothing is trained on these clips"
            got = format_value(source.class_word)
            yield f"validation.sources.{index}.class_word", f"{why}, got {got}; leave it out"
        if source.target == "base":
            why = "what is measured is how well clips are learned"
            yield f"validation.sources.{index}.target", f"{why}, got 'base'; leave it out"
    yield from _embedding_rules(config)
    optimizer = config.optimizer
    if isinstance(optimizer, SgdOptimizer) and optimizer.nesterov and optimizer.momentum == 0:
        why = "needs a momentum, and optimizer.momentum is 0"
        yield "optimizer.nesterov", f"{why}; set one such as 0.9, or leave it out"


def _class_word_rules(config: RunConfig, field: str, source: SourceSection) -> Iterator[Problem]:
    """A class word stands for a trigger word, and needs the base model beside what is trained."""
    word, method = source.class_word, config.method
    if not word:
        return
    got = f"got {format_value(word)}"
    if not source.trigger_word:
        yield f"{field}.class_word", f"needs the trigger_word that it stands for, {got}; give one"
    elif contains_word(word, source.trigger_word):
        yield f"{field}.class_word", f"must not contain the trigger word, {got}; choose another"
    if source.target == "base":
        why = "target: base keeps the base model's predictions anyway"
        yield f"{field}.class_word", f"{why}, {got}; remove one of them"
    if not isinstance(method, AdapterMethod):
        why = f"needs an adapter that can be switched off, and method.kind is {method.kind}"
        yield f"{field}.class_word", f"{why}, {got}; leave it out, or use an adapter such as lora"
    elif config.embeddings:
        why = "needs texts that stay as they are, and embeddings are used"
        yield f"{field}.class_word", f"{why}, {got}; remove one of them"


def per_weight_problems(
    choice: Optimizer, rounding: Literal["none", "stochastic", "kahan"], *, fused: bool
) -> Iterator[Problem]:
    """What can't be done with an optimizer that updates all weights together.

    `rounding` is that of 16-bit weights; float32 weights need none, whatever the run file says.
    """
    asked = {"method.weights": (rounding, "float32")} if rounding != "none" else {}
    if fused:
        asked["method.fused_step"] = ("true", "false")
    if reason := joint_only_reason(choice):
        for field, (value, other) in asked.items():
            why = f"optimizer.name {choice.name!r} does not support: {reason}"
            remedy = f"choose another optimizer, or set {field} to {other}"
            yield field, f"{value} updates each weight separately, which {why}; {remedy}"


def missing_file(field: str, file: Path | None) -> Iterator[Problem]:
    if file is not None and not os.path.isfile(file):
        yield field, f"there is no file {file}; correct it"


def _init_from_rules(config: RunConfig, method: AdapterMethod) -> Iterator[Problem]:
    files, field = method.init_from, "method.init_from"
    for index, file in enumerate(files):
        if not os.path.isdir(file):  # PEFT writes a folder
            yield from missing_file(f"{field}.{index}", file)
    experts = [expert.name for expert in trained_experts(config)]
    if len(files) > len(experts):
        number = "1 expert" if len(experts) == 1 else f"{len(experts)} experts"
        names = "" if experts == ["single"] else f" ({', '.join(experts)})"
        rule = "must have at most one file for each trained expert"
        yield field, f"{rule}, got {len(files)} for {number}{names}; remove the others"
    if files and isinstance(method, LoraMethod) and method.init == "pissa":
        why = f"initializes new adapters, and {field} gives trained ones"
        yield "method.init", f"{why}, got 'pissa'; remove one of them"


def _fine_tune_rules(config: RunConfig, method: FineTuneMethod) -> Iterator[Problem]:
    train = config.train
    if method.fused_step and train.accumulation != 1:
        rule = f"must be 1 for method.fused_step, got {train.accumulation}"
        remedy = "raise train.batch_size instead, or set method.fused_step to false"
        yield "train.accumulation", f"{rule}; {remedy}"
    if method.fused_step and train.max_grad_norm is not None:
        rule = "must be null for method.fused_step, which never has all gradients at once"
        remedy = "set it to null, or method.fused_step to false"
        yield "train.max_grad_norm", f"{rule}, got {train.max_grad_norm:g}; {remedy}"
    rounding = method.weights
    if rounding == "float32" or config.model.dtype == "float32":
        rounding = "none"
    yield from per_weight_problems(config.optimizer, rounding, fused=method.fused_step)


def _embedding_rules(config: RunConfig) -> Iterator[Problem]:
    embeddings = config.embeddings
    if isinstance(config.method, EmbeddingMethod) and not any(e.train for e in embeddings):
        got = "none of them trains" if embeddings else "got none"
        remedy = "add one such as {placeholder: <fox>, initial_text: fox}"
        yield "embeddings", f"must have one to train for method.kind embedding, {got}; {remedy}"
    for index, embedding in enumerate(embeddings):
        field, before = f"embeddings.{index}", embeddings[:index]
        yield from _initial_vector_rules(field, embedding)
        placeholder, others = embedding.placeholder, [e.placeholder for e in before]
        if text := placeholder_error(placeholder, others):
            yield f"{field}.placeholder", text
        name, names = exported_name(embedding), [exported_name(e).lower() for e in before]
        if not name:
            why = f"is required for the placeholder {placeholder!r}, which has no ASCII letters"
            yield f"{field}.name", f"{why} or digits, got nothing; give one"
        elif placeholder not in others and name.lower() in names:
            yield f"{field}.name", f"is a duplicate, got {name!r}; change it"


def _initial_vector_rules(field: str, embedding: EmbeddingSection) -> Iterator[Problem]:
    """The vectors come from a file that is there, or from a text; the latter only to be trained."""
    yield from missing_file(f"{field}.init_from", embedding.init_from)
    if embedding.init_from is None and not embedding.train:
        why = f"is required where {field}.train is false"
        yield f"{field}.init_from", f"{why}, got nothing; give its file"
    if embedding.init_from is None and not embedding.initial_text.strip():
        yield f"{field}.initial_text", "must have a word to start from, got none; give one"
