"""One optimizer step: forward and backward of its batches, then the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from onewan.data.loader import Batch, StepBatches
from onewan.dtypes import torch_dtype
from onewan.errors import TrainingError
from onewan.model.forward import NoisyLatents, predict_velocities
from onewan.seeds import derive_seed
from onewan.train.gradient_sums import GradientSums
from onewan.train.objective import (
    NoisedBatch,
    velocity_loss,
    with_base_target,
    with_preserved_target,
)
from onewan.train.run import Run
from onewan.train.state import Trainable, TrainedExpert


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """Measurements of one optimizer step."""

    loss: float
    """Mean over the samples of the step; of a rank that has a part of them, its part of the sum.
    Ranks that share the tokens of clips have the same."""
    preservation_loss: float | None
    """What is added to it for the predictions of the base model that are kept, with their weight;
    None if none is kept."""
    grad_norm: float
    """Norm of all gradients together, before clipping."""
    lr: float
    embeddings_lr: float | None
    """That of the embeddings that are trained beside; None if there are none."""
    t: tuple[float, ...]
    """Noise level of each sample of this rank, in [0, 1]."""


def train_step(run: Run, step: StepBatches) -> StepMetrics:
    """Forward and backward of each batch of `step`, then one update of its trainables.

    TrainingError if the loss or the gradient norm is not finite. The weights are unchanged then,
    except with a fused step, which updates them in the backward pass, before the host knows either.
    """
    trained = run.bring_expert(step.expert)
    trainables = run.state.trainables_of(step.expert)
    updates = [
        trainable.optimizer.begin_step(step.number, run.lr_factor(trainable.name, step.number))
        for trainable in trainables
    ]
    losses, preservation, levels = whole_gradients(run, step, trained, trainables)
    max_norm = run.config.train.max_grad_norm
    # Without any gradient, PyTorch returns a norm of 0 on the CPU.
    norms = [update.clip_grad_norm(max_norm).to(run.device) for update in updates]
    # The only wait for the device in a step. It comes before the weights change, so that a step
    # that is not finite leaves them intact, unless it is fused.
    measured = [*losses, *preservation, torch.stack(norms).norm()]
    *values, norm = torch.stack(measured).tolist()
    check_finite(run, step, values, norm)
    count = len(losses)
    for trainable, update in zip(trainables, updates, strict=True):
        update.apply()
        if trainable.ema is not None:
            trainable.ema.update(run.steps_before(trainable.name, step.number))
    return StepMetrics(
        loss=sum(values[:count], 0.0),
        preservation_loss=sum(values[count:], 0.0) if preservation else None,
        grad_norm=norm,
        lr=trainables[0].optimizer.lr,
        embeddings_lr=trainables[1].optimizer.lr if len(trainables) > 1 else None,
        t=levels,
    )


def whole_gradients(
    run: Run, step: StepBatches, trained: TrainedExpert, trainables: Sequence[Trainable]
) -> StepLosses:
    """`backward`, after which `trainables` have the gradients of the whole step on each process
    that has a part of it."""
    ranks = run.group.ranks
    if len(ranks) == 1:
        return backward(run, step, trained)
    # Gradients of shards are sums already (`onewan.memory.sharded_blocks`).
    parameters = [p for trainable in trainables for p in trainable.replicated]
    sums = GradientSums(run.ranks.adding(ranks), parameters, trained.transformer.blocks)
    # With shards, processes agree on each pass: sums may not come between on some of them only.
    complete = None if run.division.is_sharded else sums.complete
    losses = backward(run, step, trained, complete)
    run.memory.finish_passes()
    sums.finish()
    return losses


class StepLosses(NamedTuple):
    """What the batches of a step contribute to its loss."""

    losses: list[Tensor]
    """Of each batch, scalars on the device."""
    preservation: list[Tensor]
    """Of each batch in which something is preserved: its part for that, with its weight."""
    levels: tuple[float, ...]
    """Noise level of each sample."""


def backward(
    run: Run,
    step: StepBatches,
    trained: TrainedExpert,
    complete: Callable[[int], None] | None = None,
) -> StepLosses:
    """Accumulate the gradients of all batches of `step` in the parameters. `complete` is called
    with the index of each block when no gradient of it will change any more, in the last of the
    backward passes, as far as it goes through the blocks.

    Gradients have the same bits whether batches go through the transformer together or one after
    another.
    """
    if not trained.transformer.training:  # setting it goes through all submodules
        trained.transformer.train()
    losses, preservation, levels = list[Tensor](), list[Tensor](), list[float]()
    groups = run.together(step.batches)
    for number, group in enumerate(groups):
        run.memory.use_for([batch.latents for batch in group])
        is_last = number == len(groups) - 1
        preserves = any(batch.preserved is not None for batch in group)
        if is_last and not preserves:
            announce_next(run, step, trained)
        noised = [noised_inputs(run, batch.to(run.device), step, trained) for batch in group]
        last = complete if is_last and not preserves else None
        losses += pass_backward(run, step, trained, noised, "dropout", complete=last)
        levels += [level for inputs in noised for level in inputs.sample.t_host]
        if preserves:
            # A pass of its own, so that what the first one keeps for its gradients is gone.
            kept = [k for inputs in noised if (k := preserved_inputs(run, inputs, trained))]
            if is_last:
                announce_next(run, step, trained)
            weight = run.config.train.preservation_weight
            last = complete if is_last else None
            preservation += pass_backward(
                run, step, trained, kept, "dropout of preservation", weight, complete=last
            )
    return StepLosses(losses, preservation, tuple(levels))


def pass_backward(
    run: Run,
    step: StepBatches,
    trained: TrainedExpert,
    noised: Sequence[NoisedInputs],
    purpose: str,
    weight: float = 1.0,
    complete: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Predict batches of `step` together and accumulate the gradients of `weight` times their
    losses; returns these. `purpose` keys the draws of dropout. `complete` is called with the index
    of each block behind its backward pass."""
    if run.dropout:
        counters = (step.number, noised[0].batch.first_sample_index)
        # Seeded for each group, so that a resumed run draws the same dropout. Processes that share
        # the tokens draw different numbers.
        if run.tokens.count > 1:
            counters += (run.tokens.number,)
        torch.manual_seed(derive_seed(run.config.train.seed, purpose, *counters))
    with run.memory.telling(trained.transformer, complete):
        predictions = predict(run, trained, noised)
        # Every sample has the same weight, although the last batch of a bucket may be smaller.
        weighted = [
            compute_loss(run, inputs.sample, prediction)
            * (weight * len(inputs.batch) / step.global_size)
            for inputs, prediction in zip(noised, predictions, strict=True)
        ]
        # Without a gradient if only placeholders are trained and no caption contains one.
        if differentiable := [loss for loss in weighted if loss.requires_grad]:
            torch.autograd.backward(differentiable)
    return [loss.detach() for loss in weighted]


