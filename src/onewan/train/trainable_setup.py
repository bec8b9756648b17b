"""Attaches the trainable parts of a run to its model: adapters, weights or placeholders, and their
optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from onewan.adapters.adapter_config import (
    AdapterConfig,
    adapter_config_for,
    adapter_config_from_file,
)
from onewan.adapters.lora import attach_adapter
from onewan.adapters.merging import FixedParts, split_adapter
from onewan.adapters.select import select_weights
from onewan.adapters.weights import train_weights
from onewan.checkpoint.saver import expert_of
from onewan.config.method import (
    AdapterMethod,
    DoraMethod,
    EmbeddingMethod,
    FineTuneMethod,
    LoraMethod,
    ResolvedEmbedding,
)
from onewan.config.optimizer import AdamWOptimizer
from onewan.config.schema import ExpertSettings, ResolvedRun
from onewan.config.unused import file_decides
from onewan.data.clip import Clip
from onewan.errors import CheckpointError, ConfigError
from onewan.formats.adapter import ModuleAdapter
from onewan.formats.lora_files import AdapterFile, read_adapters
from onewan.formats.lora_writing import check_expressible
from onewan.formats.untrusted import named
from onewan.memory.block_weights import BlockTraining
from onewan.memory.residency import DeviceResidency
from onewan.memory.streaming import BlockStream
from onewan.model.embedding import WanModelEmbedding
from onewan.model.text import checkpoint_encoder, mentions
from onewan.model.wan import WanModel
from onewan.train.ema import Ema
from onewan.train.memory import RunMemory
from onewan.train.optimizers.block_updates import BlockUpdates
from onewan.train.optimizers.builders import is_schedule_free
from onewan.train.optimizers.parameters import ParameterGroup
from onewan.train.optimizers.per_weight import PerWeightOptimizer
from onewan.train.optimizers.trainable_optimizer import build_trainable_optimizer
from onewan.train.sharding import Sharding
from onewan.train.state import Trainable, TrainableName, TrainedExpert, TrainState
from onewan.train.trainables import AdapterTraining, EmbeddingTraining, ExpertMethod, FullFineTune
from onewan.variants import Expert, ExpertName

if TYPE_CHECKING:
    from onewan.memory.sharded_blocks import ShardedTransformer


def initial_adapters(config: ResolvedRun) -> dict[ExpertName, AdapterFile]:
    """The adapter files that `method.init_from` initializes experts from, by expert.

    ConfigError, naming every problem, if they are not one per trained expert at most, have nothing
    to train, or have parts that `output.formats` can't hold.
    """
    method, variant = config.method, config.model.facts()
    if not isinstance(method, AdapterMethod):
        return {}
    trained = {expert.name for expert in variant.selected(config.model.experts)}
    found: dict[ExpertName, AdapterFile] = {}
    problems = []
    files: list[AdapterFile] = []
    for path in method.init_from:
        both = read_adapters(path)
        # Of a file with both experts, only what is trained is used.
        files += both if len(both) == 1 else [a for a in both if a.expert in trained]
    for file in files:
        path = file.path
        name = expert_of(path, file.metadata, variant, file.expert).name
        if name in found:
            problems.append(f"method.init_from: two files are for the {name} expert; keep one")
        if name not in trained:
            problems.append(
                f"method.init_from: {path} is for the {name} expert, which is not trained; "
                "remove it, or change model.experts"
            )
        problems += [
            f"{field}: {problem}"
            for field, problem in file_decides(name, expert_settings(config, name))
        ]
        problems += _fixed_part_problems(config, file)
        found[name] = _with_notice_of_fixed_parts(file)
    if problems:
        raise ConfigError("run file", problems)
    return found


def _fixed_part_problems(config: ResolvedRun, file: AdapterFile) -> Iterator[str]:
    """Why the parts of `file` that are not trained could not be exported again."""
    trained, fixed = split_adapter(file.modules)
    if not trained:
        yield (
            f"method.init_from: {file.path} has no adapter on a linear layer, so there is nothing "
            "to train; merge it into the base model and train a new adapter"
        )
    for format in config.output.formats if fixed else ():
        try:
            check_expressible(file.modules, format)
        except CheckpointError as error:  # noqa: PERF203  (a few formats, once)
            yield (
                f"output.formats: has {format}, and each exported file has to hold what "
                f"{file.path} changes besides the trained layers; {error}"
            )


def _with_notice_of_fixed_parts(file: AdapterFile) -> AdapterFile:
    _, fixed = split_adapter(file.modules)
    if not fixed:
        return file
    notice = (
        f"{file.path}: training starts from its adapters of linear layers; the biases, norms and "
        f"other weights that it changes in {len(fixed)} modules stay as in the file, and every "
        f"exported file has them again: {named(sorted(fixed))}"
    )
    return replace(file, notices=(*file.notices, notice))


def attach_expert(
    config: ResolvedRun,
    model: WanModel,
    expert: Expert,
    initial: AdapterFile | None,
    residency: DeviceResidency,
    memory: RunMemory,
) -> TrainedExpert:
    """Make `expert` of `model` trainable by the run's method, register it with `residency`, and let
    `memory` run its blocks.

    `initial` is the adapter file to initialize from. With the method "embedding" the transformer
    has no trainable parameters; gradients pass through it to the vectors of placeholders.
    """
    transformer = model.expert(expert)
    # First, since the method enables gradients for its own parameters.
    transformer.requires_grad_(False)
    method = _attach_method(config, transformer, expert, initial)
    sharded = memory.shard(transformer, _replicated(method))
    if sharded is not None and isinstance(method, AdapterTraining) and method.has_fixed_parts:
        raise ConfigError(
            "run file",
            [
                "method.init_from: changes weights besides the layers that are trained, which is "
                "not possible where these are sharded; set parallel.weights to replicated"
            ],
        )
    trainable = None
    if method is not None:
        if sharded is not None and isinstance(method, FullFineTune):
            method.use_shards(sharded.shards)
        lr = expert_settings(config, expert.name).lr or config.optimizer.lr
        trainable = _trainable(config, expert.name, method, lr, _sharding(method, sharded))
        trainable.settle = residency.settle
    residency.manage(
        transformer,
        *([] if trainable is None else [trainable]),
        alternating=config.memory.offload_inactive_expert,
        parked=_is_parked(config, memory),
        placement=memory.add(
            transformer,
            first_trained=_first_trained(config),
            training=_block_training(transformer, method, trainable),
        ),
    )
    return TrainedExpert(
        expert=expert,
        transformer=transformer,
        method=method,
        trainable=trainable,
        initial_digest=None if initial is None else initial.digest(),
        sharded=sharded,
    )


def _replicated(method: ExpertMethod | None) -> list[nn.Parameter]:
    """What is trained beside the weights, and so is never sharded."""
    if method is None or isinstance(method, FullFineTune):
        return []
    return list(method.parameters.values())


def _sharding(method: ExpertMethod, sharded: ShardedTransformer | None) -> Sharding | None:
    """Which of the trained weights are sharded; None if there are none."""
    if sharded is None or not isinstance(method, FullFineTune):
        return None
    shapes = {n: shape for n, shape in sharded.shapes.items() if n in method.parameters}
    return Sharding(group=sharded.group, shapes=shapes)


def attach_saved_expert(
    config: ResolvedRun,
    transformer: WanTransformer3DModel,
    expert: Expert,
    initial: AdapterFile | None,
    weights: Mapping[str, Tensor],
) -> TrainedExpert:
    """`expert` as `attach_expert` trains it, on the host, to export what a state has saved: an
    adapter gets the saved `weights`. Of an adapter, names and shapes of `transformer` are enough.

    An optimizer is there for those that average weights, since the others export what they train.
    """
    transformer.requires_grad_(False)
    method = _attach_method(config, transformer, expert, initial, weights)
    assert method is not None
    lr = expert_settings(config, expert.name).lr or config.optimizer.lr
    return TrainedExpert(
        expert=expert,
        transformer=transformer,
        method=method,
        trainable=_trainable(_exporting(config), expert.name, method, lr),
    )


def saved_embeddings(config: ResolvedRun, weights: Mapping[str, Tensor]) -> Trainable:
    """The trained embeddings with the vectors `weights`, as `attach_saved_expert`."""
    lr = config.optimizer.lr
    chosen: list[tuple[WanModelEmbedding, float]] = []
    for section in config.embeddings:
        if section.train and section.name in weights:
            vectors = weights[section.name].clone()
            embedding = (
                embedding_from_file(section, vectors.shape[1])
                if section.init_from is not None
                else WanModelEmbedding.restored(
                    vectors,
                    placeholder=section.placeholder,
                    name=section.name,
                    initial_text=section.initial_text,
                    is_output_embedding=section.is_output_embedding,
                    seed=config.train.seed,
                )
            )
            chosen.append((embedding, section.lr or lr))
    return _trainable(_exporting(config), "embeddings", EmbeddingTraining(chosen), lr)


def _exporting(config: ResolvedRun) -> ResolvedRun:
    """`config` with an optimizer that needs no package, unless its averages are exported."""
    if is_schedule_free(config.optimizer):
        return config
    return config.model_copy(update={"optimizer": AdamWOptimizer(lr=config.optimizer.lr)})


def _block_training(
    transformer: WanTransformer3DModel, method: ExpertMethod | None, trainable: Trainable | None
) -> Callable[[BlockStream], BlockTraining] | None:
    """What updates streamed blocks in full fine-tuning with a fused step; None otherwise."""
    if trainable is None or not isinstance(method, FullFineTune) or not method.fused:
        return None
    optimizer = trainable.optimizer
    assert isinstance(optimizer, PerWeightOptimizer)  # as every fused one

    def training(stream: BlockStream) -> BlockTraining:
        if trainable.ema is not None:
            raise ConfigError(
                "run file",
                [
                    "train.ema: is not possible while the trained blocks are streamed, since all "
                    "weights would have to be averaged in host memory; set it to null, or keep all "
                    "blocks on the device (memory.resident_blocks)"
                ],
            )
        method.settle = stream.settle
        return BlockUpdates(optimizer, list(transformer.blocks), stream.device, stream.settle)

    return training


def _first_trained(config: ResolvedRun) -> int:
    """The first block that a backward pass reaches."""
    layers = config.wan_config.transformer_layers_to_train
    # Gradients of placeholders, and of weights outside of the blocks, pass through all blocks.
    outside = bool(config.embeddings) or isinstance(config.method, FineTuneMethod)
    return 0 if layers is None or outside else min(layers)


def check_expert(
    config: ResolvedRun,
    transformer: WanTransformer3DModel,
    expert: Expert,
    initial: AdapterFile | None,
) -> None:
    """ConfigError or CheckpointError if `attach_expert` would refuse these arguments because of
    layers, ranks or the file `initial`. Names and shapes of `transformer` are enough."""
    method = config.method
    if isinstance(method, FineTuneMethod):
        select_weights(transformer, method.modules, config.wan_config.transformer_layers_to_train)
    elif isinstance(method, AdapterMethod):
        *_, fixed = _adapter(config, method, transformer, expert, initial)
        FixedParts(transformer, fixed, _name_of(initial))


def _is_parked(config: ResolvedRun, memory: RunMemory) -> bool:
    """Whether what is trained of the idle expert is in host memory, as the memory plan decides.
    Fine-tuned weights are the expert's own, which always leaves."""
    if memory.plan is None or isinstance(config.method, FineTuneMethod):
        return True
    return memory.plan.worst.settings.park_idle


