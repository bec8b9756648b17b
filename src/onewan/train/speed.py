"""The speed of a training step: tokens and FLOP per second, and the share of what the device can.

Operations are those of the transformer's forward and backward passes (`onewan.arithmetic.flops`),
without what gradient checkpointing computes again, without a base model's prediction for prior
clips, and without the text encoder. So a setting that saves memory by computing more shows as a
lower speed.
"""

from __future__ import annotations

from dataclasses import dataclass

from onewan.arithmetic.flops import (
    Trained,
    TransformerSize,
    forward_flops,
    token_count,
    training_flops,
)
from onewan.config.method import FineTuneMethod
from onewan.config.schema import ResolvedRun
from onewan.data.loader import StepBatches
from onewan.train.run import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSpeed:
    """How fast a step was."""

    tokens_per_second: float
    tflops: float
    """10^12 operations per second."""
    mfu: float | None
    """Model FLOPs utilisation: the share, from 0 to 1, of the device's rate in matrix products.
    None where that was not measured."""


def step_speed(run: Run, step: StepBatches, seconds: float, rate: float | None) -> StepSpeed:
    """The speed at which this process trained its part of `step` in `seconds`, on a device that
    reaches `rate` FLOP/s. Processes that share the tokens of a clip count an equal part of them."""
    config = run.state.experts[step.expert].transformer.config
    size, trained = TransformerSize.of_config(config), trained_part(run.config)
    tokens, operations = 0, 0.0
    for batch in step.batches:
        count, _, *sides = batch.latents.shape
        frames, *side_lengths = sides
        # A reference image has as many tokens as a frame.
        frames += "reference_channels" in config
        per_clip = token_count(frames, *side_lengths)
        tokens += count * per_clip
        operations += count * training_flops(forward_flops(size, per_clip), trained)
    seconds *= run.division.sequence
    per_second = operations / seconds
    return StepSpeed(
        tokens_per_second=tokens / seconds,
        tflops=per_second / 1e12,
        mfu=per_second / rate if rate else None,
    )


def trained_part(config: ResolvedRun) -> Trained:
    """What has gradients in a run, as the formula of operations names it."""
    if isinstance(config.method, FineTuneMethod):
        return "weights"
    return "embeddings" if any(e.train for e in config.embeddings) else "adapter"
