"""One optimizer step, and the loss on a fixed grid: what a run computes, not its bookkeeping."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from onewan.data.loader import Batch, Step
from onewan.errors import TrainingError
from onewan.model.experts import predict_velocity
from onewan.seeds import derive_seed
from onewan.train.objective import Noised, noised, seeded_noise, velocity_loss
from onewan.train.schedule import lr_factor
from onewan.train.setup import DTYPES, Run
from onewan.train.state import TrainedExpert
from onewan.variants import ExpertName

GRID_LEVELS = (0.125, 0.375, 0.625, 0.875)
"""Where in an expert's range the fixed grid measures: midpoints of four equally probable parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """What one optimizer step measured."""

    loss: float
    """Mean over the clips of the step."""
    grad_norm: float
    """Before it was limited."""
    lr: float
    t: tuple[float, ...]
    """Noise level of each clip."""


def train_step(run: Run, step: Step) -> StepMetrics:
    """Forward and backward of each batch of `step`, then one update of its expert.

    TrainingError if the loss or the gradient is not finite; the weights are unchanged then.
    """
    trained = run.activate(step.expert)
    if not trained.transformer.training:
        trained.transformer.train()
    losses: list[Tensor] = []
    levels: list[float] = []
    for cpu_batch in step.batches:
        batch = cpu_batch.to(run.device)
        sample = run.objective.noise(batch, step.number, trained.expert)
        if run.lora.dropout:
            seed = derive_seed(run.config.train.seed, "dropout", step.number, batch.offset)
            torch.manual_seed(seed)
        loss = _loss(run, trained, batch, sample)
        # Each clip weighs the same, also where a bucket's last batch is smaller.
        weighted = loss * (len(batch) / step.size)
        weighted.backward()
        losses.append(weighted.detach())
        levels += sample.levels
    lr = _set_learning_rate(run, trained, step.number)
    limit = run.config.train.max_grad_norm
    norm = torch.nn.utils.clip_grad_norm_(trained.parameters, limit or math.inf)
    # The only wait for the device in a step, and before the weights change.
    *values, norm_value = torch.stack([*losses, norm]).tolist()
    _check_finite(step, values, norm_value)
    trained.optimizer.step()
    trained.optimizer.zero_grad(set_to_none=True)
    return StepMetrics(loss=sum(values), grad_norm=norm_value, lr=lr, t=tuple(levels))


@torch.no_grad()
def grid_loss(run: Run, name: ExpertName, between: Callable[[], None]) -> float:
    """`name`'s mean loss over fixed clips, fixed noise and fixed noise levels.

    The same for the same weights at any step, hence comparable over the whole run. `between` is
    called after each clip, and may raise.
    """
    trained = run.activate(name)
    trained.transformer.eval()
    density, expert = run.objective.density, trained.expert
    losses = []
    for number, cpu_batch in enumerate(run.loader.fixed(run.config.train.grid_clips)):
        batch = cpu_batch.to(run.device)
        for place, share in enumerate(GRID_LEVELS):
            seed = derive_seed(run.config.train.seed, "grid noise", number, place)
            noise = seeded_noise(batch.latents.shape, seed)
            levels = (density.truncated_quantile(share, expert),)
            losses.append(_loss(run, trained, batch, noised(batch.latents, noise, levels)))
        between()
    return torch.stack(losses).mean().item()


def _loss(run: Run, trained: TrainedExpert, batch: Batch, sample: Noised) -> Tensor:
    prediction = predict_velocity(
        trained.transformer,
        sample.x,
        sample.t,
        batch.text,
        condition_BCFHW=batch.condition,
        clean_first_frame_B=sample.clean_first_frame,
        dtype=DTYPES[run.config.model.dtype],
    )
    weight = run.config.wan_config.temporal_consistency_weight
    return velocity_loss(prediction, sample, weight)


def _set_learning_rate(run: Run, trained: TrainedExpert, step: int) -> float:
    choice, name = run.config.train, trained.expert.name
    factor = lr_factor(
        choice.schedule,
        run.schedule.steps_before(step, name),
        run.schedule.steps_before(choice.steps, name),
        choice.warmup_steps,
    )
    lr = run.config.optimizer.lr * factor
    for group in trained.optimizer.param_groups:
        group["lr"] = lr
    return lr


def _check_finite(step: Step, losses: list[float], norm: float) -> None:
    if all(map(math.isfinite, [*losses, norm])):
        return
    bad = [b for b, loss in zip(step.batches, losses, strict=True) if not math.isfinite(loss)]
    names = ", ".join(name for batch in bad or step.batches for name in batch.names)
    raise TrainingError(
        f"step {step.number + 1} ({step.expert} expert): the {'loss' if bad else 'gradient'} is "
        f"not finite with {names}; the weights were not changed and the last saved state is kept. "
        "Look at that clip, or try a lower optimizer.lr"
    )
