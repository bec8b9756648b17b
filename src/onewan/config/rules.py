"""Rules between the fields of a run file, and between fields and the facts of the variant.

`method_rules` has those of the method, the embeddings and the optimizer, `timesteps` those of the
timesteps, `unused` those of fields without effect. They are checked once every field is valid by
itself, on the file as given, before defaults are filled in. No rule changes a value.
"""

from __future__ import annotations

from collections.abc import Iterator

from onewan.arithmetic.buckets import size_error
from onewan.arithmetic.sample_request import file_errors, given_files, request_errors
from onewan.config.clips import SourceSection, VideoDataSection
from onewan.config.fields import Problem
from onewan.config.method import FineTuneMethod
from onewan.config.method_rules import method_rules, missing_file
from onewan.config.optimizer import AVERAGING_OPTIMIZERS
from onewan.config.resolve import (
    compression_ratios,
    expert_schedule_of,
    steps_per_expert,
    total_steps,
    trained_experts,
)
from onewan.config.schema import COMPONENTS, DistilledSection, RunConfig
from onewan.config.timesteps import timestep_rules
from onewan.config.unused import unused_field_problems
from onewan.documents import format_value
from onewan.files import windows_reserves
from onewan.variants import Variant


def rule_violations(config: RunConfig) -> Iterator[Problem]:
    """(field, message) of every broken rule."""
    yield from _model_rules(config)
    yield from _size_rules(config)
    yield from _sample_rules(config)
    yield from method_rules(config)
    yield from _step_rules(config)
    if config.train.epochs is None:  # else checked when the clips are known
        yield from warmup_rules(config)
    yield from timestep_rules(config)
    yield from _averaging_rules(config)
    yield from _validation_rules(config)
    yield from _name_rules(config)
    yield from _memory_rules(config)
    yield from unused_field_problems(config)


def _model_rules(config: RunConfig) -> Iterator[Problem]:
    """A whole model, or every component that the run needs."""
    model, variant = config.model, config.model.facts()
    given = model.sources()
    if not given:
        form = f"a whole model, or a path for each component ({', '.join(COMPONENTS)})"
        yield "model.path", f"is required, got nothing; give the folder or hub name of {form}"
    # Sampling takes both experts, whichever of them train.
    experts = variant.experts if config.sample.prompts else trained_experts(config)
    needed = {"vae", "text_encoder", *(expert.component for expert in experts)}
    missing = [c for c in COMPONENTS if c in needed and c not in given]
    if given and "path" not in given and missing:
        why = "is needed where model.path is not given, got nothing"
        remedy = f"give {' and '.join(missing)}, or a whole model as the path"
        yield f"model.{missing[0]}", f"{why}; {remedy}"
    if len(variant.experts) == 1 and model.experts != "both":
        text = f"{variant.name} has one expert, got {model.experts!r}; leave it out"
        yield "model.experts", text


def _size_rules(config: RunConfig) -> Iterator[Problem]:
    """Compression as the VAE has it; training sizes that the model takes and the limits allow."""
    variant, wan, video = config.model.facts(), config.wan_config, config.video_data
    for name, fact in compression_ratios(variant).items():
        value = getattr(wan, name)
        if name in wan.model_fields_set and value != fact:
            yield f"wan_config.{name}", f"is {fact} for {variant.name}, got {value}; leave it out"
    yield from _limit_rules("video_data", video, video, variant)
    sections = {"video_data": video, "validation": config.validation}
    for section, values in sections.items():
        for index, source in enumerate(values.sources):
            if (source.resolution, source.min_resolution, source.max_resolution) != (None,) * 3:
                yield from _limit_rules(f"{section}.sources.{index}", source, video, variant)


def _limit_rules(
    name: str, own: VideoDataSection | SourceSection, video: VideoDataSection, variant: Variant
) -> Iterator[Problem]:
    """The sizes of the section `name`, or where it has none those of all sources."""
    low = own.min_resolution or video.min_resolution
    high = own.max_resolution or video.max_resolution
    if low is not None and (low[0] > high[0] or low[1] > high[1]):
        above = name if own.max_resolution else "video_data"
        rule = f"must not be above {above}.max_resolution {format_value(high)}"
        field = name if own.min_resolution else "video_data"
        text = f"{rule}, got {format_value(low)}; lower it, or raise the other"
        yield f"{field}.min_resolution", text
    sizes = own.resolution or video.resolution or ()
    for index, size in enumerate(sizes):
        field = f"{name if own.resolution else 'video_data'}.resolution"
        if text := size_error(size, variant.size_multiple, high, variant.named_areas):
            yield field + (f".{index}" if len(sizes) > 1 else ""), text


def _sample_rules(config: RunConfig) -> Iterator[Problem]:
    """Samples that the variant can make."""
    variant, sample = config.model.facts(), config.sample
    names = ("width", "height", "frames", "steps", "guidance")
    for field, text in request_errors(variant, **{name: getattr(sample, name) for name in names}):
        yield f"sample.{field}", text
    if sample.distilled is not None:
        yield from _distilled_rules(sample.distilled, variant)
    for index, prompt in enumerate(sample.prompts):
        files = given_files(prompt)
        for name, path in files.items():
            yield from missing_file(f"sample.prompts.{index}.{name}", path)
        for name, text in file_errors(variant, files, sample.frames):
            yield f"sample.prompts.{index}.{name}", text


