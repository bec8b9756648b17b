"""Loss weights by timestep, scaled to a mean of 1 over the timesteps that an expert draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from onewan.arithmetic.timestep_density import Array, TimestepDensity
from onewan.errors import ConfigError
from onewan.variants import Expert

_QUADRATURE = 4096
"""Equally probable parts of an expert's range over which weights are averaged."""


@dataclass(frozen=True, slots=True)
class MinSnr:
    """Min-SNR of the clean sample (Hang et al., arXiv 2303.09556), for a velocity prediction.

    The clean sample is x - t v, so a squared error of the velocity v is t^2 times as large in the
    clean sample. Min-SNR multiplies the latter by min(SNR, gamma), with SNR = ((1-t)/t)^2. In terms
    of v that is min((1-t)^2, gamma t^2).
    """

    gamma: float = 5.0

    def __call__(self, t: Array) -> Array:
        import numpy as np

        return np.minimum((1 - t) ** 2, self.gamma * t**2)


@dataclass(frozen=True, slots=True)
class Curve:
    """Linear interpolation between points (t, weight), t rising."""

    points: tuple[tuple[float, float], ...]

    def __call__(self, t: Array) -> Array:
        import numpy as np

        timesteps, weights = zip(*self.points, strict=True)
        return np.interp(t, timesteps, weights)


@dataclass(frozen=True, slots=True)
class Spline:
    """A smooth curve through points (t, weight), t rising, that nowhere leaves the range of the two
    points beside it: a monotone piecewise cubic (Fritsch and Butland 1984; scipy's PCHIP)."""

    points: tuple[tuple[float, float], ...]

    def __call__(self, t: Array) -> Array:
        import numpy as np

        # As for the curve, weights stay what they are at the first and at the last point.
        return _spline(self.points)(np.clip(t, self.points[0][0], self.points[-1][0]))


@lru_cache(maxsize=64)
def _spline(points: tuple[tuple[float, float], ...]) -> Callable[[Array], Array]:
    from scipy.interpolate import PchipInterpolator

    timesteps, weights = zip(*points, strict=True)
    return PchipInterpolator(timesteps, weights)


TimestepWeighting: TypeAlias = MinSnr | Curve | Spline

EVEN = Curve(((0.0, 1.0), (1.0, 1.0)))
"""The same weight everywhere."""


def timestep_weights(
    weighting: TimestepWeighting | None, density: TimestepDensity, expert: Expert, t: Array
) -> Array:
    """The loss weight at each of `expert`'s timesteps `t`; 1 without `weighting`.

    The mean over `density`, truncated to the expert's range, is 1. ConfigError if all weights are 0
    there.
    """
    import numpy as np

    if weighting is None:
        return np.ones_like(t)
    if text := weighting_problem(weighting, density, expert):
        raise ConfigError("run file", [text])
    return weighting(t) / _mean_weight(weighting, density, expert)


def weighting_problem(
    weighting: TimestepWeighting, density: TimestepDensity, expert: Expert
) -> str | None:
    """Why `expert` can't train with `weighting`, as a line of a `ConfigError`; None if it can."""
    if has_weight(weighting, density, expert):
        return None
    return (
        f"train.loss.weighting: is 0 at all timesteps that the {expert.name} expert draws "
        f"({expert.t_min:g} to {expert.t_max:g}); give it weight there, or exclude that expert by "
        "model.experts"
    )


def has_weight(weighting: TimestepWeighting, density: TimestepDensity, expert: Expert) -> bool:
    """Whether `weighting` is above 0 anywhere that `expert` draws timesteps."""
    return _mean_weight(weighting, density, expert) > 0


# An entry for each expert, each range of sources and, with shift_by_tokens, each clip size.
@lru_cache(maxsize=1024)
def _mean_weight(weighting: TimestepWeighting, density: TimestepDensity, expert: Expert) -> float:
    import numpy as np

    # The midpoint rule in the quantile, so that the density itself needs no formula.
    parts = (np.arange(_QUADRATURE) + 0.5) / _QUADRATURE
    return float(weighting(density.truncated_quantiles(parts, expert)).mean())
