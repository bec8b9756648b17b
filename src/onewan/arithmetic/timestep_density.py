"""How noise levels are spread: a density over u, the shift, and the cut to an expert's range. Pure.

u in [0, 1] is drawn from one of five distributions and shifted to the noise level
t = s u / (1 + (s - 1) u). An expert draws from the density of t cut exactly to its own range, by
the inverse of the distribution function, without rejection and without squeezing the range. The
boundary lies in t, not in u; three public trainers compared the wrong one and had to mend it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import betainc, betaincinv, expit, logit, ndtr, ndtri

from onewan.config.objective import (
    BetaTimesteps,
    LogitNormalTimesteps,
    ModeTimesteps,
    TableTimesteps,
    Timesteps,
    UniformTimesteps,
)
from onewan.errors import ConfigError
from onewan.variants import Expert, Variant

Array = NDArray[np.float64]

_LEAST_MASS = 1e-9
"""Share of the noise levels below which an expert counts as having none: differences of a
distribution function in float64 are exact to 1e-16, so that cuts are right to 1e-7 above it."""


class Base(Protocol):
    """A distribution of u on [0, 1]."""

    def cdf(self, u: float) -> float:
        """Probability of less than `u`, which lies within (0, 1)."""
        ...

    def quantile(self, p: Array) -> Array:
        """Inverse of `cdf`; `p` within [0, 1]."""
        ...


@dataclass(frozen=True, slots=True)
class Uniform:
    """All u alike."""

    def cdf(self, u: float) -> float:
        return u

    def quantile(self, p: Array) -> Array:
        return p


@dataclass(frozen=True, slots=True)
class LogitNormal:
    """The logistic function of a normal."""

    mean: float = 0.0
    std: float = 1.0

    def cdf(self, u: float) -> float:
        return float(ndtr((logit(u) - self.mean) / self.std))

    def quantile(self, p: Array) -> Array:
        return expit(self.mean + self.std * ndtri(p))


@dataclass(frozen=True, slots=True)
class Mode:
    """Stable Diffusion 3's mode sampling (arXiv 2403.03206, section 3.1).

    u = 1 - v - scale (cos^2(pi v / 2) - 1 + v) of a uniform v, which falls in v for scales from -1
    to 2 / (pi - 2).
    """

    scale: float

    def cdf(self, u: float) -> float:
        p = brentq(lambda p: self.quantile(p) - u, 0, 1, xtol=1e-15)
        return float(p)  # pyright: ignore[reportArgumentType]  (a tuple only by full_output)

    def quantile(self, p: Array) -> Array:
        return p - self.scale * (np.cos(np.pi * (1 - p) / 2) ** 2 - p)


@dataclass(frozen=True, slots=True)
class Beta:
    """The beta distribution."""

    alpha: float
    beta: float

    def cdf(self, u: float) -> float:
        return float(betainc(self.alpha, self.beta, u))

    def quantile(self, p: Array) -> Array:
        return betaincinv(self.alpha, self.beta, p)


@dataclass(frozen=True, slots=True)
class Table:
    """A density that is constant on each of equally wide parts of [0, 1]."""

    weights: tuple[float, ...]
    """Not negative, and not all 0."""

    def cdf(self, u: float) -> float:
        below = self._cumulated()
        return float(np.interp(u, np.linspace(0, 1, len(below)), below))

    def quantile(self, p: Array) -> Array:
        below = self._cumulated()
        # The part that starts at or below p and ends above it, so one of weight 0 is never chosen.
        last = int(np.flatnonzero(self.weights)[-1])
        part = np.minimum(np.searchsorted(below, p, side="right") - 1, last)
        return (part + (p - below[part]) / (below[part + 1] - below[part])) / len(self.weights)

    def _cumulated(self) -> Array:
        sums = np.cumsum([0.0, *self.weights])
        return sums / sums[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class TimestepDensity:
    """The distribution of noise levels before they are cut to an expert's range."""

    base: Base
    shift: float

    def cdf(self, t: float) -> float:
        """Probability of a noise level below `t`."""
        if t <= 0 or t >= 1:
            return float(t >= 1)
        return self.base.cdf(t / (self.shift - (self.shift - 1) * t))

    def quantile(self, p: float) -> float:
        """The noise level below which the probability is `p` in [0, 1]; the inverse of `cdf`."""
        return float(self._quantiles(np.asarray(p, dtype=np.float64)))

    def mass(self, expert: Expert) -> float:
        """Probability of the noise levels that `expert` serves."""
        return self.cdf(expert.t_max) - self.cdf(expert.t_min)

    def truncated_quantile(self, p: float, expert: Expert) -> float:
        """As `quantile`, of the distribution cut to `expert`'s range; `p` in [0, 1].

        A float32 number inside the range: below the boundary for the low expert, and not below it
        for the high one. ConfigError if the distribution has (next to) nothing in that range.
        """
        return float(self.truncated_quantiles(np.asarray(p, dtype=np.float64), expert))

    def truncated_quantiles(self, p: Array, expert: Expert) -> Array:
        """`truncated_quantile` of each of `p`."""
        low, high = self.cdf(expert.t_min), self.cdf(expert.t_max)
        if high - low < _LEAST_MASS:
            raise ConfigError("run file", [self._nothing_for(expert)])
        t = self._quantiles(low + p * (high - low)).astype(np.float32)
        return np.clip(t, *_float32_range(expert)).astype(np.float64)

    def scaled(self, factor: float) -> TimestepDensity:
        """The same with `factor` times the shift."""
        return replace(self, shift=self.shift * factor)

    def require(self, experts: Sequence[Expert]) -> None:
        """ConfigError that names each of `experts` whose range gets no noise levels."""
        problems = [self._nothing_for(e) for e in experts if self.mass(e) < _LEAST_MASS]
        if problems:
            raise ConfigError("run file", problems)

    def _quantiles(self, p: Array) -> Array:
        u = self.base.quantile(p)
        return self.shift * u / (1 + (self.shift - 1) * u)

    def _nothing_for(self, expert: Expert) -> str:
        return (
            f"train.timesteps: with shift {self.shift:g} there are no noise levels of "
            f"{expert.t_min:g} to {expert.t_max:g}, which the {expert.name} expert serves; choose "
            "another distribution or shift, or leave that expert out by model.experts"
        )


