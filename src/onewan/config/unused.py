"""The one table of settings without effect: which field, in which run, and why.

A run file that sets such a field is refused, so that no setting is ignored silently; `dump_run`
leaves the fields out.
"""

from __future__ import annotations

from collections.abc import Iterator

from onewan.config.clips import LIST_SUFFIXES, SEVERAL_CLIPS, SourceSection
from onewan.config.fields import Problem
from onewan.config.method import AdapterMethod, EmbeddingMethod, FineTuneMethod, RankedMethod
from onewan.config.resolve import condition_shares, steps_per_expert, trained_experts
from onewan.config.schema import ExpertSettings, RunConfig
from onewan.documents import KeyPath, dotted, format_value, get_path

Unused = tuple[KeyPath, str]
"""The path of a field, and the reason that it has no effect."""

_SHAPE = ("modules", "rank", "alpha", "per_module", "block_size")
"""Fields of an adapter method that the files of `method.init_from` decide for their experts."""
_NEW_SHAPE = ("use_rslora", "factor", "decompose_both")
"""Fields that decide about new adapters only and contradict a file even if one expert has none."""
_FROM_FILE = "the files of method.init_from decide it"


def unused_fields(config: RunConfig) -> Iterator[Unused]:
    """All fields without effect in this run, whether they are set or not."""
    yield from _by_variant(config)
    yield from _by_method(config)
    yield from _by_embedding(config)
    yield from _by_expert(config)
    yield from _by_source(config)
    yield from _by_strategy(config)


def unused_field_problems(config: RunConfig) -> Iterator[Problem]:
    """A line for each field that the run file sets without effect."""
    given = config.model_dump(mode="json", exclude_unset=True)
    for path, why in unused_fields(config):
        value = get_path(given, path)
        if value not in (None, []):
            yield dotted(path), no_effect(why, value)


def no_effect(why: str, value: object) -> str:
    return f"has no effect, since {why}, got {format_value(value)}; leave it out"


def file_decides(expert: str, settings: ExpertSettings) -> Iterator[Problem]:
    """Lines for the settings of an expert that its file of `method.init_from` decides."""
    for name in ("rank", "alpha"):
        if (value := getattr(settings, name)) is not None:
            yield f"per_expert.{expert}.{name}", no_effect(_FROM_FILE, value)


def _by_variant(config: RunConfig) -> Iterator[Unused]:
    variant, train = config.model.facts(), config.train
    if train.epochs is not None:
        yield ("train", "steps"), "train.epochs gives the number of steps"
    if not variant.takes_image:
        yield ("train", "condition_shares"), f"{variant.name} is given no frames"
    shares = condition_shares(config)
    if not variant.has_clean_first_frame:
        why = f"only ti2v-5b has the first frame among its latents, and the model is {variant.name}"
        yield ("train", "first_frame_noise"), why
    elif shares.first == shares.both == 0:
        yield ("train", "first_frame_noise"), "no sample is given its first frame"
    if len(variant.experts) == 1:
        yield ("model", "boundary"), f"{variant.name} has one expert"
        yield ("model", "transformer_2"), f"{variant.name} has one transformer"
    if len(trained_experts(config)) == 1:
        if not isinstance(train.high_expert_share, str):
            yield ("train", "high_expert_share"), "only one expert is trained"
    elif steps_per_expert(config) is not None:
        yield ("train", "high_expert_share"), "per_expert gives the steps of both experts"
    if config.validation.every and not config.validation.clips:
        yield ("validation", "every"), "validation.clips is 0, which turns validation off"
    if config.sample.every and not config.sample.prompts:
        yield ("sample", "every"), "sample.prompts is empty"
    if config.sample.distilled is not None and not config.sample.prompts:
        yield ("sample", "distilled", "full_every"), "sample.prompts is empty"


def _by_method(config: RunConfig) -> Iterator[Unused]:
    method = config.method
    if isinstance(method, AdapterMethod) and method.init_from:
        fields = type(method).model_fields
        if len(method.init_from) >= len(trained_experts(config)):  # else one adapter is new
            yield from ((("method", name), _FROM_FILE) for name in _SHAPE if name in fields)
        for name in _NEW_SHAPE:
            if name in fields and getattr(method, name) != fields[name].default:
                yield ("method", name), _FROM_FILE
    is_float32 = config.model.dtype == "float32"
    if is_float32 and isinstance(method, FineTuneMethod) and method.weights != "float32":
        yield ("method", "weights"), "model.dtype is float32"


