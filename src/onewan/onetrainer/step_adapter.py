"""One training step of OneTrainer in onewan's terms: whose turn, which noise, what counts.

OneTrainer counts micro-batches (`global_step`); onewan counts optimizer steps and places in their
global batch, which key every draw. So a step here gives the same numbers as the same step of
`onewan train`, whatever it is cut into, and the expert depends on neither the rank nor anything
that would have to be remembered.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from onewan.arithmetic.expert_schedule import ExpertSchedule, expert_schedule
from onewan.config.objective import LossSection
from onewan.data.loader import Batch, StepBatches
from onewan.model.conditioning import Conditioning
from onewan.onetrainer import settings
from onewan.seeds import derive_seed
from onewan.train.objective import NoisedBatch, Objective, objective_of, velocity_loss
from onewan.variants import Expert, Variant

_PURPOSE = "validation"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAdapter:
    """What a OneTrainer config means for the steps of one variant."""

    variant: Variant
    objective: Objective
    schedule: ExpertSchedule
    losses: tuple[tuple[float, LossSection], ...]
    """What is added up: strengths and kinds of loss."""
    temporal_weight: float
    prior_weight: float
    """What the untrained model's prediction counts outside of masks."""
    levels: int
    """Noise levels of each expert at which a clip is validated."""
    accumulation: int
    """Micro-batches in an optimizer step."""

    def expert_at(self, global_step: int, stopped: Collection[str] = ()) -> Expert:
        """Whose turn it is; the same for all micro-batches of an optimizer step.

        Steps of an expert whose component is among the `stopped`, because its training has ended,
        are the other's, if that one trains on.
        """
        turn = self.variant.expert(self.schedule.turn(global_step // self.accumulation)[0])
        others = [self.variant.expert(name) for name in self.schedule.experts if name != turn.name]
        going = [expert for expert in others if expert.component not in stopped]
        return going[0] if turn.component in stopped and going else turn

    def add_noise(
        self, batch: Batch, global_step: int, expert: Expert, *, rank: int = 0, ranks: int = 1
    ) -> NoisedBatch:
        """`batch` at the noise levels of `expert` drawn for this step."""
        size = len(batch)
        micro = global_step % self.accumulation
        placed = replace(batch, first_sample_index=(micro * ranks + rank) * size)
        step = StepBatches(
            number=global_step // self.accumulation,
            expert=expert.name,
            batches=(placed,),
            global_size=size * ranks * self.accumulation,
        )
        return self.objective.noise(placed, step, expert)

    def validation_batches(self, batch: Batch) -> list[tuple[Expert, NoisedBatch]]:
        """`batch` at fixed levels, with fixed noise, for every trained expert."""
        seed = derive_seed(self.objective.seed, _PURPOSE)
        experts = [self.variant.expert(name) for name in self.schedule.experts]
        return [
            (expert, self.objective.fixed(batch, share, expert, seed))
            for expert in experts
            for share in Objective.levels(self.levels)
        ]

    def dropout_seed(self, global_step: int, rank: int = 0) -> int:
        """Of the global generator while a micro-batch is predicted."""
        return derive_seed(self.objective.seed, "dropout", global_step, rank)

    def loss(
        self, sample: NoisedBatch, predicted_BCFHW: Tensor, prior_BCFHW: Tensor | None = None
    ) -> Tensor:
        """A float32 scalar; with `prior_BCFHW` the untrained model's prediction counts where a mask
        leaves the sample out."""
        total = self._sum(sample, predicted_BCFHW)
        if prior_BCFHW is not None and self.prior_weight and sample.counts is not None:
            outside = replace(sample, target=prior_BCFHW.float(), counts=1 - sample.counts)
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

    ConfigError for settings that can't be followed, or that leave an expert without noise levels.
    """
    settings.check(config, variant)
    train = settings.train_section(config)
    objective = objective_of(train, variant, trained)
    return StepAdapter(
        variant=variant,
        objective=objective,
        schedule=expert_schedule(
            trained, train.high_expert_share, train.switch_expert_every, objective.density
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
) -> Batch:
    """A batch as OneTrainer's data loader gives it, as onewan's."""
    condition = {name: items[f"latent_{name}"].float() for name in conditioning.tensor_names}
    mask = items.get("latent_mask")
    return Batch(
        latents=items["latent_image"].float(),
        text=text_BLD,
        captions=tuple(captions),
        condition=conditioning.channels(condition),
        mask=None if mask is None else mask.float(),
        loss_weights=tuple(items["loss_weight"].float().tolist()),
        is_prior=None,
        names=tuple(items["image_path"]),
        first_sample_index=0,
    )
