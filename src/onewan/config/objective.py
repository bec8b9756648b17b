"""What errors count at which noise levels: `train.timesteps` and `train.loss`.

Nothing here imports torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, field_validator

from onewan.arithmetic.timestep_density import (
    BaseDistribution,
    Beta,
    LogitNormal,
    Mode,
    Table,
    TimestepDensity,
    Uniform,
)
from onewan.arithmetic.timestep_weighting import Curve, MinSnr, TimestepWeighting
from onewan.config.section import Float, Keyed, Positive, Section, Share


class _Timesteps(Section, ABC):
    shift: Positive | None = None
    """Shift s of the noise level u: t = s*u / (1 + (s-1)*u). null is the variant's official one
    (12 for T2V-A14B, 5 for the others), under which training visits the levels of sampling."""
    shift_by_tokens: bool = False
    """Scale the shift with the square root of a clip's tokens over those of an official sample, so
    that small and short clips get less noise."""
    stratified: bool = False
    """Spread the noise levels of one step evenly over the density instead of drawing each for
    itself: the same density, less variance."""

    def density(self, official_shift: float) -> TimestepDensity:
        """The density of t; `official_shift` is the variant's, for a section without its own."""
        return TimestepDensity(base=self.base(), shift=self.shift or official_shift)

    @abstractmethod
    def base(self) -> BaseDistribution:
        """The distribution before the shift."""


class UniformTimesteps(_Timesteps):
    distribution: Literal["uniform"] = "uniform"
    """Density of the noise level before the shift. Each expert draws from it truncated exactly to
    its own range after the shift."""

    def base(self) -> Uniform:
        return Uniform()


class LogitNormalTimesteps(_Timesteps):
    distribution: Literal["logit_normal"] = "logit_normal"
    """The logistic function of a normal: most levels in the middle."""
    mean: Float = 0.0
    """Mean of the normal; above 0 is more noise."""
    std: Positive = 1.0
    """Standard deviation of the normal."""

    def base(self) -> LogitNormal:
        return LogitNormal(self.mean, self.std)


class ModeTimesteps(_Timesteps):
    distribution: Literal["mode"] = "mode"
    """Stable Diffusion 3's density with a mode, heavy at both ends."""
    scale: Float = Field(default=1.29, ge=-1, le=1.75)
    """Above 0 favours the middle, below 0 the ends; 0 is uniform."""

    def base(self) -> Mode:
        return Mode(self.scale)


class BetaTimesteps(_Timesteps):
    distribution: Literal["beta"] = "beta"
    """The beta distribution."""
    alpha: Positive = 2.0
    """More is more noise."""
    beta: Positive = 2.0
    """More is less noise."""

    def base(self) -> Beta:
        return Beta(self.alpha, self.beta)


class TableTimesteps(_Timesteps):
    distribution: Literal["table"] = "table"
    """A density by weights."""
    weights: tuple[Annotated[Float, Field(ge=0)], ...] = Field(min_length=1)
    """Weights of equally wide parts of 0 to 1, from little noise to much."""

    @field_validator("weights")
    @classmethod
    def _not_all_zero(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not any(value):
            raise ValueError(f"must have a weight above 0, got {list(value)}")
        return value

    def base(self) -> Table:
        return Table(self.weights)


Timesteps: TypeAlias = Annotated[
    UniformTimesteps | LogitNormalTimesteps | ModeTimesteps | BetaTimesteps | TableTimesteps,
    Field(discriminator="distribution"),
    Keyed(key="distribution", default="uniform", text=True),
]


class NoWeighting(Section):
    kind: Literal["none"] = "none"
    """Weight of a sample's loss by its noise level: all alike."""

    def function(self) -> None:
        return None


class MinSnrWeighting(Section):
    kind: Literal["min_snr"] = "min_snr"
    """Min-SNR of the clean sample, min((1-t)^2, gamma t^2), for the velocity; scaled to a mean of
    1 over what the expert draws."""
    gamma: Positive = 5.0
    """Where the signal-to-noise ratio is cut."""

    def function(self) -> TimestepWeighting:
        return MinSnr(self.gamma)


class CurveWeighting(Section):
    kind: Literal["curve"] = "curve"
    """Straight lines between points; scaled to a mean of 1 over what the expert draws."""
    points: tuple[tuple[Share, Annotated[Float, Field(ge=0)]], ...] = Field(min_length=2)
    """[timestep, weight], the timesteps in ascending order from 0 (clean) to 1 (noise)."""

    @field_validator("points")
    @classmethod
    def _ascending_and_not_all_zero(cls, value: tuple[tuple[float, float], ...]) -> object:
        timesteps = [timestep for timestep, _ in value]
        if any(low >= high for low, high in pairwise(timesteps)):
            raise ValueError(f"must have timesteps in ascending order, got {timesteps}")
        if not any(weight for _, weight in value):
            raise ValueError(f"must have a weight above 0, got {[list(point) for point in value]}")
        return value

    def function(self) -> TimestepWeighting:
        return Curve(self.points)


Weighting: TypeAlias = Annotated[
    NoWeighting | MinSnrWeighting | CurveWeighting,
    Field(discriminator="kind"),
    Keyed(key="kind", default="none", text=True),
]


class LossSection(Section):
    kind: Literal["mse", "huber", "pseudo_huber"] = "mse"
    """`mse`: the square of each error. `huber`: the square up to `delta`, straight beyond.
    `pseudo_huber`: the same, smoothly. All equal the square for small errors."""
    delta: Positive = 1.0
    """Error beyond which the Huber losses grow straight."""
    weighting: Weighting = NoWeighting()
    """How much each noise level counts."""
    unmasked_weight: Share = 0.1
    """How much places that a mask leaves out count against those within."""