def _by_embedding(config: RunConfig) -> Iterator[Unused]:
    for index, embedding in enumerate(config.embeddings):
        if embedding.init_from is not None:
            why = f"the file of embeddings.{index}.init_from decides it"
            yield ("embeddings", index, "token_count"), why
            yield ("embeddings", index, "initial_text"), why
        if not embedding.train:
            yield ("embeddings", index, "lr"), f"embeddings.{index}.train is false"


def _by_expert(config: RunConfig) -> Iterator[Unused]:
    variant, method, kind = config.model.facts(), config.method, config.method.kind
    trained = [expert.name for expert in trained_experts(config)]
    from_files = isinstance(method, AdapterMethod) and len(method.init_from) >= len(trained)
    for expert in ("high", "low"):
        for name in ExpertSettings.model_fields:
            path = ("per_expert", expert, name)
            if len(variant.experts) == 1:
                yield path, f"{variant.name} has one expert"
            elif expert not in trained:
                yield path, f"only the {trained[0]} expert is trained (model.experts)"
            elif name == "steps" and len(trained) == 1:
                yield path, "only one expert is trained, and train.steps gives its steps"
            elif name == "steps" and config.train.epochs is not None:
                yield path, "train.epochs gives the steps of both experts"
            elif name in ("rank", "alpha") and not isinstance(method, RankedMethod):
                yield path, f"method.kind {kind} has no ranks"
            elif name in ("rank", "alpha") and from_files:
                yield path, _FROM_FILE
            elif name == "lr" and isinstance(method, EmbeddingMethod):
                yield path, f"method.kind {kind} trains no expert"


def _by_strategy(config: RunConfig) -> Iterator[Unused]:
    wan = config.wan_config
    if wan.clip_lengths:
        yield ("wan_config", "max_frames"), "wan_config.clip_lengths gives the numbers of frames"
    why = f"wan_config.frame_sample_strategy is {wan.frame_sample_strategy}"
    if wan.frame_sample_strategy not in SEVERAL_CLIPS:
        yield ("wan_config", "clips_per_video"), why
    if wan.frame_sample_strategy != "sliding":
        yield ("wan_config", "stride"), why


def _by_source(config: RunConfig) -> Iterator[Unused]:
    for index, source in enumerate(config.video_data.sources):
        if not source.shuffle_tags:
            why = "shuffle_tags of the source is 0, so that tags keep their order"
            yield ("video_data", "sources", index, "keep_tags"), why
    sections = {"video_data": config.video_data, "validation": config.validation}
    for section, values in sections.items():
        for index, source in enumerate(values.sources):
            if not config.model.facts().takes_condition_image:
                why = f"{config.model.facts().name} takes no condition image"
                yield (section, "sources", index, "condition"), why
            for name, why in _by_its_path(source, config):
                yield (section, "sources", index, name), why
    for index, _ in enumerate(config.validation.sources):
        why = "validation always takes the first caption, as it is written"
        for name in ("caption_dropout", "shuffle_tags", "keep_tags"):
            yield ("validation", "sources", index, name), why
        yield ("validation", "sources", index, "augment"), "validation takes clips as they are"
        why = "validation measures all clips alike, over the whole range of each expert"
        for name in ("timesteps", "weighting"):
            yield ("validation", "sources", index, name), why


def _by_its_path(source: SourceSection, config: RunConfig) -> Iterator[tuple[str, str]]:
    """Fields of a source that are only for folders, or for another strategy; with the reason."""
    strategy = source.frame_sample_strategy or config.wan_config.frame_sample_strategy
    if strategy not in SEVERAL_CLIPS:
        yield "clips_per_video", f"the strategy is {strategy}"
    is_list = source.kind in ("table", "concepts", "webdataset")
    if is_list or (source.kind == "auto" and str(source.path).lower().endswith(LIST_SUFFIXES)):
        for name in ("recursive", "include", "exclude"):
            yield name, "only folders have it, and its path is a file"
