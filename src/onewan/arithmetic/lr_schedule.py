"""Learning-rate schedules: warm-up, decay and cooldown, as a function of the step alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

DecayKind = Literal["constant", "linear", "cosine", "cosine_with_restarts", "rex", "polynomial"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LrSchedule:
    """The factor of the learning rate at each step of one expert.

    It rises linearly over `warmup_steps`, whose first step is not 0. Then it decays as `kind` says
    and would reach `end_factor` one step after its last. Over the last `cooldown_steps` it falls
    linearly from there to 0, which it would reach one step after the last. The decays are those of
    diffusers and transformers; rex is from Chen et al., arXiv 2107.04197.
    """

    kind: DecayKind = "constant"
    end_factor: float = 0.0
    """Factor at the end of the decay, in [0, 1]; `constant` has none."""
    cycles: int = 1
    """Half cosines of `cosine_with_restarts`."""
    power: float = 1.0
    """Exponent of `polynomial`."""
    warmup_steps: int = 0
    cooldown_steps: int = 0

    def factor(self, step: int, total: int) -> float:
        """The factor at `step`, from 0, of the `total` steps that train the expert."""
        if step < self.warmup_steps:
            # Step 0 has a rate above 0: otherwise its gradients would be computed for nothing.
            return (step + 1) / (self.warmup_steps + 1)
        cooldown_start = total - self.cooldown_steps
        # At least 1 as a divisor: warm-up and cooldown together may fill all steps.
        decay_steps = max(1, cooldown_start - self.warmup_steps)
        factor = self._decay(min(step, cooldown_start) - self.warmup_steps, decay_steps)
        if step < cooldown_start or not self.cooldown_steps:
            return factor
        return factor * (total - step) / self.cooldown_steps

    def _decay(self, step: int, steps: int) -> float:
        """The factor after `step` of the `steps` between warm-up and cooldown."""
        if self.kind == "constant":
            return 1.0
        return self.end_factor + (1 - self.end_factor) * self._remaining(step, steps)

    def _remaining(self, step: int, steps: int) -> float:
        """From 1 at the start of the decay to 0 at its end."""
        left = 1 - step / steps
        match self.kind:
            case "cosine":
                return _half_cosine(step / steps)
            case "cosine_with_restarts":
                # In integers, so that rounding can't move the end of a cycle to another step.
                return _half_cosine(self.cycles * step % steps / steps) if step < steps else 0.0
            case "rex":
                return left / (1 / 2 + left / 2)
            case "polynomial":
                return left**self.power
            case "linear" | "constant":
                return left


def _half_cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2
