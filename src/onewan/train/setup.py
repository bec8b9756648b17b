"""`WanModelSetup`: a run file -> everything that training needs, built and in its place."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from onewan.adapters.adapter_config import adapter_config_for, adapter_config_from_file
from onewan.adapters.lora import attach_adapter
from onewan.adapters.select import select_weights
from onewan.adapters.weights import train_weights
from onewan.arithmetic.expert_schedule import ExpertSchedule, expert_schedule
from onewan.arithmetic.timestep_density import TimestepDensity
from onewan.checkpoint.saver import expert_of
from onewan.config.method import (
    AdapterMethod,
    DoraMethod,
    EmbeddingMethod,
    FineTuneMethod,
    LoraMethod,
    ResolvedEmbedding,
)
from onewan.config.method_rules import started_expert_rules
from onewan.config.schema import ExpertSettings, ResolvedRun
from onewan.data.dataset import Dataset, prepare
from onewan.data.encode import ProgressCallback, no_progress
from onewan.data.loader import WanDataLoader
from onewan.dtypes import torch_dtype
from onewan.errors import ConfigError
from onewan.formats.lora_files import AdapterFile, read_adapter
from onewan.model.attention import attend_within_frames
from onewan.model.conditioning import conditioning_of
from onewan.model.embedding import WanModelEmbedding
from onewan.model.load import WanModelLoader
from onewan.model.sources import ENCODERS, Component, Placed, locate
from onewan.model.text import checkpoint_encoder, mentions
from onewan.model.wan import WanModel
from onewan.sample.generate import SampleRequest, requests_from
from onewan.train.ema import Ema
from onewan.train.objective import objective_of
from onewan.train.optimizers.builders import inexact_resume_reason
from onewan.train.optimizers.trainable_optimizer import build_trainable_optimizer
from onewan.train.run import Run
from onewan.train.state import Trainable, TrainableName, TrainedExpert, TrainState
from onewan.train.trainables import AdapterTraining, EmbeddingTraining, ExpertMethod, FullFineTune
from onewan.variants import Expert, ExpertName


class WanModelSetup:
    """Builds the run of one resolved run file."""

    def __init__(self, config: ResolvedRun) -> None:
        self._config = config
        self._variant = config.model.facts()
        self._experts = self._variant.selected(config.model.experts)
        self._device = resolve_device(config.model.device)
        self._dtype = torch_dtype(config.model.dtype)
        self._vae: AutoencoderKLWan | None = None
        self._notices: dict[str, None] = {}  # in order, each once

    def dataset(
        self, samples: list[SampleRequest], progress: ProgressCallback, *, verify: bool = False
    ) -> Dataset:
        """The data set, with everything encoded that was not yet (all that `onewan cache` does)."""
        texts = {t for s in samples for t in (s.prompt, s.negative_prompt)}
        given = self._config.model.sources()
        sources = locate(given, ENCODERS)
        # Hours of encoding must not end in a transformer that is missing.
        sources.require(
            {*ENCODERS, *(self._transformers(bool(samples)) - given.keys())}, self._variant
        )
        return prepare(
            self._config,
            sources.places,
            self._load,
            extra_prompts=sorted(texts),
            encode_text_online=bool(self._config.embeddings),
            progress=progress,
            verify=verify,
        )

    def build(self, progress: ProgressCallback = no_progress) -> Run:
        """Encode, load, attach: the run before its first step. Stages that need much memory follow
        one another, and what training does not need is let go in between."""
        config = self._config
        samples = requests_from(config)
        starts = self._starts()
        dataset = self.dataset(samples, progress)
        model = self._model(needs_sampling=bool(samples))
        objective = objective_of(config.train, self._variant, self._experts)
        schedule = self._schedule(objective.density)
        embeddings = self._embeddings(model, dataset)
        trained = {}
        for expert in self._experts:
            trained[expert.name] = self._trained(model, expert, starts.get(expert.name))
        return Run(
            config=config,
            device=self._device,
            model=model,
            dataset=dataset,
            loader=WanDataLoader(
                dataset.clips,
                dataset.source,
                conditioning_of(self._variant),
                batch_size=config.train.batch_size,
                accumulation=config.train.accumulation,
                seed=config.train.seed,
                caption_dropout=config.train.caption_dropout,
                encode_text_online=bool(config.embeddings),
            ),
            objective=objective,
            schedule=schedule,
            state=TrainState(experts=trained, embeddings=embeddings),
            samples=samples,
            dropout=isinstance(config.method, LoraMethod | DoraMethod)
            and config.method.dropout > 0,
            warnings=[*self._notices, *self._warnings(schedule, dataset)],
        )

    def _warnings(self, schedule: ExpertSchedule, dataset: Dataset) -> list[str]:
        config = self._config
        warnings = [
            f"the {name} expert gets none of the {config.train.steps} steps; see "
            f"train.switch_expert_every ({config.train.switch_expert_every}) and "
            "train.high_expert_share"
            for name in schedule.experts
            if not schedule.steps_before(config.train.steps, name)
        ]
        if isinstance(config.method, EmbeddingMethod):
            trained = [e.placeholder for e in config.embeddings if e.train]
            idle = [c for c in dataset.clips if not _mentioned(trained, c.captions)]
            if idle:
                names = [clip.name for clip in idle[:3]] + ["..."] * (len(idle) > 3)
                warnings.append(
                    f"{len(idle)} of {len(dataset.clips)} clips have no caption with a placeholder "
                    f"that trains, so they teach nothing ({', '.join(names)})"
                )
        if reason := inexact_resume_reason(config.optimizer):
            warnings.append(f"a resumed run may not be the uncut one to the bit: {reason}")
        return warnings

    def _schedule(self, density: TimestepDensity) -> ExpertSchedule:
        config = self._config
        high, low = config.per_expert.high.steps, config.per_expert.low.steps
        budgets, share = None, config.train.high_expert_share
        if high is not None and low is not None:
            budgets, share = (high, low), high / (high + low)
        return expert_schedule(
            self._experts, share, config.train.switch_expert_every, density, budgets=budgets
        )

    # ---------------------------------------------------------------------------- what trains

    def _starts(self) -> dict[ExpertName, AdapterFile]:
        """The adapters to go on from, by expert; ConfigError if they are of the wrong ones."""
        method = self._config.method
        if not isinstance(method, AdapterMethod):
            return {}
        starts: dict[ExpertName, AdapterFile] = {}
        problems = []
        for path in method.init_from:
            file = read_adapter(path)
            name = expert_of(path, file.metadata, self._variant, file.expert).name
            if name in starts:
                problems.append(f"method.init_from: two files are for the {name} expert; keep one")
            if name not in {e.name for e in self._experts}:
                problems.append(
                    f"method.init_from: {path} is for the {name} expert, which does not train; "
                    "leave it out, or change model.experts"
                )
            problems += [
                f"{field}: {problem}"
                for field, problem in started_expert_rules(name, self._own(name))
            ]
            starts[name] = file
        if problems:
            raise ConfigError("run file", problems)
        return starts

    def _trained(self, model: WanModel, expert: Expert, start: AdapterFile | None) -> TrainedExpert:
        config = self._config
        transformer = model.expert(expert)
        transformer.requires_grad_(False)
        method = self._method(transformer, expert, start)
        if config.memory.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        if not config.wan_config.use_temporal_attention:
            attend_within_frames(transformer)
        trainable = None
        if method is not None:
            lr = self._own(expert.name).lr or config.optimizer.lr
            trainable = self._trainable(expert.name, method, lr)
        return TrainedExpert(
            expert=expert, transformer=transformer, method=method, trainable=trainable
        )

    def _own(self, expert: ExpertName) -> ExpertSettings:
        """What the run file says of one of two experts."""
        settings = self._config.per_expert
        return settings.low if expert == "low" else settings.high

    def _method(
        self, transformer: WanTransformer3DModel, expert: Expert, start: AdapterFile | None
    ) -> ExpertMethod | None:
        config, method = self._config, self._config.method
        layers = config.wan_config.transformer_layers_to_train
        if isinstance(method, EmbeddingMethod):
            return None
        if isinstance(method, FineTuneMethod):
            names = select_weights(transformer, method.modules, layers)
            return FullFineTune(
                train_weights(transformer, names, method.weights),
                precision=method.weights,
                fused=method.fused_step,
            )
        own, initial = self._own(expert.name), None
        if start is not None:
            spec, initial = adapter_config_from_file(start, method, transformer, layers)
        else:
            spec = adapter_config_for(method, transformer, layers, rank=own.rank, alpha=own.alpha)
        attach_adapter(transformer, spec, config.train.seed, expert.name, initial)
        return AdapterTraining(
            transformer,
            spec,
            lora_plus_ratio=method.lora_plus_ratio
            if isinstance(method, LoraMethod | DoraMethod)
            else 1.0,
            starts_as_base=start is None,
        )

    def _trainable(
        self, name: TrainableName, what: ExpertMethod | EmbeddingTraining, lr: float
    ) -> Trainable:
        config = self._config
        ema = config.train.ema
        return Trainable(
            name=name,
            weights=what,
            optimizer_name=config.optimizer.name,
            lr=lr,
            optimizer=build_trainable_optimizer(
                what.groups(lr),
                config.optimizer,
                rounding=what.rounding,
                fused=what.fused,
                seed=config.train.seed,
                name=name,
            ),
            ema=None if ema is None else Ema(what.parameters, ema.decay, offload=ema.offload),
        )

    def _embeddings(self, model: WanModel, dataset: Dataset) -> Trainable | None:
        """Put the run file's placeholders into `model`. The `Trainable` of those that train."""
        config = self._config
        if not config.embeddings:
            return None
        assert model.text_encoder is not None
        model.text_encoder.requires_grad_(False)
        model.text_encoder.to(self._device)  # pyright: ignore[reportArgumentType]
        made = [self._embedding(section, model) for section in config.embeddings]
        for embedding in made:
            model.add_embedding(embedding)
        chosen = [
            (embedding, section.lr or config.optimizer.lr)
            for embedding, section in zip(made, config.embeddings, strict=True)
            if section.train
        ]
        self._check_captions([embedding for embedding, _ in chosen], dataset)
        if not chosen:
            return None
        if config.memory.gradient_checkpointing:
            checkpoint_encoder(model.text_encoder)
        return self._trainable("embeddings", EmbeddingTraining(chosen), config.optimizer.lr)

    def _embedding(self, section: ResolvedEmbedding, model: WanModel) -> WanModelEmbedding:
        name, placeholder = section.name, section.placeholder
        if section.init_from is not None:
            made = WanModelEmbedding.from_file(
                section.init_from, placeholder=placeholder, name=name
            )
        else:
            made = WanModelEmbedding.initial(
                model,
                placeholder=placeholder,
                name=name,
                initial_text=section.initial_text,
                token_count=section.token_count,
                is_output_embedding=section.is_output_embedding,
                seed=self._config.train.seed,
            )
        made.to(self._device)
        made.vectors.requires_grad_(section.train)
        return made

    def _check_captions(self, trained: list[WanModelEmbedding], dataset: Dataset) -> None:
        """ConfigError for placeholders that no caption has, which would never train."""
        captions = {caption for clip in dataset.clips for caption in clip.captions}
        absent = [e for e in trained if not _mentioned([e.placeholder], captions)]
        if absent:
            raise ConfigError(
                "run file",
                [
                    f"embeddings: no caption contains {e.placeholder!r}, so it would not train; "
                    "write it into the captions of the clips that show it"
                    for e in absent
                ],
            )

    def _load(self, components: Collection[Component]) -> WanModel:
        """Parts of the run's model for encoding, on the device."""
        model = self._loaded(self._device, components)
        self._vae = model.vae or self._vae
        return model

    def _loaded(self, device: torch.device, components: Collection[Component]) -> WanModel:
        chosen = self._config.model
        model = WanModelLoader().load(
            chosen.sources(),
            chosen.variant,
            self._dtype,
            device,
            components,
            quantized=chosen.quantized,
            check_file_names=chosen.check_file_names,
            boundary=chosen.boundary,
        )
        self._notices |= dict.fromkeys(model.notices)
        return model

    def _model(self, *, needs_sampling: bool) -> WanModel:
        """The transformers that train, the text encoder if placeholders train through it, and with
        `needs_sampling` all that sampling needs, in host memory; the trainer moves to the device
        what is at work."""
        wanted: set[Component] = set(self._transformers(needs_sampling))
        if self._config.embeddings:
            wanted |= {"text_encoder", "tokenizer"}
        if needs_sampling:
            wanted |= {"scheduler"} if self._vae is not None else {"scheduler", "vae"}
        model = self._loaded(torch.device("cpu"), wanted)
        if needs_sampling and self._vae is not None:
            model.vae = self._vae
            if self._config.video_data.cache:
                self._vae.to("cpu")  # pyright: ignore[reportArgumentType]  (diffusers hides self)
        self._vae = None
        return model

    def _transformers(self, needs_sampling: bool) -> set[Placed]:
        """The experts that train, or all of them if videos are sampled."""
        choice = "both" if needs_sampling else self._config.model.experts
        return {expert.component for expert in self._variant.selected(choice)}


def _mentioned(placeholders: Iterable[str], captions: Iterable[str]) -> bool:
    """Whether one of the captions contains one of the placeholders."""
    return any(mentions(caption, p) for caption in captions for p in placeholders)


def resolve_device(wish: str) -> torch.device:
    """The device that `model.device` means; ConfigError if PyTorch does not have it."""
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wish)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            "run file", [f"model.device: {wish!r} can't be used here ({reason}); try auto or cpu"]
        ) from error
    return device
