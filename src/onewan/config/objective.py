"""Timestep distributions, the loss and the frames that samples are given: `train.timesteps`,
`train.loss` and `train.condition_shares`.

A timestep t is the noise level from 0 (clean) to 1 (noise).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from onewan.arithmetic.condition_shares import SHARE_ROUNDING
from onewan.arithmetic.timestep_density import (
    BaseDistribution,
    Beta,
    LogitNormal,
    Mode,
    Table,
    TimestepDensity,
    Uniform,
)
from onewan.arithmetic.timestep_weighting import Curve, MinSnr, Spline, TimestepWeighting
from onewan.config.section import Float, Keyed, Positive, Section, Share


class _Timesteps(Section, ABC):
    shift: Positive | None = None
    """Timestep shift s: t = s*u / (1 + (s-1)*u), where u has the distribution below. null is the
    variant's official shift (12 for T2V-A14B, 5 for the others), which sampling uses too."""
    shift_by_tokens: bool = False
    """Multiply the shift by the root of a clip's tokens over those of an official sample, so that
    small and short clips get less noise."""
    stratified: bool = False
    """Stratified sampling within a step: the same density with less variance."""

    def density(self, official_shift: float) -> TimestepDensity:
        """The density of t; `official_shift` is the variant's, for a section without its own."""
        return TimestepDensity(base=self.base(), shift=self.shift or official_shift)

    @abstractmethod
    def base(self) -> BaseDistribution:
        """The distribution before the shift."""


class UniformTimesteps(_Timesteps):
    distribution: Literal["uniform"] = "uniform"
    """Uniform distribution of u. Each expert draws from the density within its own range."""

    def base(self) -> Uniform:
        return Uniform()


class LogitNormalTimesteps(_Timesteps):
    distribution: Literal["logit_normal"] = "logit_normal"
    """Logit-normal distribution, with most timesteps in the middle."""
    mean: Float = 0.0
    """Mean of the logit; above 0 is more noise."""
    std: Positive = 1.0
    """Standard deviation of the logit."""

    def base(self) -> LogitNormal:
        return LogitNormal(self.mean, self.std)


class ModeTimesteps(_Timesteps):
    distribution: Literal["mode"] = "mode"
    """Mode sampling of Stable Diffusion 3, with heavy tails."""
    scale: Float = Field(default=1.29, ge=-1, le=1.75)
    """From -1 to 1.75: above 0 favors the middle, below 0 both ends; 0 is uniform."""

    def base(self) -> Mode:
        return Mode(self.scale)


class BetaTimesteps(_Timesteps):
    distribution: Literal["beta"] = "beta"
    """Beta distribution."""
    alpha: Positive = 2.0
    """Larger values are more noise."""
    beta: Positive = 2.0
    """Larger values are less noise."""

    def base(self) -> Beta:
        return Beta(self.alpha, self.beta)


class TableTimesteps(_Timesteps):
    distribution: Literal["table"] = "table"
    """Piecewise constant density."""
    weights: tuple[Annotated[Float, Field(ge=0)], ...] = Field(min_length=1)
    """Weights of equally wide bins of [0, 1], from clean to noise."""

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
    """No weighting of the loss by timestep."""

    def function(self) -> None:
        return None


class MinSnrWeighting(Section):
    kind: Literal["min_snr"] = "min_snr"
    """Min-SNR weighting, min((1-t)^2, gamma t^2), scaled to mean 1 over the expert's timesteps."""
    gamma: Positive = 5.0
    """Upper limit of the signal-to-noise ratio."""

    def function(self) -> TimestepWeighting:
        return MinSnr(self.gamma)


class _Points(Section, ABC):
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

    @abstractmethod
    def function(self) -> TimestepWeighting:
        """The weight as a function of the timestep, before it is scaled."""


class CurveWeighting(_Points):
    kind: Literal["curve"] = "curve"
    """Linear interpolation between points, scaled to mean 1 over the expert's timesteps."""

    def function(self) -> TimestepWeighting:
        return Curve(self.points)


class SplineWeighting(_Points):
    kind: Literal["spline"] = "spline"
    """Smooth interpolation between points (monotone cubic), scaled to mean 1 over the expert's
    timesteps."""

    def function(self) -> TimestepWeighting:
        return Spline(self.points)


_Kind: TypeAlias = NoWeighting | MinSnrWeighting | CurveWeighting | SplineWeighting
_BY_KIND = Keyed(key="kind", default="none", text=True)
Weighting: TypeAlias = Annotated[_Kind, Field(discriminator="kind"), _BY_KIND]
OwnWeighting: TypeAlias = Annotated[_Kind | None, Field(discriminator="kind"), _BY_KIND]
"""Of a source; None is the run's."""


class LossSection(Section):
    kind: Literal["mse", "huber", "pseudo_huber"] = "mse"
    """`mse`: mean squared error. `huber`: quadratic up to `delta`, linear beyond. `pseudo_huber`: a
    smooth Huber loss. All equal the squared error for small errors."""
    delta: Positive = 1.0
    """Error beyond which the Huber losses are linear."""
    weighting: Weighting = NoWeighting()
    """Loss weight by timestep: a name, or a mapping with kind and its options."""
    unmasked_weight: Share = 0.1
    """Loss weight outside the mask, 0 to 1; inside it is 1."""


class ConditionSharesSection(Section):
    """See `train.condition_shares`."""

    first: Share = 0.0
    """Share of the samples that are given the first frame of their clip."""
    both: Share = 0.0
    """Share of those that are given the first and the last frame."""
    last: Share = 0.0
    """Share of those that are given the last frame."""
    none: Share = 0.0
    """Share of those that are given no frame."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if abs(sum(dict(self).values()) - 1) > SHARE_ROUNDING:
            total = f"{sum(dict(self).values()):g}"
            raise ValueError(f"the shares must add up to 1, got {total}; give what is left to none")
        return self
