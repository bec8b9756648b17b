"""Rules of a run file about what trains: the method, embeddings, the optimizer, single experts.

Never parses, never changes a value, never looks at anything on the disk but whether a file to start
from is there.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence

from onewan.config.method import (
    ADAPTER_GROUPS,
    WEIGHT_GROUPS,
    AdapterMethod,
    EmbeddingMethod,
    EmbeddingSection,
    FineTuneMethod,
    LohaMethod,
    LokrMethod,
    LoraMethod,
    OftMethod,
    RankedMethod,
)
from onewan.config.optimizer import (
    OPTIMIZER_PACKAGES,
    AdamWOffloadOptimizer,
    CustomOptimizer,
    SgdOptimizer,
)
from onewan.config.resolve import FILES_DECIDE, divided_steps, exported_name
from onewan.config.schema import ExpertSettings, RunConfig
from onewan.config.schema_paths import Problem, show
from onewan.variants import Variant


def method_rules(config: RunConfig, variant: Variant | None) -> Iterator[Problem]:
    """Rules of what trains; those that need facts only with `variant`."""
    method = config.method
    if not isinstance(method, EmbeddingMethod):
        groups = WEIGHT_GROUPS if isinstance(method, FineTuneMethod) else ADAPTER_GROUPS
        yield from _module_rules("method.modules", method.modules, groups)
    if isinstance(method, RankedMethod):
        yield from _rank_rules(method)
    if isinstance(method, AdapterMethod):
        yield from _start_rules(config, method, variant)
    if isinstance(method, LokrMethod) and method.factor != -1 and method.factor < 1:
        yield "method.factor", f"must be at least 1, or -1, got {method.factor}; change it"
    if isinstance(method, FineTuneMethod):
        yield from _fine_tune_rules(config, method)
    if isinstance(method, LohaMethod | LokrMethod | OftMethod) and "diffusers" in (
        config.output.formats
    ):
        yield (
            "output.formats",
            f"diffusers reads {method.kind} in no spelling, got {show(config.output.formats)}; "
            "use comfyui or kohya",
        )
    yield from _base_target_rules(config)
    yield from _embedding_rules(config)
    yield from _optimizer_rules(config)
    yield from _ranked_expert_rules(config)
    if variant is not None:
        yield from _expert_rules(config, variant)


def trained(config: RunConfig, variant: Variant) -> tuple[str, ...]:
    """Names of the experts that train."""
    choice = config.model.experts
    return tuple(e.name for e in variant.experts if choice in ("both", e.name))


# ------------------------------------------------------------------------------------------- layers


def _module_rules(field: str, modules: Sequence[str], groups: Sequence[str]) -> Iterator[Problem]:
    """Each entry is a group, or a pattern: what is neither would select nothing."""
    twice = sorted({name for name in modules if modules.count(name) > 1})
    if twice:
        yield field, f"has {', '.join(twice)} twice, got {show(modules)}; give each once"
    for name in modules:
        if name in groups or any(sign in name for sign in "*?[."):
            continue
        near = difflib.get_close_matches(name, groups, n=1)
        remedy = f"did you mean '{near[0]}'?" if near else f"the groups are {', '.join(groups)}"
        if name in WEIGHT_GROUPS:
            remedy = f"adapters have {', '.join(groups)}; for others use fine_tune"
        yield (
            field,
            f"must name groups, or layers by a pattern with one of * ? [ ., got {show(name)}; "
            f"{remedy}",
        )


def _rank_rules(method: RankedMethod) -> Iterator[Problem]:
    for index, layers in enumerate(method.per_module):
        field = f"method.per_module.{index}"
        yield from _module_rules(f"{field}.modules", layers.modules, ADAPTER_GROUPS)
        if layers.rank is None and layers.alpha is None:
            yield field, "gives neither rank nor alpha; give one, or leave the entry out"


# ---------------------------------------------------------------------------------- kinds of method


def _start_rules(
    config: RunConfig, method: AdapterMethod, variant: Variant | None
) -> Iterator[Problem]:
    files, field = method.init_from, "method.init_from"
    if not files:
        return
    for index, file in enumerate(files):
        if not os.path.isfile(file):
            yield f"{field}.{index}", f"there is no file {file}; correct it"
    twice = sorted({str(file) for file in files if files.count(file) > 1})
    if twice:
        yield field, f"has {', '.join(twice)} twice; give each once"
    experts = trained(config, variant) if variant is not None else ("high", "low")
    if len(files) > len(experts):
        names = "" if experts == ("single",) else f" ({', '.join(experts)})"
        number = f"{len(experts)} expert{'s' if len(experts) > 1 else ''}"
        yield (
            field,
            f"must have at most one file for each expert that trains, got {len(files)} for "
            f"{number}{names}; leave out the others",
        )
    if len(files) >= len(experts):  # else one begins anew, and has what the run file says
        names = [name for name in FILES_DECIDE if name in method.model_fields_set]
        given = {f"method.{name}": getattr(method, name) for name in names}
        for place, value in given.items():
            if value not in (None, ()):
                yield place, f"is the file's own under {field}, got {show(value)}; leave it out"
        for name, settings in _experts(config):
            yield from started_expert_rules(name, settings)
    yield from _initial_shape_rules(method)
    if isinstance(method, LoraMethod) and method.init == "pissa":
        yield (
            "method.init",
            f"is for adapters that begin, and {field} goes on from one, got 'pissa'; leave out "
            "either",
        )


def _initial_shape_rules(method: AdapterMethod) -> Iterator[Problem]:
    """Fields that shape a new adapter and that no file takes, even if it is for one expert only."""
    for name in ("use_rslora", "factor", "decompose_both"):
        known = type(method).model_fields.get(name)
        if known is not None and (value := getattr(method, name)) != known.default:
            yield (
                f"method.{name}",
                f"is decided by the files of method.init_from, got {show(value)}; leave it out",
            )


def started_expert_rules(expert: str, settings: ExpertSettings) -> Iterator[Problem]:
    """Settings of an expert whose adapter starts from a file, that the file decides."""
    for name, value in (("rank", settings.rank), ("alpha", settings.alpha)):
        if value is not None:
            yield (
                f"per_expert.{expert}.{name}",
                f"is the file's own under method.init_from, got {show(value)}; leave it out",
            )


def _fine_tune_rules(config: RunConfig, method: FineTuneMethod) -> Iterator[Problem]:
    train = config.train
    rounded = "weights" in method.model_fields_set and method.weights != "float32"
    if rounded and config.model.dtype == "float32":
        yield (
            "method.weights",
            f"has no effect where model.dtype is float32, got {show(method.weights)}; leave out "
            "either",
        )
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
            f"{show(config.output.formats)}; use comfyui or diffusers",
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


def _optimizer_rules(config: RunConfig) -> Iterator[Problem]:
    optimizer = config.optimizer
    if isinstance(optimizer, SgdOptimizer) and optimizer.nesterov and optimizer.momentum == 0:
        yield (
            "optimizer.nesterov",
            "looks ahead by a momentum, and optimizer.momentum is 0; give one such as 0.9, or "
            "leave it out",
        )
    if not isinstance(optimizer, CustomOptimizer):
        return
    if not optimizer.class_path.startswith(tuple(f"{name}." for name in OPTIMIZER_PACKAGES)):
        yield (
            "optimizer.class_path",
            f"must be in one of {', '.join(OPTIMIZER_PACKAGES)}, got {show(optimizer.class_path)}; "
            "other code can't be named in a run file",
        )
    if "lr" in optimizer.arguments:
        value = optimizer.arguments["lr"]
        yield "optimizer.arguments.lr", f"has its own field, got {show(value)}; use optimizer.lr"


# --------------------------------------------------------------------------------------- embeddings


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
            yield f"{field}.placeholder", f"is there twice, got {show(same[0])}; choose another"
        elif within:
            yield (
                f"{field}.placeholder",
                f"must not contain another one or be a part of it, got "
                f"{show(embedding.placeholder)} beside {show(within[0])}; change one, such as "
                "to <fox>",
            )
        name = exported_name(embedding)
        if not name:
            yield (
                f"{field}.name",
                f"is required for the placeholder {show(embedding.placeholder)}, which has no "
                "letters or digits of ASCII, got nothing; give one",
            )
        elif not same and name.lower() in [exported_name(e).lower() for e in before]:
            yield f"{field}.name", f"is there twice, got {show(name)}; give another"


def _nested(one: str, other: str) -> bool:
    return one in other or other in one


def _vector_rules(field: str, embedding: EmbeddingSection) -> Iterator[Problem]:
    """Where the vectors of one embedding come from, and whether they move."""
    start, given = embedding.init_from, embedding.model_fields_set
    if start is None:
        if not embedding.train:
            yield (
                f"{field}.init_from",
                f"is required where {field}.train is false, got nothing; give its file",
            )
        if not embedding.initial_text.strip():
            yield f"{field}.initial_text", "must have a word to start from, got none; give one"
    else:
        if not os.path.isfile(start):
            yield f"{field}.init_from", f"there is no file {start}; correct it"
        for name in ("token_count", "initial_text"):
            value = getattr(embedding, name)
            if name in given and value is not None:
                yield (
                    f"{field}.{name}",
                    f"is the file's own under {field}.init_from, got {show(value)}; leave it out",
                )
    if not embedding.train and embedding.lr is not None:
        yield (
            f"{field}.lr",
            f"has no effect where {field}.train is false, got {embedding.lr:g}; leave it out",
        )


# ----------------------------------------------------------------------------------- single experts


def _experts(config: RunConfig) -> tuple[tuple[str, ExpertSettings], ...]:
    return ("high", config.per_expert.high), ("low", config.per_expert.low)


def _ranked_expert_rules(config: RunConfig) -> Iterator[Problem]:
    """What the method has no use for in any expert."""
    kind = config.method.kind
    useless = [] if isinstance(config.method, RankedMethod) else ["rank", "alpha"]
    if isinstance(config.method, EmbeddingMethod):
        useless.append("lr")
    for expert, settings in _experts(config):
        for name in useless:
            value = getattr(settings, name)
            if value is not None:
                what = "trains no expert" if name == "lr" else "has no ranks"
                yield (
                    f"per_expert.{expert}.{name}",
                    f"has no effect, since method.kind {kind} {what}, got {show(value)}; leave it "
                    "out",
                )


def _expert_rules(config: RunConfig, variant: Variant) -> Iterator[Problem]:
    """What differs between experts is for experts that are there."""
    names = trained(config, variant)
    for expert, settings in _experts(config):
        for name in ExpertSettings.model_fields:
            value = getattr(settings, name)
            if value is None:
                continue
            field = f"per_expert.{expert}.{name}"
            if len(variant.experts) == 1:
                yield field, f"{variant.name} has one expert, got {show(value)}; leave it out"
            elif expert not in names:
                alone = f"only the {config.model.experts} expert trains (model.experts)"
                yield field, f"{alone}, got {show(value)}; leave it out"
            elif name == "steps" and len(names) == 1:
                yield field, f"the {expert} expert has all steps, got {value}; use train.steps"
    if len(names) == 2:
        yield from _step_rules(config)


def _step_rules(config: RunConfig) -> Iterator[Problem]:
    """Steps of two experts are given for both, and divide what the run has."""
    steps, settings = divided_steps(config), dict(_experts(config))
    if steps is None:
        for expert, other in (("high", "low"), ("low", "high")):
            if settings[other].steps is not None:
                yield (
                    f"per_expert.{expert}.steps",
                    f"is required where per_expert.{other}.steps is given, got nothing; give it, "
                    "or divide train.steps by train.high_expert_share",
                )
        return
    of_both = "per_expert.high.steps and per_expert.low.steps"
    if "steps" in config.train.model_fields_set and config.train.steps != sum(steps):
        yield (
            "train.steps",
            f"must be {sum(steps)}, the sum of {of_both}, got {config.train.steps}; leave it out",
        )
    if "high_expert_share" in config.train.model_fields_set:
        share = config.train.high_expert_share
        yield (
            "train.high_expert_share",
            f"{of_both} divide the steps, got {show(share)}; leave it out",
        )
