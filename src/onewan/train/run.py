"""`Run`: a built run, which trainer, training step and validation share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from onewan.adapters.overlay import Overlay
from onewan.arithmetic.expert_schedule import ExpertSchedule
from onewan.arithmetic.timestep_density import official_token_count
from onewan.config.schema import ResolvedRun, TrainSection
from onewan.data.clip import count_clips
from onewan.data.dataset import Dataset
from onewan.data.loader import Batch, WanDataLoader
from onewan.data.report import count
from onewan.memory.residency import DeviceResidency
from onewan.model.attention_backends import AttentionBackend
from onewan.model.wan import WanModel
from onewan.parallel.division import Division, Group, Part
from onewan.parallel.ranks import Ranks
from onewan.runs.layout import unused
from onewan.sample.generate import SampleRequest, check_request
from onewan.train.memory import RunMemory
from onewan.train.objective import Objective
from onewan.train.state import Trainable, TrainableName, TrainedExpert, TrainState
from onewan.variants import Expert, ExpertName, Variant


@dataclass(kw_only=True)
class Run:
    """What `onewan.train.setup.WanModelSetup` builds from a run file."""

    config: ResolvedRun
    """The settings of the present step."""
    recorded: ResolvedRun
    """Those of the whole run, as its states and its folder have them: the settings that it began
    with, and their changes."""
    model: WanModel
    residency: DeviceResidency
    """Decides what is on the device; it moves optimizer state and averages with their expert."""
    memory: RunMemory
    """Runs the blocks of the transformers as the memory plan says."""
    dataset: Dataset
    loader: WanDataLoader
    objective: Objective
    schedule: ExpertSchedule
    state: TrainState
    samples: list[SampleRequest]
    full_samples: list[SampleRequest]
    """The same videos without distilled LoRAs; empty unless they are wanted besides."""
    distilled: dict[ExpertName, Overlay]
    """The distilled LoRAs that `samples` are made with, if any."""
    prompt_text: Callable[[str], Tensor]
    """The embedding [length, dim] of a sample's prompt, from the cache or encoded now."""
    attention: AttentionBackend
    """Computes attention in all transformers; `train.attention.use_attention` replaces it."""
    dropout: bool
    """Whether a forward pass in training draws dropout from torch's global generator."""
    warnings: list[str]
    """Messages for the user before the first step, a line each."""
    ranks: Ranks
    """The processes of the run."""
    division: Division
    """What each of them does."""

    @property
    def device(self) -> torch.device:
        """The device of forward and backward passes."""
        return self.residency.device

    @property
    def group(self) -> Group:
        """The processes that train the same experts as this one."""
        return self.division.group_of(self.ranks.rank)

    @property
    def part(self) -> Part:
        """Which part of a step's clips this process has."""
        return self.group.part(self.ranks.rank)

    @property
    def tokens(self) -> Part:
        """Which part of the tokens of these clips it has."""
        return self.group.tokens(self.ranks.rank)

    def trained_by(self, group: Group) -> list[Trainable]:
        """What the processes of `group` train."""
        found = (self.state.experts[name].trainable for name in group.experts)
        return [trainable for trainable in found if trainable is not None]

    def bring_together(self) -> None:
        """Give the first process what others have trained, which then has the whole state."""
        if self.division.is_sharded:  # whoever has shards writes them
            return
        for group in self.division.groups[1:]:
            trained, own = self.trained_by(group), None
            if self.ranks.rank == group.first:
                own = {str(trainable.name): trainable.values() for trainable in trained}
            if values := self.ranks.taken_by_first(group.first, own):
                for trainable in trained:
                    trainable.use(values[trainable.name], f"rank {group.first}")

    def bring_expert(self, name: ExpertName) -> TrainedExpert:
        """The expert `name`, ready on the device with its optimizer state and averages. The other
        expert leaves the device if `memory.offload_inactive_expert` is set."""
        expert = self.state.experts[name]
        self.residency.bring(expert.transformer)
        return expert

    def together(self, batches: Sequence[Batch]) -> list[list[Batch]]:
        """The batches of a step in groups that go through the transformer together."""
        if self.dropout:  # masks are drawn batch by batch
            return [[batch] for batch in batches]
        return self.memory.together(batches)

    def text(self, batch: Batch) -> Tensor:
        """[B, 512, dim] embeddings of the batch's captions: from the cache, or, if placeholders are
        trained, from the text encoder now, so that gradients reach their vectors."""
        if batch.text is not None:
            return batch.text
        return self.model.encode_text(batch.captions)

    def lr_factor(self, trainable: TrainableName, step: int) -> float:
        """The factor of `trainable`'s learning rates at `step` of the run.

        An expert's schedule runs over the steps that train it, that of embeddings over all steps.
        """
        train = self.config.train
        return train.lr_schedule().factor(
            self.steps_before(trainable, step), self.steps_before(trainable, train.steps)
        )

    def steps_before(self, trainable: TrainableName, step: int) -> int:
        """The number of the steps 0 .. `step`-1 that train `trainable`."""
        return step if trainable == "embeddings" else self.schedule.steps_before(step, trainable)

    def steps_of_epochs(self, epochs: int) -> str:
        """What `epochs` of the run file are in steps, as a line for the user."""
        steps, clips = self.config.train.steps, count(count_clips(self.dataset.clips), "clip")
        line = f"{count(epochs, 'epoch')} of {clips}: {count(steps, 'step')}"
        if len(self.state.experts) == 1:
            return line
        counts = {name: self.steps_before(name, steps) for name in self.state.experts}
        if len(set(counts.values())) == 1:
            return f"{line}, {steps // 2} for each expert"
        return f"{line}, " + ", ".join(f"{n} for the {name} expert" for name, n in counts.items())

    def validation_batches(self) -> list[Batch]:
        """Batches of one clip each, to compare losses on: held-out clips if there are any. Clips
        for prior preservation are left out, since their target is the base model's prediction."""
        trained = tuple(clip for clip in self.dataset.clips if not clip.is_prior)
        # If all clips are prior clips, their loss is better than none.
        clips = self.dataset.validation_clips or trained or self.dataset.clips
        return self.loader.validation_batches(clips, self.config.validation.clips)


