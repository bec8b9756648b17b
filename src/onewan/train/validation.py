"""The loss on fixed clips, fixed noise and fixed timesteps: equal weights give bit-exact results.

It is comparable over the whole run, between runs on the same clips, and with the base model. It is
the run's own objective (loss, masks, weighting) without its random parts: no dropout, no noise
offset, always the first caption of each clip, and the frames of it that most samples are given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from onewan.data.loader import Batch
from onewan.seeds import derive_seed
from onewan.train.run import Run
from onewan.train.state import TrainedExpert, WeightSet
from onewan.train.step import NoisedInputs, compute_loss, predict
from onewan.variants import ExpertName

ClipLosses: TypeAlias = Mapping[int, Sequence[float]]
"""The losses of clips at each validation timestep, by the clips' numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredClips:
    """An expert's losses on this process's part of the validation clips, with each set of its
    weights."""

    trained: ClipLosses
    ema: ClipLosses | None
    """None without a moving average."""
    base: ClipLosses | None
    """Of the base model; None if it was not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLosses:
    """An expert's mean validation losses, with the sets of weights of `MeasuredClips`."""

    trained: float
    ema: float | None
    base: float | None

    @classmethod
    def of(cls, parts: Sequence[MeasuredClips]) -> ExpertLosses:
        """Those of all parts of the clips."""
        return cls(
            trained=mean_loss([part.trained for part in parts]),
            ema=_mean_if_any([part.ema for part in parts]),
            base=_mean_if_any([part.base for part in parts]),
        )


def measure(
    run: Run, name: ExpertName, *, with_base: bool, between: Callable[[], None]
) -> MeasuredClips:
    """Measure `name`'s losses, with `with_base` also those of the base model.

    `between` is called after each clip, and may raise to stop.
    """
    trained_losses = clip_losses(run, name, "trained", between)
    averaged = any(trainable.ema is not None for trainable in run.state.trainables)
    ema = clip_losses(run, name, "ema", between) if averaged else None
    base = None
    if with_base:
        method = run.state.experts[name].method
        starts_as_base = run.state.step == 0 and (method is None or method.starts_as_base)
        # A new adapter does not change the model, so the two losses are equal and one is enough.
        base = trained_losses if starts_as_base else clip_losses(run, name, None, between)
    return MeasuredClips(trained=trained_losses, ema=ema, base=base)


def mean_loss(parts: Sequence[ClipLosses]) -> float:
    """The mean over all clips and timesteps."""
    losses = {number: values for part in parts for number, values in part.items()}
    # In the order of the clips, so that the sum has the same bits for any number of processes.
    values = [value for number in sorted(losses) for value in losses[number]]
    return torch.tensor(values).mean().item()


def _mean_if_any(parts: Sequence[ClipLosses | None]) -> float | None:
    measured = [part for part in parts if part is not None]
    return mean_loss(measured) if measured else None


def clip_losses(
    run: Run, name: ExpertName, weight_set: WeightSet | None, between: Callable[[], None]
) -> ClipLosses:
    """`name`'s losses on this process's clips with one set of its weights, or with those of the
    base model for None.

    `between` is called after each clip, and may raise; the weights are restored in any case.
    """
    trained = run.bring_expert(name)
    # No dropout; the next training step sets training mode again.
    trained.transformer.eval()
    losses = dict[int, Tensor]()
    with ExitStack() as weights, torch.no_grad():
        for context in _contexts(run, trained, weight_set):
            weights.enter_context(context)
        batches = list(enumerate(run.validation_batches()))
        for number, cpu_batch in batches[run.part.number :: run.part.count]:
            run.memory.use_for([cpu_batch.latents])
            batch = cpu_batch.to(run.device)
            losses[number] = torch.stack(_losses_of(run, trained, number, batch))
            between()
        run.memory.finish_passes()  # others may have more clips
    # One transfer for all clips, since each transfer waits for the device.
    values = torch.stack(list(losses.values())).tolist() if losses else []
    return dict(zip(losses, values, strict=True))


def _contexts(
    run: Run, trained: TrainedExpert, weight_set: WeightSet | None
) -> list[AbstractContextManager[None]]:
    """Contexts in which the model computes with the set of weights."""
    if weight_set is None:
        return [trained.base()]
    trainables = run.state.trainables_of(trained.expert.name)
    return [trainable.using(weight_set) for trainable in trainables]


def _losses_of(run: Run, trained: TrainedExpert, number: int, batch: Batch) -> list[Tensor]:
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