def _distilled_rules(distilled: DistilledSection, variant: Variant) -> Iterator[Problem]:
    """A file for each expert of the variant, and none for others."""
    files, section = distilled.files(), "sample.distilled"
    experts = [expert.name for expert in variant.experts]
    for name, path in files.items():
        if name in experts:
            yield from missing_file(f"{section}.{name}", path)
        else:
            remedy = f"give {' and '.join(experts)} instead"
            yield f"{section}.{name}", f"{variant.name} has no such expert; {remedy}"
    for name in experts:
        if name not in files:
            which = "the transformer" if name == "single" else f"the {name}-noise expert"
            text = f"is required, got nothing; give the distilled LoRA of {which}"
            yield f"{section}.{name}", text


def _step_rules(config: RunConfig) -> Iterator[Problem]:
    """If two experts are trained, each has steps; those given for both add up to the run's."""
    if len(trained_experts(config)) < 2:
        return
    train, high, low = config.train, config.per_expert.high.steps, config.per_expert.low.steps
    counts = steps_per_expert(config)
    if counts is None and (high, low) != (None, None):
        expert, other = ("high", "low") if high is None else ("low", "high")
        why = f"is required where per_expert.{other}.steps is given, got nothing"
        remedy = "give it, or divide train.steps by train.high_expert_share"
        yield f"per_expert.{expert}.steps", f"{why}; {remedy}"
    if counts is not None and "steps" in train.model_fields_set and train.steps != sum(counts):
        rule = f"must be {sum(counts)}, the sum of per_expert.high.steps and per_expert.low.steps"
        yield "train.steps", f"{rule}, got {train.steps}; leave it out"
    share = train.high_expert_share
    if share in (0, 1):
        idle, other = ("high", "low") if share == 0 else ("low", "high")
        why = f"leaves the {idle} expert no steps, got {share:g}"
        remedy = f"and set model.experts={other} to train the {other} expert alone"
        yield "train.high_expert_share", f"{why}; leave it out, {remedy}"


def warmup_rules(config: RunConfig) -> Iterator[Problem]:
    """Warm-up and cooldown are counted in an expert's own steps, and must leave one between them.

    An expert that gets no steps at all is not judged here; the trainer warns of it.
    """
    warmup, cooldown = config.train.warmup_steps, config.train.cooldown_steps
    schedule, total = expert_schedule_of(config), total_steps(config)
    counts = {name: schedule.steps_before(total, name) for name in schedule.experts}
    expert, fewest = min(counts.items(), key=lambda item: item[1] or total + 1)
    if not warmup + cooldown or warmup + cooldown < fewest:
        return
    limit, remedy = f"train.steps ({total})", "lower it"
    if len(counts) > 1:
        limit = f"the {fewest} steps of the {expert} expert"
        remedy = "lower it, or give that expert more steps"
    if not cooldown:
        yield "train.warmup_steps", f"must be less than {limit}, got {warmup}; {remedy}"
    else:
        added = f"and train.warmup_steps ({warmup}) together " if warmup else ""
        text = f"{added}must be less than {limit}, got {cooldown}; {remedy}"
        yield "train.cooldown_steps", text


def _averaging_rules(config: RunConfig) -> Iterator[Problem]:
    """Averaged weights replace a falling learning rate; both together are worse."""
    optimizer, train = config.optimizer, config.train
    if isinstance(optimizer, AVERAGING_OPTIMIZERS):
        why = f"optimizer.name {optimizer.name} averages weights instead"
        if (kind := train.schedule.kind) != "constant":
            text = f"must be constant, since {why}, got {kind!r}; leave it out"
            yield "train.schedule.kind", text
        if count := train.cooldown_steps:
            yield "train.cooldown_steps", f"must be 0, since {why}, got {count}; leave it out"


def _memory_rules(config: RunConfig) -> Iterator[Problem]:
    """Settings about the blocks of a checkpointed backward pass, and weights that can be mapped."""
    memory = config.memory
    of_checkpointing = {
        "resident_blocks": None,
        "offload_inputs": False,
        "keep_attention": "no",
        "feed_forward_chunks": 1,
    }
    for name, without in of_checkpointing.items():
        value = getattr(memory, name)
        if not memory.gradient_checkpointing and value not in (None, without):
            why = "needs memory.gradient_checkpointing, which is off"
            yield f"memory.{name}", f"{why}, got {format_value(value)}; leave it out"
    if memory.host_weights == "mapped" and isinstance(config.method, FineTuneMethod):
        why = "trained weights can't stay in the model's file"
        yield "memory.host_weights", f"{why}, got 'mapped'; leave it out"


def _name_rules(config: RunConfig) -> Iterator[Problem]:
    """The run's folder can be copied to every system."""
    name = config.output.name
    if name is not None and windows_reserves(name):
        why = "is no name of a folder on Windows (but a device's, or one with a dot or space last)"
        yield "output.name", f"{why}, got {format_value(name)}; give another"


def _validation_rules(config: RunConfig) -> Iterator[Problem]:
    """Validation has clips, which are held out in one way, and happens where its loss is needed."""
    validation = config.validation
    if validation.sources and validation.share:
        why = "holds out training clips, and validation.sources gives other clips"
        yield "validation.share", f"{why}, got {validation.share:g}; remove one of them"
    if config.train.keep_best and not (validation.every and validation.clips):
        missing = "validation.every" if validation.clips else "validation.clips"
        why = f"needs the validation loss, and {missing} is 0"
        yield "train.keep_best", f"{why}; give {missing}, or leave it out"