def announce_next(run: Run, step: StepBatches, trained: TrainedExpert) -> None:
    """Let the weights of the next step's expert come behind the backward pass that follows, if it
    is another one."""
    if step.number + 1 < run.config.train.steps:
        following, _ = run.schedule.expert_at(step.number + 1)
        if following in run.group.experts:
            run.memory.announce(trained.transformer, run.state.experts[following].transformer)


@dataclass(frozen=True, slots=True)
class NoisedInputs:
    """A batch as the transformer gets it."""

    batch: Batch
    sample: NoisedBatch
    text: Tensor


def noised_inputs(
    run: Run, batch: Batch, step: StepBatches, trained: TrainedExpert
) -> NoisedInputs:
    """`batch`, which is on the device, with the noise that `step` draws for it."""
    sample = run.objective.add_noise(batch, step, trained.expert)
    inputs = NoisedInputs(batch, sample, run.text(batch))
    if batch.is_prior is None:
        return inputs
    with trained.base(), torch.no_grad():
        (prediction,) = predict(run, trained, [inputs])
    return replace(inputs, sample=with_base_target(sample, prediction, batch))


def preserved_inputs(run: Run, inputs: NoisedInputs, trained: TrainedExpert) -> NoisedInputs | None:
    """`inputs` with the texts for which the base model's prediction is kept, and that prediction as
    the target; None if there are none."""
    preserved = inputs.batch.preserved
    if preserved is None:
        return None
    inputs = replace(inputs, text=preserved.text)
    with trained.base(), torch.no_grad():
        (velocity,) = predict(run, trained, [inputs])
    sample = with_preserved_target(inputs.sample, velocity, preserved.weights)
    return replace(inputs, sample=sample)


def predict(run: Run, trained: TrainedExpert, batches: Sequence[NoisedInputs]) -> list[Tensor]:
    """The velocities that the expert predicts for each batch, [B, C, F, h, w], float32."""
    return predict_velocities(
        trained.transformer,
        [
            NoisyLatents(
                x=inputs.sample.x,
                t=inputs.sample.t,
                text=inputs.text,
                condition=inputs.batch.condition,
                clean_frames=inputs.sample.clean_frames,
                reference=inputs.batch.reference,
            )
            for inputs in batches
        ],
        dtype=torch_dtype(run.config.model.dtype),
    )


def compute_loss(run: Run, sample: NoisedBatch, prediction_BCFHW: Tensor) -> Tensor:
    """The loss that the run file configures: the mean over the samples, a float32 scalar."""
    weight = run.config.wan_config.temporal_consistency_weight
    return velocity_loss(prediction_BCFHW, sample, run.config.train.loss, weight)


def check_finite(run: Run, step: StepBatches, losses: list[float], norm: float) -> None:
    """TrainingError, naming the clips, if a loss or the gradient norm is not finite."""
    if all(map(math.isfinite, [*losses, norm])):
        return
    # The losses of what is preserved follow those of all batches.
    batches = [*step.batches, *(b for b in step.batches if b.preserved is not None)]
    bad = [b for b, loss in zip(batches, losses, strict=True) if not math.isfinite(loss)]
    names = ", ".join(dict.fromkeys(n for batch in bad or step.batches for n in batch.names))
    where = f"step {step.number + 1} ({step.expert} expert)"
    others = _ranks_with(run, bad=bool(bad)) if not math.isfinite(norm) else []
    if others and not bad:
        raise TrainingError(
            f"{where}: the loss is not finite with clips of rank {', '.join(map(str, others))}, "
            "whose log names them; the last saved state is kept"
        )
    raise TrainingError(
        f"{where}: the {'loss' if bad else 'gradient'} is not finite with {names}; the last saved "
        "state is kept. Look at that clip, or try a lower optimizer.lr"
    )


def _ranks_with(run: Run, *, bad: bool) -> list[int]:
    """The processes of this step that have bad losses. All of them have to call it, which they do
    if the norm of their summed gradients is not finite."""
    flags = torch.zeros(len(run.group.ranks))
    flags[run.group.ranks.index(run.ranks.rank)] = float(bad)
    run.ranks.add([flags], run.group.ranks)
    return [rank for rank, flag in zip(run.group.ranks, flags.tolist(), strict=True) if flag]
