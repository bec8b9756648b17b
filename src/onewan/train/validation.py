"""The loss on fixed clips, fixed noise and fixed timesteps: equal weights give bit-exact results.

It is comparable over the whole run, between runs on the same clips, and with the base model. It is
the run's own objective (loss, masks, weighting) without its random parts: no dropout, no noise
offset, always the first caption of each clip, and the frames of it that most samples are given.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from onewan.data.loader import Batch
from onewan.seeds import derive_seed
from onewan.train.run import Run
from onewan.train.state import TrainedExpert, WeightSet
from onewan.train.step import NoisedInputs, compute_loss, predict
from onewan.variants import ExpertName


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLosses:
    """An expert's mean validation loss with each set of its weights."""

    trained: float
    ema: float | None
    """None without a moving average."""
    base: float | None
    """Of the base model; None if it was not measured."""


def expert_losses(
    run: Run, name: ExpertName, *, with_base: bool, between: Callable[[], None]
) -> ExpertLosses:
    """Measure `name`'s losses, with `with_base` also that of the base model.

    `between` is called after each clip, and may raise to stop.
    """
    trained_loss = validation_loss(run, name, "trained", between)
    averaged = any(trainable.ema is not None for trainable in run.state.trainables)
    ema = validation_loss(run, name, "ema", between) if averaged else None
    base = None
    if with_base:
        method = run.state.experts[name].method
        starts_as_base = run.state.step == 0 and (method is None or method.starts_as_base)
        # A new adapter does not change the model, so the two losses are equal and one is enough.
        base = trained_loss if starts_as_base else validation_loss(run, name, None, between)
    return ExpertLosses(trained=trained_loss, ema=ema, base=base)


def validation_loss(
    run: Run, name: ExpertName, weight_set: WeightSet | None, between: Callable[[], None]
) -> float:
    """`name`'s mean loss with one set of its weights, or with those of the base model for None.

    `between` is called after each clip, and may raise; the weights are restored in any case.
    """
    trained = run.bring_expert(name)
    # No dropout; the next training step sets training mode again.
    trained.transformer.eval()
    with ExitStack() as weights, torch.no_grad():
        for context in _contexts(run, trained, weight_set):
            weights.enter_context(context)
        losses = []
        for number, cpu_batch in enumerate(run.validation_batches()):
            run.memory.use_for([cpu_batch.latents])
            losses += _clip_losses(run, trained, number, cpu_batch.to(run.device))
            between()
        # One transfer for all clips, since each transfer waits for the device.
        return torch.stack(losses).mean().item()


def _contexts(
    run: Run, trained: TrainedExpert, weight_set: WeightSet | None
) -> list[AbstractContextManager[None]]:
    """Contexts in which the model computes with the set of weights."""
    if weight_set is None:
        return [trained.base()]
    trainables = run.state.trainables_of(trained.expert.name)
    return [trainable.using(weight_set) for trainable in trainables]


def _clip_losses(run: Run, trained: TrainedExpert, number: int, batch: Batch) -> list[Tensor]:
    """The loss of clip `number` at each validation timestep, float32 scalars."""
    text = run.text(batch)
    losses = []
    quantiles = run.objective.midpoint_quantiles(run.config.validation.timesteps)
    for index, quantile in enumerate(quantiles):
        # "grid noise" is part of the seed: another string would give other noise.
        seed = derive_seed(run.config.train.seed, "grid noise", number, index)
        sample = run.objective.add_noise_at_quantile(batch, quantile, trained.expert, seed)
        (prediction,) = predict(run, trained, [NoisedInputs(batch, sample, text)])
        losses.append(compute_loss(run, sample, prediction))
    return losses
