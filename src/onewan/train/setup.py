"""`WanModelSetup`: a run file -> everything that training needs, built and in its place."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from onewan.adapters.lora import LoraSpec, adapter_parameters, attach_lora
from onewan.adapters.select import select_layers, select_modules
from onewan.config.schema import RunConfig
from onewan.data.encode import Dataset, Progress, prepare, silent
from onewan.data.loader import WanDataLoader
from onewan.errors import ConfigError
from onewan.model.attention import attend_within_frames
from onewan.model.load import WanModelLoader
from onewan.model.sources import ENCODERS, Component, Placed, locate
from onewan.model.wan import WanModel
from onewan.sample.generate import SampleRequest, requests_from
from onewan.train.objective import Objective, TimestepDensity
from onewan.train.optim import build_optimizer
from onewan.train.schedule import ExpertSchedule, expert_schedule
from onewan.train.state import TrainedExpert, TrainState
from onewan.variants import VARIANTS, ExpertName

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(kw_only=True)
class Run:
    """One run, built: what the trainer works with."""

    config: RunConfig
    device: torch.device
    model: WanModel
    dataset: Dataset
    loader: WanDataLoader
    objective: Objective
    schedule: ExpertSchedule
    lora: LoraSpec
    state: TrainState
    samples: list[SampleRequest]
    warnings: list[str]
    """What the user should know before the first step."""
    active: ExpertName | None = None
    """The expert that is on the device."""

    def activate(self, name: ExpertName) -> TrainedExpert:
        """The expert `name`, on the device, ready to train; others may be sent to the host."""
        chosen = self.state.experts[name]
        if self.active != name:  # going through all weights costs milliseconds in every step
            if self.config.memory.offload_inactive_expert:
                for other, trained in self.state.experts.items():
                    if other != name:
                        trained.to(torch.device("cpu"))
            chosen.to(self.device)
            self.active = name
        return chosen


class WanModelSetup:
    """Builds the run of one resolved run file."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._variant = VARIANTS[config.model.variant]
        self._device = pick_device(config.model.device)
        self._dtype = DTYPES[config.model.dtype]
        self._vae: AutoencoderKLWan | None = None
        self._notices: dict[str, None] = {}  # in order, each once

    def dataset(
        self, samples: list[SampleRequest], progress: Progress, *, verify: bool = False
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
            progress=progress,
            verify=verify,
        )

    def build(self, progress: Progress = silent) -> Run:
        """Encode, load, attach: the run before its first step. Stages that need much memory follow
        one another, and what training does not need is let go in between."""
        config = self._config
        samples = requests_from(config)
        dataset = self.dataset(samples, progress)
        model = self._model(needs_sampling=bool(samples))
        lora = self._lora_spec(model)
        experts = self._variant.selected(config.model.experts)
        density = TimestepDensity(
            distribution=config.train.timesteps.distribution,
            shift=config.train.timesteps.shift or self._variant.flow_shift,
            mean=config.train.timesteps.mean,
            std=config.train.timesteps.std,
        )
        schedule = expert_schedule(
            experts, config.train.high_share, config.train.expert_block, density
        )
        warnings = [
            *self._notices,
            *(
                f"the {name} expert gets none of the {config.train.steps} steps; see "
                f"train.expert_block ({config.train.expert_block}) and train.high_share"
                for name in schedule.experts
                if not schedule.steps_before(config.train.steps, name)
            ),
        ]
        trained = {}
        for expert in experts:
            transformer = model.expert(expert)
            attach_lora(transformer, lora, config.train.seed, expert.name)
            if config.memory.gradient_checkpointing:
                transformer.enable_gradient_checkpointing()
            if not config.wan_config.use_temporal_attention:
                attend_within_frames(transformer)
            parameters = list(adapter_parameters(transformer).values())
            trained[expert.name] = TrainedExpert(
                expert=expert,
                transformer=transformer,
                parameters=parameters,
                optimizer=build_optimizer(parameters, config.optimizer),
            )
        clean_share = config.train.first_frame_probability
        return Run(
            config=config,
            device=self._device,
            model=model,
            dataset=dataset,
            loader=WanDataLoader(
                dataset.clips,
                dataset.source,
                batch_size=config.train.batch_size,
                accumulation=config.train.accumulation,
                seed=config.train.seed,
            ),
            objective=Objective(
                density=density,
                seed=config.train.seed,
                first_frame_probability=clean_share
                if self._variant.condition == "first_frame_clean"
                else 0.0,
            ),
            schedule=schedule,
            lora=lora,
            state=TrainState(experts=trained),
            samples=samples,
            warnings=warnings,
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
            quantised=chosen.quantised,
            check_names=chosen.check_names,
        )
        self._notices |= dict.fromkeys(model.notices)
        return model

    def _model(self, *, needs_sampling: bool) -> WanModel:
        """The transformers that train, and with `needs_sampling` all that sampling needs, in host
        memory; the trainer moves to the device what is at work."""
        wanted: set[Component] = set(self._transformers(needs_sampling))
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

    def _lora_spec(self, model: WanModel) -> LoraSpec:
        method = self._config.method
        first = model.expert(self._variant.selected(self._config.model.experts)[0])
        return LoraSpec(
            rank=method.rank,
            alpha=method.alpha or method.rank,
            dropout=method.dropout,
            modules=select_modules(method.modules),
            layers=select_layers(
                self._config.wan_config.transformer_layers_to_train, first.config["num_layers"]
            ),
        )


def pick_device(wish: str) -> torch.device:
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


def run_folder(config: RunConfig) -> Path:
    """The folder of a resolved run file's run."""
    if config.output.name is None:
        raise ValueError("the run file has not been resolved; read it with onewan.config.load_run")
    return config.output.dir / config.output.name
