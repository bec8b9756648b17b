"""One training step of OneTrainer in onewan's terms: the expert, the noise and the loss.

OneTrainer counts micro-batches (`global_step`); onewan counts optimizer steps, and every draw is
seeded by the step and the sample's index in its global batch. So a step here draws the same noise
as the same step of `onewan train`, however it is divided into micro-batches and ranks. The expert
is a function of the step alone: no rank chooses another one, and nothing has to be stored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from onewan.arithmetic.clip_timesteps import ALL_TIMESTEPS
from onewan.arithmetic.condition_shares import Given
from onewan.arithmetic.expert_schedule import ExpertSchedule, expert_schedule
from onewan.arithmetic.timestep_density import official_token_count
from onewan.config.objective import LossSection
from onewan.data.loader import Batch, StepBatches, condition_channels, last_frames
from onewan.model.conditioning import Conditioning, conditioning_of
from onewan.onetrainer import settings
from onewan.onetrainer.clip_adapter import condition_parts
from onewan.seeds import derive_seed
from onewan.train.objective import NoisedBatch, Objective, velocity_loss
from onewan.variants import Expert, Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAdapter:
    """A OneTrainer config's noise, expert schedule and loss, for one variant."""

    variant: Variant
    objective: Objective
    conditioning: Conditioning
    """How often samples are given which frames."""
    schedule: ExpertSchedule
    losses: tuple[tuple[float, LossSection], ...]
    """The losses to add up, each with its weight."""
    temporal_weight: float
    prior_weight: float
    """Loss weight of the base model's own prediction outside the mask."""
    levels: int
    """Timesteps of each expert at which a clip is validated."""
    accumulation: int
    """Micro-batches in an optimizer step."""

    def expert_at(self, global_step: int, stopped: Collection[str] = ()) -> Expert:
        """The expert that is trained; the same for all micro-batches of an optimizer step.

        The steps of an expert whose component is in `stopped`, because its training has ended, go
        to the other expert if that one still trains.
        """
        turn = self.variant.expert(self.schedule.expert_at(global_step // self.accumulation)[0])
        others = [self.variant.expert(name) for name in self.schedule.experts if name != turn.name]
        going = [expert for expert in others if expert.component not in stopped]
        return going[0] if turn.component in stopped and going else turn

    def add_noise(
        self, batch: Batch, global_step: int, expert: Expert, *, rank: int = 0, ranks: int = 1
    ) -> NoisedBatch:
        """`batch` with noise at timesteps of `expert`, both drawn for this step."""
        size = len(batch)
        first = self._first_sample_index(size, global_step, rank, ranks)
        placed = replace(batch, first_sample_index=first)
        step = StepBatches(
            number=global_step // self.accumulation,
            expert=expert.name,
            batches=(placed,),
            global_size=size * ranks * self.accumulation,
        )
        return self.objective.add_noise(placed, step, expert)

    def draw_given(
        self, size: int, frames: int, global_step: int, *, rank: int = 0, ranks: int = 1
    ) -> list[Given]:
        """What each of the `size` samples of a micro-batch, of `frames` frames, is given."""
        first = self._first_sample_index(size, global_step, rank, ranks)
        return [
            self.conditioning.draw(
                frames,
                seed=self.objective.seed,
                step=global_step // self.accumulation,
                index=index,
            )
            for index in range(first, first + size)
        ]

    def _first_sample_index(self, size: int, global_step: int, rank: int, ranks: int) -> int:
        micro = global_step % self.accumulation
        # OneTrainer's ranks run the same micro-batch side by side, so their samples are adjacent.
        return (micro * ranks + rank) * size

    def validation_batches(self, batch: Batch) -> list[tuple[Expert, NoisedBatch]]:
        """`batch` with fixed noise at fixed timesteps of every trained expert."""
        seed = derive_seed(self.objective.seed, "validation")
        experts = [self.variant.expert(name) for name in self.schedule.experts]
        return [
            (expert, self.objective.add_noise_at_quantile(batch, share, expert, seed))
            for expert in experts
            for share in Objective.midpoint_quantiles(self.levels)
        ]

    def dropout_seed(self, global_step: int, rank: int = 0) -> int:
        """For the global generator during a micro-batch's forward pass."""
        return derive_seed(self.objective.seed, "dropout", global_step, rank)

    def loss(
        self, sample: NoisedBatch, predicted_BCFHW: Tensor, prior_BCFHW: Tensor | None = None
    ) -> Tensor:
        """A float32 scalar. With `prior_BCFHW`, the base model's prediction, the loss outside the
        mask is the distance from that."""
        total = self._sum(sample, predicted_BCFHW)
        if prior_BCFHW is not None and self.prior_weight and sample.loss_mask is not None:
            outside = replace(sample, target=prior_BCFHW.float(), loss_mask=1 - sample.loss_mask)
            total = total + self.prior_weight * self._sum(outside, predicted_BCFHW)
        return total

    def _sum(self, sample: NoisedBatch, predicted_BCFHW: Tensor) -> Tensor:
        parts = [
            strength * velocity_loss(predicted_BCFHW, sample, section, self.temporal_weight)
            for strength, section in self.losses
        ]
        return torch.stack(parts).sum() if len(parts) > 1 else parts[0]


def step_adapter_of(config: Any, variant: Variant, trained: Sequence[Expert]) -> StepAdapter:
    """The adapter for `config`, a OneTrainer config, that trains the experts `trained`.

    ConfigError for settings that can't be used, or that leave an expert without timesteps.
    """
    settings.check(config, variant)
    timesteps = settings.timesteps_of(config)
    by_tokens = timesteps.shift_by_tokens
    objective = Objective(
        density=timesteps.density(variant.flow_shift),
        seed=settings.SEED,
        official_token_count=official_token_count(variant) if by_tokens else None,
        weighting=settings.weighting_of(config).function(),
        unmasked_weight=config.unmasked_weight,
        noise_offset=config.offset_noise_weight,
        input_perturbation=config.perturbation_noise_weight,
        clean_frames=variant.has_clean_first_frame,
    )
    objective.require_timesteps(trained)
    return StepAdapter(
        variant=variant,
        objective=objective,
        conditioning=conditioning_of(variant, settings.condition_shares_of(config, variant)),
        schedule=expert_schedule(
            trained, settings.high_share_of(config), config.wan_expert_block, objective.density
        ),
        losses=settings.losses_of(config),
        temporal_weight=config.wan_temporal_consistency_weight,
        prior_weight=config.masked_prior_preservation_weight,
        levels=config.wan_validation_levels,
        accumulation=config.gradient_accumulation_steps,
    )


def batch_of(
    items: Mapping[str, Any],
    text_BLD: Tensor | None,
    captions: Sequence[str],
    conditioning: Conditioning,
    given: Sequence[Given] | None = None,
) -> Batch:
    """A batch of OneTrainer's data loader as onewan's `Batch`, whose samples are `given` frames;
    None: those that most samples are given."""
    latents, mask = items["latent_image"].float(), items.get("latent_mask")
    frames = 1 + (latents.shape[2] - 1) * conditioning.variant.temporal_compression
    usual: list[Given] = [conditioning.usual(frames)] * len(latents)
    chosen = given or usual
    names = condition_parts(conditioning)
    parts = {name: items[f"latent_{name}"].float() for name in names}
    entries = [
        {"latents": latents[place], **{name: part[place] for name, part in parts.items()}}
        for place in range(len(latents))
    ]
    return Batch(
        latents=latents,
        text=text_BLD,
        captions=tuple(captions),
        condition=condition_channels(conditioning, entries, chosen),
        mask=None if mask is None else mask.float(),
        loss_weights=tuple(items["loss_weight"].float().tolist()),
        timesteps=(ALL_TIMESTEPS,) * len(captions),
        is_prior=None,
        names=tuple(items["image_path"]),
        given=tuple(chosen),
        last_frame=last_frames(entries, chosen),
        first_sample_index=0,
    )
