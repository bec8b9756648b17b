"""The loss on fixed clips, fixed noise and fixed noise levels: the same for the same weights.

Comparable over the whole run, between runs on the same clips, and with the base model. It is the
run's own objective (loss, masks, weighting) without what varies: no dropout, no given first frame,
no offset, the first caption of each clip.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor

from onewan.data.loader import Batch
from onewan.seeds import derive_seed
from onewan.train.run import Run
from onewan.train.state import TrainedExpert, WeightSet
from onewan.train.step import compare, predict
from onewan.variants import ExpertName


def validation_loss(
    run: Run, name: ExpertName, kind: WeightSet | None, between: Callable[[], None]
) -> float:
    """`name`'s mean loss with its weights of `kind`, or those of the base model for None.

    `between` is called after each clip, and may raise; the weights are back in any case.
    """
    trained = run.activate(name)
    trained.transformer.eval()
    with ExitStack() as weights, torch.no_grad():
        for context in _weights(run, trained, kind):
            weights.enter_context(context)
        losses = []
        for number, cpu_batch in enumerate(run.validation_batches()):
            losses += _losses(run, trained, number, cpu_batch.to(run.device))
            between()
        return torch.stack(losses).mean().item()


def _weights(
    run: Run, trained: TrainedExpert, kind: WeightSet | None
) -> list[AbstractContextManager[None]]:
    if kind is None:
        return [trained.base()]
    return [trainable.using(kind) for trainable in run.state.trainables_of(trained.expert.name)]


def _losses(run: Run, trained: TrainedExpert, number: int, batch: Batch) -> list[Tensor]:
    text = run.text(batch)
    losses = []
    for place, level in enumerate(run.objective.levels(run.config.validation.timesteps)):
        seed = derive_seed(run.config.train.seed, "grid noise", number, place)
        sample = run.objective.fixed(batch, level, trained.expert, seed)
        losses.append(compare(run, sample, predict(run, trained, batch, sample, text)))
    return losses