def use_learning_rates(config: ResolvedRun, state: TrainState) -> None:
    """Give all weights of `state` the full learning rates of `config`, as if they had been attached
    with it."""
    for name, trained in state.experts.items():
        if trained.trainable is not None and trained.method is not None:
            lr = expert_settings(config, name).lr or config.optimizer.lr
            _use_rates(trained.trainable, trained.method.groups(lr), lr)
    embeddings = state.embeddings
    if embeddings is not None and isinstance(embeddings.weights, EmbeddingTraining):
        lr = config.optimizer.lr
        embeddings.weights.lr = {s.name: s.lr or lr for s in config.embeddings if s.train}
        _use_rates(embeddings, embeddings.weights.groups(lr), lr)


def _use_rates(trainable: Trainable, groups: Iterable[ParameterGroup], lr: float) -> None:
    trainable.lr = lr
    trainable.optimizer.set_full_lr({name: g.lr for g in groups for name in g.names})


def attach_embeddings(
    config: ResolvedRun, model: WanModel, clips: Iterable[Clip], residency: DeviceResidency
) -> Trainable | None:
    """Add the run file's placeholders to `model`, and keep its text encoder on the device.

    Returns the `Trainable` of those placeholders that are trained. ConfigError for one that no
    caption of `clips` contains.
    """
    if not config.embeddings:
        return None
    assert model.text_encoder is not None
    model.text_encoder.requires_grad_(False)
    residency.bring(model.text_encoder)
    embeddings = [_embedding(section, model, config.train.seed) for section in config.embeddings]
    for embedding in embeddings:
        embedding.to(residency.device)
        model.add_embedding(embedding)
    trained = [
        (embedding, section.lr or config.optimizer.lr)
        for embedding, section in zip(embeddings, config.embeddings, strict=True)
        if section.train
    ]
    check_captions(config, clips)  # again: clips that can't be decoded are left out by now
    if not trained:
        return None
    if config.memory.gradient_checkpointing:
        checkpoint_encoder(model.text_encoder)
    return _trainable(config, "embeddings", EmbeddingTraining(trained), config.optimizer.lr)


