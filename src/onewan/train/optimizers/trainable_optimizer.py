"""`TrainableOptimizer`: the optimizer of one trainable, as the training step and the state see it.

A step is three calls, and each is possible only after the one before it::

    step = optimizer.begin_step(number, lr_factor)
    loss.backward()
    norm = step.clip_grad_norm(max_norm)
    step.apply()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from onewan.config.method_rules import per_weight_problems
from onewan.config.optimizer import Optimizer
from onewan.errors import ConfigError
from onewan.train.optimizers.joint import JointOptimizer
from onewan.train.optimizers.parameters import ParameterGroup
from onewan.train.optimizers.per_weight import PerWeightOptimizer
from onewan.train.rounding import Rounding, is_half
from onewan.train.sharding import Sharding


class OptimizerStep(Protocol):
    """One optimizer step, from before its backward passes to the update of the weights."""

    def clip_grad_norm(self, max_norm: float | None) -> Tensor:
        """Scale the gradients so that the norm of all together is at most `max_norm`.

        Returns the norm before, 0-d float32. None for `max_norm` only measures. After a fused step
        the gradients have been used; the result is their norm, and a `max_norm` is a ValueError.
        """
        ...

    def apply(self) -> None:
        """Update the weights, except those that a fused step has updated, and drop the gradients.

        RuntimeError if it has been called before.
        """
        ...


class TrainableOptimizer(Protocol):
    """The optimizer over the weights of one trainable."""

    @property
    def lr(self) -> float:
        """The learning rate of the first group in the last step that began, for display: with the
        schedule's factor, and times the rate that the optimizer has estimated (Prodigy)."""
        ...

    @property
    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimizer updates, always in the same order."""
        ...

    def set_full_lr(self, rates: Mapping[str, float]) -> None:
        """From the next step on, use the full learning rates in `rates`, by the weight's name;
        weights of one group have the same. As if the optimizer had been built with them."""
        ...

    def begin_step(self, number: int, lr_factor: float) -> OptimizerStep:
        """Begin step `number` of the run, before its backward pass.

        `lr_factor` is the schedule's: all learning rates are multiplied by it. In a fused step a
        backward pass without a step that has begun, or a second one, is a RuntimeError.
        """
        ...

    def evaluating(self) -> AbstractContextManager[None]:
        """A context in which the model has the weights to validate and export.

        They are an average with a schedule-free optimizer, and the trained weights with all others.
        Afterwards the trained weights are restored, bit-exact. The library's own method for that is
        not exact, so they are copied to host memory before.
        """
        ...

    def to(self, device: torch.device) -> None:
        """Move the optimizer's state, but not the weights; values do not change."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Copies in host memory, in plain containers that `torch.load(weights_only=True)` reads."""
        ...

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from `saved`, bit-exact; call it after the weights themselves are loaded.

        ValueError if it is the state of other weights.
        """
        ...


def build_trainable_optimizer(
    groups: Sequence[ParameterGroup],
    choice: Optimizer,
    *,
    rounding: Rounding = "none",
    fused: bool = False,
    seed: int = 0,
    name: str = "high",
    sharding: Sharding | None = None,
) -> TrainableOptimizer:
    """The optimizer that the run file's `optimizer` section names, over the weights of `groups`.

    `rounding` applies to bfloat16 weights (Kahan's also to float16): they are updated in float32
    and rounded back so that small updates are not lost; float32 weights among them are updated as
    usual. `fused` updates each weight in the backward pass, as soon as its gradient is complete,
    and drops the gradient. `name` is the trainable's; the draws of stochastic rounding depend on
    it, on `seed` (the run's), the weight's name and the step. `sharding` is None if the weights are
    whole ones.

    ConfigError if the optimizer does not support these settings; ValueError without weights, or if
    two weights have the same name.
    """
    weights = [p for group in groups for p in group.parameters]
    names = [n for group in groups for n in group.names]
    if not weights or len(names) != len(weights) or len(set(names)) != len(names):
        raise ValueError("an optimizer needs weights, each with a name of its own")
    # Without 16-bit weights there is nothing to round, and one optimizer over all is faster.
    if not any(map(is_half, weights)):
        rounding = "none"
    _check_support(choice, weights, rounding, fused)
    if fused or rounding != "none":
        return PerWeightOptimizer(
            groups, choice, name, rounding=rounding, fused=fused, seed=seed, sharding=sharding
        )
    return JointOptimizer(groups, choice, name, sharding)


def _check_support(
    choice: Optimizer, weights: Sequence[nn.Parameter], rounding: Rounding, fused: bool
) -> None:
    """ConfigError if the optimizer or the weights do not support these settings."""
    problems = [
        f"{field}: {text}" for field, text in per_weight_problems(choice, rounding, fused=fused)
    ]
    other = {p.dtype for p in weights if is_half(p)} - {torch.bfloat16}
    if rounding == "stochastic" and other:
        problems.append(
            "method.weights: stochastic rounding is for bfloat16, and the weights are "
            f"{str(other.pop()).removeprefix('torch.')}; set model.dtype to bfloat16, or "
            "method.weights to kahan"
        )
    if problems:
        raise ConfigError("run file", problems)
