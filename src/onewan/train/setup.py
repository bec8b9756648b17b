"""`WanModelSetup`: builds everything that a resolved run file needs for training."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKLWan

from onewan.arithmetic.expert_schedule import ExpertSchedule
from onewan.config.changes import in_force, settings_at
from onewan.config.method import DoraMethod, EmbeddingMethod, LoraMethod
from onewan.config.resolve import condition_shares, expert_schedule_of, with_steps_of_epochs
from onewan.config.rules import warmup_rules
from onewan.config.schema import ResolvedRun
from onewan.data.clip import Clip
from onewan.data.dataset import Dataset, prepare
from onewan.data.encode import ProgressCallback, no_progress
from onewan.data.expert_clips import batches_per_epoch, check_timesteps, clips_by_expert
from onewan.data.loader import WanDataLoader
from onewan.devices import HOST, resolve_device
from onewan.dtypes import torch_dtype
from onewan.errors import ConfigError
from onewan.formats.lora_files import AdapterFile
from onewan.formats.model_folder import ComponentName
from onewan.memory.plan import Plan
from onewan.memory.residency import DeviceResidency
from onewan.model.conditioning import conditioning_of
from onewan.model.load import WanModelLoader
from onewan.model.sources import ENCODERS, PipelineComponent, Sources, is_here, locate
from onewan.model.vae import encode_in_strips
from onewan.model.wan import WanModel
from onewan.parallel.division import Division
from onewan.parallel.environment import local_count
from onewan.parallel.ranks import Alone, Ranks
from onewan.parallel.run_division import division_of
from onewan.sample.generate import SampleRequest
from onewan.train.attention import first_attention, use_attention
from onewan.train.chunks import chosen_chunks
from onewan.train.memory import RunMemory, plan_run, strips_by
from onewan.train.optimizers.builders import inexact_resume_reason
from onewan.train.preflight import check_before_encoding
from onewan.train.previews import distilled_files, preview_overlays
from onewan.train.prompt_texts import PromptTexts
from onewan.train.run import Run, full_sample_requests, objective_of, sample_requests
from onewan.train.state import TrainedExpert, TrainState
from onewan.train.token_sharing import check_tokens, share_tokens
from onewan.train.trainable_setup import (
    attach_embeddings,
    attach_expert,
    check_captions,
    initial_adapters,
    mentions_any,
)
from onewan.variants import ExpertName

if TYPE_CHECKING:  # a run of one process imports nothing of torch.distributed
    from onewan.parallel.shards import ShardGroup


class WanModelSetup:
    """Builds the run of one resolved run file."""

    def __init__(
        self,
        config: ResolvedRun,
        chunks: Mapping[str, int] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """`chunks` are those of a run that is resumed (`onewan.train.chunks`). `ranks` are the
        processes of the run; None if this is the only one."""
        self._config = config
        self._ranks: Ranks = Alone() if ranks is None else ranks
        self._chunks = chunks
        self._variant = config.model.facts()
        self._experts = self._variant.selected(config.model.experts)
        self._residency = DeviceResidency(resolve_device(config.model.device))
        self._dtype = torch_dtype(config.model.dtype)
        self._notices: dict[str, None] = {}  # an ordered set: each notice once
        self._sources: Sources | None = None
        """Files of the model, once they are checked."""
        self._trains = True
        """Whether the processes are those that train the run."""
        self._encoding_plan: Plan | None = None
        """The plan before anything is encoded; None on the CPU."""

    def check(self, *, download: bool = True) -> Sources:
        """Refuse what the run file and the headers of files show to be wrong, before anything is
        written or encoded; the files of the model. Downloads a model that is named by its
        repository; without `download` what is not here is checked as far as the variant tells."""
        division_of(self._config, self._ranks.count)
        samples, initial = sample_requests(self._config), initial_adapters(self._config)
        return self._checked_sources(samples, initial, download=download)

    def check_clips(self, clips: Sequence[Clip]) -> tuple[ResolvedRun, Plan | None]:
        """The run file with the steps that its epochs are with these training clips, and the plan;
        None on the CPU. Refuses clips that can't be trained on, and a run that does not fit."""
        check_captions(self._config, clips)
        config = self._with_known_steps(clips)
        check_tokens(config, clips, self._sequence)
        return config, self._plan(config, clips)

    def _plan(self, config: ResolvedRun, clips: Sequence[Clip]) -> Plan | None:
        """As `plan_run`. Processes that share the tokens of clips have the same plan: it decides
        what they exchange, and in which order."""
        same, ranks = self._sequence > 1, self._ranks
        if not self._trains:
            try:
                division_of(config, ranks.count)
            except ConfigError:  # so many can encode what they can't train
                ranks = None
        return plan_run(config, self._residency.device, clips, self._chunks, ranks, same=same)

    @property
    def _division(self) -> Division:
        return division_of(self._config, self._ranks.count)

    @property
    def _sequence(self) -> int:
        """The number of processes that share the tokens of a clip."""
        return self._division.sequence if self._trains else 1

    @property
    def initial_digests(self) -> dict[ExpertName, str]:
        """Digests of the adapters that the run starts from."""
        return {name: file.digest() for name, file in initial_adapters(self._config).items()}

    def dataset(
        self, samples: list[SampleRequest], progress: ProgressCallback, *, verify: bool = False
    ) -> Dataset:
        """The data set with every missing entry encoded, which is all that `onewan cache` does.
        Any number of processes can encode it, also more than could train the run."""
        self._trains = False
        initial = initial_adapters(self._config)
        dataset, _ = self._encode_dataset(samples, initial, progress, verify=verify)
        return dataset

    def build(self, progress: ProgressCallback = no_progress) -> Run:
        """The run before its first step: encoded, loaded, with adapters and optimizers attached.

        The models that encode the data set are freed before those to train are loaded; only the
        VAE is used again, for sampling.
        """
        samples = sample_requests(self._config)
        initial = initial_adapters(self._config)
        self._notices |= dict.fromkeys(n for file in initial.values() for n in file.notices)
        dataset, vae = self._encode_dataset(samples, initial, progress)
        recorded = self._config = self._with_known_steps(dataset.clips)
        config = in_force(recorded, -1)
        vae = vae if samples else None
        if vae is not None and config.video_data.cache:  # without one it encodes in every step
            self._residency.release(vae)
        # Again, without the clips that could not be encoded.
        memory = self._memory(self._plan(config, [*dataset.clips, *dataset.validation_clips]))
        model = self._load_for_training(vae, needs_sampling=bool(samples))
        del vae  # freed before adapters and optimizers are built, unless sampling needs it
        objective = objective_of(config.train, self._variant, self._experts)
        schedule = expert_schedule_of(config)
        embeddings = attach_embeddings(config, model, dataset.clips, self._residency)
        experts: dict[ExpertName, TrainedExpert] = {
            expert.name: attach_expert(
                config, model, expert, initial.get(expert.name), self._residency, memory
            )
            for expert in self._experts
        }
        self._place_untrained(model, memory)
        head_dim = next(iter(experts.values())).transformer.config["attention_head_dim"]
        overlays, notices = preview_overlays(config, model)
        self._notices |= dict.fromkeys(notices)
        run = Run(
            config=config,
            recorded=recorded,
            model=model,
            residency=self._residency,
            memory=memory,
            dataset=dataset,
            loader=self._loader(dataset),
            objective=objective,
            schedule=schedule,
            state=TrainState(
                experts=experts,
                embeddings=embeddings,
                feed_forward_chunks=chosen_chunks(memory, dataset.clips),
            ),
            samples=samples,
            full_samples=full_sample_requests(config),
            distilled=overlays,
            prompt_text=self._prompt_texts(dataset, model),
            attention=first_attention(config, self._residency.device, head_dim),
            dropout=self._dropout,
            warnings=[*self._notices, *self._warnings(schedule, dataset)],
            ranks=self._ranks,
            division=self._division,
        )
        use_attention(run, run.attention)
        share_tokens(run)
        return run

    @property
    def _dropout(self) -> bool:
        method = self._config.method
        return isinstance(method, LoraMethod | DoraMethod) and method.dropout > 0

    def _prompt_texts(self, dataset: Dataset, model: WanModel) -> PromptTexts:
        assert self._sources is not None
        return PromptTexts(
            dataset.source,
            self._sources.paths["text_encoder"],
            lambda: self._load(HOST, ("text_encoder", "tokenizer")),
            model,
            self._residency,
        )

    def _shard_group(self) -> ShardGroup | None:
        """Prepare the groups of processes that send each other something; those that have shards of
        the same weights as this one, None if weights are not sharded."""
        division = self._division
        self._ranks.prepare(division.connected)
        if not division.is_sharded:
            return None
        members = division.group_of(self._ranks.rank).ranks
        shards = len(members)
        if division.weights == "sharded_per_machine":
            shards = min(shards, local_count())
        if len(members) % shards:
            raise ConfigError(
                "run file",
                [
                    "parallel.weights: can't be sharded_per_machine with "
                    f"{len(members)} processes for an expert and {shards} on this machine; start "
                    "as many on each, or choose sharded"
                ],
            )
        return self._ranks.shard_group(members, shards)

    def _memory(self, plan: Plan | None) -> RunMemory:
        return RunMemory(
            self._config,
            self._residency.device,
            plan,
            dropout=self._dropout,
            notices=self._notices,
            shards=self._shard_group(),
            ranks=self._ranks,
        )

    def _place_untrained(self, model: WanModel, memory: RunMemory) -> None:
        """Place the experts that are loaded for sampling only as those that are trained."""
        for expert in self._variant.experts:
            transformer = getattr(model, expert.component)
            if expert not in self._experts and transformer is not None:
                placement = memory.add(transformer)
                self._residency.manage(transformer, alternating=True, placement=placement)

    def load_encoders(self, components: Collection[PipelineComponent]) -> WanModel:
        """The given components of the run's model for encoding, loaded onto the device."""
        model, plan = self._load(self._residency.device, components), self._encoding_plan
        if model.vae is not None and plan is not None:
            encode_in_strips(model.vae, strips_by(plan))
        return model

    def _encode_dataset(
        self,
        samples: list[SampleRequest],
        initial: Mapping[ExpertName, AdapterFile],
        progress: ProgressCallback,
        *,
        verify: bool = False,
    ) -> tuple[Dataset, AutoencoderKLWan | None]:
        """The data set, and the VAE if one was loaded for it: sampling can use it again."""
        vae: AutoencoderKLWan | None = None

        def load(components: Collection[PipelineComponent]) -> WanModel:
            nonlocal vae
            model = self.load_encoders(components)
            vae = model.vae or vae
            return model

        sources = self._checked_sources(samples, initial)
        later = [s for config in settings_at(self._config) for s in sample_requests(config)]
        texts = {text for s in later for text in (s.prompt, s.negative_prompt)}
        dataset = prepare(
            self._config,
            sources.paths,
            load,
            extra_prompts=sorted(texts),  # the order of a set differs between processes
            encode_text_online=bool(self._config.embeddings),
            progress=progress,
            verify=verify,
            check_clips=self._before_encoding,
        )
        return self._of_all_processes(dataset), vae

    def _of_all_processes(self, dataset: Dataset) -> Dataset:
        """The data set, which all have, with what each of them has encoded and noticed."""
        found = self._ranks.gathered((dataset.encoded, dataset.report.warnings))
        warnings = dict.fromkeys(warning for _, noticed in found for warning in noticed)
        report = replace(dataset.report, warnings=tuple(warnings))
        return replace(dataset, encoded=sum(encoded for encoded, _ in found), report=report)

    def _checked_sources(
        self,
        samples: list[SampleRequest],
        initial: Mapping[ExpertName, AdapterFile],
        *,
        download: bool = True,
    ) -> Sources:
        """The files of the model, checked once."""
        if self._sources is None:
            given = self._config.model.sources()
            sources = locate(given, ENCODERS, download=download)
            # Hours of encoding must not end in a transformer that is missing.
            transformers = self._needed_transformers(needs_sampling=bool(samples))
            if download or all(is_here(value) for value in given.values()):
                sources.require({*ENCODERS, *(transformers - given.keys())}, self._variant)
            check_before_encoding(
                self._config,
                sources,
                {*ENCODERS, *transformers},
                initial,
                distilled_files(self._config),
                self._residency.device,
                self._sequence,
            )
            self._sources = sources
        return self._sources

    def _before_encoding(self, clips: Sequence[Clip]) -> None:
        """Refuse, before anything is encoded, clips that can't be trained on."""
        if clips:  # that there are none is reported with the reasons
            _, self._encoding_plan = self.check_clips(clips)

    def _with_known_steps(self, clips: Sequence[Clip]) -> ResolvedRun:
        """The run file with the steps that its epochs are with these training clips.

        ConfigError for what could not be checked without the clips.
        """
        check_timesteps(self._config, clips)
        own_clips = clips_by_expert(self._experts, clips)
        counts = batches_per_epoch(own_clips, self._config.train.batch_size)
        config = with_steps_of_epochs(self._config, counts)
        if problems := [f"{field}: {text}" for field, text in warmup_rules(config)]:
            raise ConfigError("run file", problems)
        return config

    def _load_for_training(self, vae: AutoencoderKLWan | None, *, needs_sampling: bool) -> WanModel:
        """The transformers, the text encoder if embeddings are used, and for sampling the VAE.

        Everything is loaded into host memory; `Run.residency` brings it to the device. `vae` is the
        one that encoded the data set.
        """
        config = self._config
        components: set[PipelineComponent] = set(
            self._needed_transformers(needs_sampling=needs_sampling)
        )
        if config.embeddings:
            components |= {"text_encoder", "tokenizer"}
        if needs_sampling:
            components |= {"scheduler"} if vae is not None else {"scheduler", "vae"}
        model = self._load(HOST, components)
        if vae is not None:
            model.vae = vae
        return model

    def _load(self, device: torch.device, components: Collection[PipelineComponent]) -> WanModel:
        section = self._config.model
        model = WanModelLoader().load(
            section.sources(),
            section.variant,
            self._dtype,
            device,
            components,
            weights=self._config.memory.weights,
            check_file_names=section.check_file_names,
            boundary=section.boundary,
        )
        self._notices |= dict.fromkeys(model.notices)
        return model

    def _needed_transformers(self, *, needs_sampling: bool) -> set[ComponentName]:
        """The experts that are trained, or all of them if videos are sampled."""
        choice = "both" if needs_sampling else self._config.model.experts
        return {expert.component for expert in self._variant.selected(choice)}

    def _loader(self, dataset: Dataset) -> WanDataLoader:
        train = self._config.train
        return WanDataLoader(
            clips_by_expert(self._experts, dataset.clips),
            dataset.source,
            conditioning_of(self._variant, condition_shares(self._config)),
            batch_size=train.batch_size,
            accumulation=train.accumulation,
            seed=train.seed,
            caption_dropout=train.caption_dropout,
            encode_text_online=bool(self._config.embeddings),
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
            idle = [c for c in dataset.clips if not mentions_any(trained, c.captions)]
            if idle:
                names = [clip.name for clip in idle[:3]] + ["..."] * (len(idle) > 3)
                warnings.append(
                    f"{len(idle)} of {len(dataset.clips)} clips have no caption with a trained "
                    f"placeholder, so nothing is learned from them ({', '.join(names)})"
                )
        division = self._division
        if self._dropout and division.sequence > 1:
            warnings.append(
                f"{division.sequence} processes share the tokens of a clip, so method.dropout "
                "drops other values than in a run of one process"
            )
        parts = division.parts
        if self._dropout and division.sequence == 1 and parts > config.train.accumulation:
            warnings.append(
                f"{parts} processes share a batch, so method.dropout drops other values than in a "
                f"run of one process; with train.accumulation={parts} or more each has whole "
                "batches, and the same values"
            )
        if reason := inexact_resume_reason(config.optimizer):
            warnings.append(
                f"a resumed run may differ from an uninterrupted one in its last bits: {reason}"
            )
        return warnings