def density_of(choice: Timesteps, official_shift: float) -> TimestepDensity:
    """The density that the run file's `train.timesteps` means; `official_shift` where it has no
    shift of its own."""
    shift = official_shift if choice.shift is None else choice.shift
    return TimestepDensity(base=_base_of(choice), shift=shift)


def _base_of(choice: Timesteps) -> Base:
    match choice:
        case UniformTimesteps():
            return Uniform()
        case LogitNormalTimesteps():
            return LogitNormal(choice.mean, choice.std)
        case ModeTimesteps():
            return Mode(choice.scale)
        case BetaTimesteps():
            return Beta(choice.alpha, choice.beta)
        case TableTimesteps():
            return Table(choice.weights)


def official_token_count(variant: Variant) -> int:
    """Tokens of an official sample of `variant`: its latents in patches of one frame and 2x2."""
    width, height = (side // variant.size_multiple for side in variant.sample_size)
    return ((variant.frames - 1) // variant.temporal_compression + 1) * width * height


def shift_factor(latents_shape: Sequence[int], official: int) -> float:
    """What the shift is multiplied with for latents [..., F, h, w] in the place of `official`
    tokens: the square root of the ratio of tokens, as in Stable Diffusion 3 (arXiv 2403.03206,
    section 5.3.2), by which the same shift hides the same share of the picture."""
    frames, height, width = latents_shape[-3:]
    return math.sqrt(frames * (height // 2) * (width // 2) / official)


def _float32_range(expert: Expert) -> tuple[np.float32, np.float32]:
    """The lowest and the highest float32 numbers within `expert`'s range."""
    low, high = np.float32(expert.t_min), np.float32(expert.t_max)
    if float(low) < expert.t_min:
        low = np.nextafter(low, np.float32(1))
    if expert.t_max < 1 and float(high) >= expert.t_max:
        high = np.nextafter(high, np.float32(0))
    return low, high
