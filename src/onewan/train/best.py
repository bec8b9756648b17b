"""Which weights of a run have the lowest validation loss.

Each exported set of weights has a best step of its own: the experts, whose files are independent
and which are validated at different timesteps, and of each the trained weights and their moving
average. Embeddings serve both experts, so a run that trains any has one best step for all files,
that of the lowest mean loss of the experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from onewan.train.saved_state import BestStep
from onewan.train.state import TrainableName, TrainState, WeightSet
from onewan.train.validation import ExpertLosses
from onewan.variants import ExpertName

WEIGHT_SUFFIX: dict[WeightSet, str] = {"trained": "", "ema": "_ema"}
"""Ending of the names of weights, and of the files that have them."""


def weights_name(trainable: TrainableName, weight_set: WeightSet) -> str:
    """The key of `TrainState.best_weights`, such as "high" or "high_ema"."""
    return trainable + WEIGHT_SUFFIX[weight_set]


def improved_weights(
    state: TrainState, losses: Mapping[ExpertName, ExpertLosses]
) -> dict[str, BestStep]:
    """The weights, by `weights_name`, whose validation loss at the present step is the lowest so
    far. The base model, at step 0, is no result."""
    improved: dict[str, BestStep] = {}
    if state.step == 0:
        return improved
    for trainable in state.trainables:
        sets: tuple[WeightSet, ...] = ("trained",) if trainable.ema is None else ("trained", "ema")
        for weight_set in sets:
            loss = _loss(state, losses, trainable.name, weight_set)
            name = weights_name(trainable.name, weight_set)
            best = state.best_weights.get(name)
            if loss is not None and math.isfinite(loss) and (best is None or loss < best.loss):
                improved[name] = BestStep(step=state.step, loss=loss)
    return improved


def base_loss(state: TrainState, trainable: TrainableName) -> float | None:
    """The base model's loss that the losses of `trainable` are compared with, if it is known."""
    return _mean([state.base_loss.get(name) for name in _validated_by(state, trainable)])


def _loss(
    state: TrainState,
    losses: Mapping[ExpertName, ExpertLosses],
    trainable: TrainableName,
    weight_set: WeightSet,
) -> float | None:
    found = [losses[name] for name in _validated_by(state, trainable)]
    return _mean([each.trained if weight_set == "trained" else each.ema for each in found])


def _validated_by(state: TrainState, trainable: TrainableName) -> list[ExpertName]:
    """The experts whose mean loss decides about the weights of `trainable`."""
    if trainable == "embeddings" or state.embeddings is not None:
        return list(state.experts)
    return [trainable]


def _mean(losses: list[float | None]) -> float | None:
    known = [loss for loss in losses if loss is not None]
    return sum(known) / len(known) if known and len(known) == len(losses) else None