def mentions_any(placeholders: Iterable[str], captions: Iterable[str]) -> bool:
    """Whether one of `captions` contains one of `placeholders`."""
    return any(mentions(caption, p) for caption in captions for p in placeholders)


def _attach_method(
    config: ResolvedRun,
    transformer: WanTransformer3DModel,
    expert: Expert,
    initial: AdapterFile | None,
    saved: Mapping[str, Tensor] | None = None,
) -> ExpertMethod | None:
    """Attach the run's method; an adapter gets the weights `saved`, if they are given."""
    method, layers = config.method, config.wan_config.transformer_layers_to_train
    if isinstance(method, EmbeddingMethod):
        return None
    if isinstance(method, FineTuneMethod):
        names = select_weights(transformer, method.modules, layers)
        return FullFineTune(
            train_weights(transformer, names, method.weights),
            precision=method.weights,
            fused=method.fused_step,
        )
    adapter, weights, parts = _adapter(config, method, transformer, expert, initial)
    fixed = FixedParts(transformer, parts, _name_of(initial))
    attach_adapter(transformer, adapter, config.train.seed, expert.name, saved or weights)
    has_lora_b = isinstance(method, LoraMethod | DoraMethod)
    return AdapterTraining(
        transformer,
        adapter,
        fixed,
        lora_plus_ratio=method.lora_plus_ratio if has_lora_b else 1.0,
        starts_as_base=initial is None,
    )