def sample_requests(config: ResolvedRun) -> list[SampleRequest]:
    """The sample videos that the run file's `sample.prompts` ask for, with `sample.distilled`, if
    it is given, in a few steps.

    ConfigError for a request that the variant can't fulfill, before anything is loaded.
    """
    requests, distilled = _requests(config), config.sample.distilled
    if distilled is not None:
        few = (distilled.steps, distilled.guidance, distilled.shift)
        requests = [request.in_few_steps(*few) for request in requests]
    for request in requests:
        check_request(request, config.model.facts())
    return requests


def full_sample_requests(config: ResolvedRun) -> list[SampleRequest]:
    """The same videos without distilled LoRAs, if `sample.distilled.full_every` asks for them."""
    distilled = config.sample.distilled
    if distilled is None or distilled.full_every is None:
        return []
    requests = _requests(config)
    for request in requests:
        check_request(request, config.model.facts())
    return requests


def _requests(config: ResolvedRun) -> list[SampleRequest]:
    sample = config.sample
    return [
        SampleRequest(
            prompt=entry.prompt,
            negative_prompt=sample.negative_prompt
            if entry.negative_prompt is None
            else entry.negative_prompt,
            image=entry.image,
            last_image=entry.last_image,
            control=entry.control,
            reference=entry.reference,
            width=sample.width,
            height=sample.height,
            frames=sample.frames,
            steps=sample.steps,
            guidance=sample.guidance,
            shift=sample.shift,
            seed=sample.seed if entry.seed is None else entry.seed,
            fps=sample.fps,
        )
        for entry in sample.prompts
    ]


def objective_of(train: TrainSection, variant: Variant, experts: Sequence[Expert]) -> Objective:
    """The objective that the run file's `train` configures for `variant`.

    ConfigError if one of the trained `experts` would get no noise levels, or only ones of weight 0.
    """
    by_tokens = train.timesteps.shift_by_tokens
    objective = Objective(
        density=train.timesteps.density(variant.flow_shift),
        seed=train.seed,
        official_token_count=official_token_count(variant) if by_tokens else None,
        stratified=train.timesteps.stratified,
        weighting=train.loss.weighting.function(),
        unmasked_weight=train.loss.unmasked_weight,
        noise_offset=train.noise_offset,
        input_perturbation=train.input_perturbation,
        clean_frames=variant.has_clean_first_frame,
        first_frame_noise=train.first_frame_noise if variant.has_clean_first_frame else None,
    )
    objective.require_timesteps(experts)
    return objective


def run_folder(config: ResolvedRun) -> Path:
    """The folder of the run."""
    return config.output.dir / config.output.name


def with_unused_name(config: ResolvedRun) -> ResolvedRun:
    """The same run as a new one: under its own name, or under the first of NAME-2, NAME-3, ... that
    is not used yet."""
    name = unused(run_folder(config)).name
    return config.model_copy(update={"output": config.output.model_copy(update={"name": name})})
