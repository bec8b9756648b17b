"""One optimizer step: forward and backward of its batches, then the update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from onewan.data.loader import Batch, StepBatches
from onewan.dtypes import torch_dtype
from onewan.errors import TrainingError
from onewan.model.forward import NoisyLatents, predict_velocities
from onewan.seeds import derive_seed
from onewan.train.objective import NoisedBatch, velocity_loss, with_base_target
from onewan.train.run import Run
from onewan.train.state import TrainedExpert


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """Measurements of one optimizer step."""

    loss: float
    """Mean over the samples of the step."""
    grad_norm: float
    """Norm of all gradients together, before clipping."""
    lr: float
    t: tuple[float, ...]
    """Noise level of each sample, in [0, 1]."""


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
    losses, levels = backward(run, step, trained)
    max_norm = run.config.train.max_grad_norm
    # Without any gradient, PyTorch returns a norm of 0 on the CPU.
    norms = [update.clip_grad_norm(max_norm).to(run.device) for update in updates]
    # The only wait for the device in a step. It comes before the weights change, so that a step
    # that is not finite leaves them intact, unless it is fused.
    *values, norm = torch.stack([*losses, torch.stack(norms).norm()]).tolist()
    check_finite(step, values, norm)
    for trainable, update in zip(trainables, updates, strict=True):
        update.apply()
        if trainable.ema is not None:
            trainable.ema.update(run.steps_before(trainable.name, step.number))
    return StepMetrics(loss=sum(values), grad_norm=norm, lr=trainables[0].optimizer.lr, t=levels)


def backward(
    run: Run, step: StepBatches, trained: TrainedExpert
) -> tuple[list[Tensor], tuple[float, ...]]:
    """Accumulate the gradients of all batches of `step` in the parameters.

    Returns each batch's contribution to the step's loss, as scalars on the device, and the noise
    level of each sample. Gradients have the same bits whether batches go through the transformer
    together or one after another.
    """
    if not trained.transformer.training:  # setting it goes through all submodules
        trained.transformer.train()
    losses: list[Tensor] = []
    levels: list[float] = []
    groups = run.together(step.batches)
    for number, group in enumerate(groups):
        run.memory.use_for([batch.latents for batch in group])
        if number == len(groups) - 1:
            announce_next(run, step, trained)
        noised = [noised_inputs(run, batch.to(run.device), step, trained) for batch in group]
        if run.dropout:
            counters = (step.number, group[0].first_sample_index)
            # Seeded for each group, so that a resumed run draws the same dropout.
            torch.manual_seed(derive_seed(run.config.train.seed, "dropout", *counters))
        predictions = predict(run, trained, noised)
        # Every sample has the same weight, although the last batch of a bucket may be smaller.
        weighted = [
            compute_loss(run, inputs.sample, prediction) * (len(inputs.batch) / step.global_size)
            for inputs, prediction in zip(noised, predictions, strict=True)
        ]
        # Without a gradient if only placeholders are trained and no caption contains one.
        if differentiable := [loss for loss in weighted if loss.requires_grad]:
            torch.autograd.backward(differentiable)
        losses += [loss.detach() for loss in weighted]
        levels += [level for inputs in noised for level in inputs.sample.t_host]
    return losses, tuple(levels)


def announce_next(run: Run, step: StepBatches, trained: TrainedExpert) -> None:
    """Let the weights of the next step's expert come behind the backward pass that follows, if it
    is another one."""
    if step.number + 1 < run.config.train.steps:
        following = run.state.experts[run.schedule.expert_at(step.number + 1)[0]]
        run.memory.announce(trained.transformer, following.transformer)


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
            )
            for inputs in batches
        ],
        dtype=torch_dtype(run.config.model.dtype),
    )


def compute_loss(run: Run, sample: NoisedBatch, prediction_BCFHW: Tensor) -> Tensor:
    """The loss that the run file configures: the mean over the samples, a float32 scalar."""
    weight = run.config.wan_config.temporal_consistency_weight
    return velocity_loss(prediction_BCFHW, sample, run.config.train.loss, weight)


def check_finite(step: StepBatches, losses: list[float], norm: float) -> None:
    """TrainingError, naming the clips, if a loss or the gradient norm is not finite."""
    if all(map(math.isfinite, [*losses, norm])):
        return
    bad = [b for b, loss in zip(step.batches, losses, strict=False) if not math.isfinite(loss)]
    names = ", ".join(name for batch in bad or step.batches for name in batch.names)
    raise TrainingError(
        f"step {step.number + 1} ({step.expert} expert): the {'loss' if bad else 'gradient'} is "
        f"not finite with {names}; the last saved state is kept. "
        "Look at that clip, or try a lower optimizer.lr"
    )