def _adapter(
    config: ResolvedRun,
    method: AdapterMethod,
    transformer: WanTransformer3DModel,
    expert: Expert,
    initial: AdapterFile | None,
) -> tuple[AdapterConfig, dict[str, Tensor] | None, dict[str, ModuleAdapter]]:
    """(the adapter that is put on `expert`, the weights to initialize it from, if any, and the
    parts of the file `initial` that are not trained)."""
    layers = config.wan_config.transformer_layers_to_train
    if initial is not None:
        # The file decides ranks and alphas; `initial_adapters` has refused settings of them.
        trained, fixed = split_adapter(initial.modules)
        file = replace(initial, modules=trained)
        return *adapter_config_from_file(file, method, transformer, layers), fixed
    settings = expert_settings(config, expert.name)
    adapter = adapter_config_for(
        method, transformer, layers, rank=settings.rank, alpha=settings.alpha
    )
    return adapter, None, {}


def _name_of(initial: AdapterFile | None) -> str:
    return "" if initial is None else str(initial.path)


def _trainable(
    config: ResolvedRun,
    name: TrainableName,
    weights: ExpertMethod | EmbeddingTraining,
    lr: float,
    sharding: Sharding | None = None,
) -> Trainable:
    """`weights` with their optimizer and, if `train.ema` is set, their moving average."""
    ema = config.train.ema
    return Trainable(
        name=name,
        weights=weights,
        optimizer_name=config.optimizer.name,
        lr=lr,
        sharding=sharding,
        optimizer=build_trainable_optimizer(
            weights.groups(lr),
            config.optimizer,
            rounding=weights.rounding,
            fused=weights.fused,
            seed=config.train.seed,
            name=name,
            sharding=sharding,
        ),
        ema=None if ema is None else Ema(weights.parameters, ema.decay, offload=ema.offload),
    )


def _embedding(section: ResolvedEmbedding, model: WanModel, seed: int) -> WanModelEmbedding:
    name, placeholder = section.name, section.placeholder
    if section.init_from is not None:
        _, text_encoder = model.prompt_encoder()
        embedding = embedding_from_file(section, text_encoder.config.d_model)
    else:
        embedding = WanModelEmbedding.initial(
            model,
            placeholder=placeholder,
            name=name,
            initial_text=section.initial_text,
            token_count=section.token_count,
            is_output_embedding=section.is_output_embedding,
            seed=seed,
        )
    embedding.vectors.requires_grad_(section.train)
    return embedding


def embedding_from_file(section: ResolvedEmbedding, width: int) -> WanModelEmbedding:
    """The vectors that the run file's `section` initializes from; `width` is the text encoder's.
    CheckpointError for vectors of another one."""
    assert section.init_from is not None
    return WanModelEmbedding.from_file(
        section.init_from, placeholder=section.placeholder, name=section.name, width=width
    )


def check_captions(config: ResolvedRun, clips: Iterable[Clip]) -> None:
    """ConfigError for trained placeholders that no caption contains."""
    captions = {caption for clip in clips for caption in clip.captions}
    trained = [section.placeholder for section in config.embeddings if section.train]
    absent = [p for p in trained if not mentions_any([p], captions)]
    if absent:
        raise ConfigError(
            "run file",
            [
                f"embeddings: no caption contains {placeholder!r}, so it would not train; "
                "write it into the captions of the clips that show it"
                for placeholder in absent
            ],
        )


def expert_settings(config: ResolvedRun, expert: ExpertName) -> ExpertSettings:
    """The run file's `per_expert` settings of `expert`."""
    # There is no section for a single expert; the rules refuse `per_expert` for it, so that
    # `high` is empty.
    return config.per_expert.low if expert == "low" else config.per_expert.high
