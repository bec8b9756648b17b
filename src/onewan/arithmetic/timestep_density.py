"""The density of training timesteps: a distribution of u, a shift, truncation to experts' ranges.

u in [0, 1] follows one of five distributions and is shifted to the timestep
t = s u / (1 + (s - 1) u), which is the noise level: 0 is a clean sample, 1 is noise. An expert
draws from the density of t truncated exactly to its range, by the inverse distribution function,
without rejection and without rescaling the range. The boundary between the experts is a value of
t, not of u; three public trainers compared it with u and had to correct that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeAlias

from onewan.errors import ConfigError
from onewan.variants import Expert, Variant

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Array: TypeAlias = "NDArray[np.float64]"

# numpy and scipy are imported where they are used: together they take half a second, and reading
# most run files needs neither.

_MIN_MASS = 1e-9
"""An expert's range with less probability than this has no timesteps to draw. A difference of two
distribution functions in float64 is exact to 1e-16, so above it the truncation is exact to 1e-7."""


class BaseDistribution(Protocol):
    """A distribution of u on [0, 1]."""

    def cdf(self, u: float) -> float:
        """Probability of a value below `u`; 0 < u < 1."""
        ...

    def quantile(self, p: Array) -> Array:
        """Inverse of `cdf`; 0 <= p <= 1."""
        ...


@dataclass(frozen=True, slots=True)
class Uniform:
    """The uniform distribution."""

    def cdf(self, u: float) -> float:
        return u

    def quantile(self, p: Array) -> Array:
        return p


@dataclass(frozen=True, slots=True)
class LogitNormal:
    """The logistic function of a normal variable."""

    mean: float = 0.0
    std: float = 1.0

    def cdf(self, u: float) -> float:
        from scipy.special import logit, ndtr

        return float(ndtr((logit(u) - self.mean) / self.std))

    def quantile(self, p: Array) -> Array:
        from scipy.special import expit, ndtri

        return expit(self.mean + self.std * ndtri(p))


@dataclass(frozen=True, slots=True)
class Mode:
    """Stable Diffusion 3's mode sampling (arXiv 2403.03206, section 3.1).

    u = 1 - v - scale (cos^2(pi v / 2) - 1 + v) of a uniform v. It decreases with v for scales
    from -1 to 2 / (pi - 2).
    """

    scale: float

    def cdf(self, u: float) -> float:
        from scipy.optimize import brentq

        # The quantile function is monotonic, but its inverse has no closed form.
        p = brentq(lambda p: self.quantile(p) - u, 0, 1, xtol=1e-15)
        return float(p)  # pyright: ignore[reportArgumentType]  (a tuple only by full_output)

    def quantile(self, p: Array) -> Array:
        import numpy as np

        return p - self.scale * (np.cos(np.pi * (1 - p) / 2) ** 2 - p)


@dataclass(frozen=True, slots=True)
class Beta:
    """The beta distribution."""

    alpha: float
    beta: float

    def cdf(self, u: float) -> float:
        from scipy.special import betainc

        return float(betainc(self.alpha, self.beta, u))

    def quantile(self, p: Array) -> Array:
        from scipy.special import betaincinv

        return betaincinv(self.alpha, self.beta, p)


@dataclass(frozen=True, slots=True)
class Table:
    """A density that is constant on each of equally wide bins of [0, 1]."""

    weights: tuple[float, ...]
    """Not negative, and not all 0."""

    def cdf(self, u: float) -> float:
        import numpy as np

        below = self._cumulative()
        return float(np.interp(u, np.linspace(0, 1, len(below)), below))

    def quantile(self, p: Array) -> Array:
        import numpy as np

        below = self._cumulative()
        # The bin that starts at or below p and ends above it, so a bin of weight 0 is never chosen.
        last = int(np.flatnonzero(self.weights)[-1])
        bin_ = np.minimum(np.searchsorted(below, p, side="right") - 1, last)
        return (bin_ + (p - below[bin_]) / (below[bin_ + 1] - below[bin_])) / len(self.weights)

    def _cumulative(self) -> Array:
        import numpy as np

        sums = np.cumsum([0.0, *self.weights])
        return sums / sums[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class TimestepDensity:
    """The distribution of timesteps before it is truncated to an expert's range."""

    base: BaseDistribution
    shift: float

    def cdf(self, t: float) -> float:
        """Probability of a timestep below `t`."""
        if t <= 0 or t >= 1:  # where the formulas of some distributions are infinite
            return float(t >= 1)
        return self.base.cdf(t / (self.shift - (self.shift - 1) * t))

    def quantile(self, p: float) -> float:
        """The timestep below which the probability is `p` in [0, 1]; the inverse of `cdf`."""
        import numpy as np

        return float(self._quantiles(np.asarray(p, dtype=np.float64)))

    def mass(self, expert: Expert) -> float:
        """Probability of the timesteps in `expert`'s range."""
        return self.cdf(expert.t_max) - self.cdf(expert.t_min)

    def truncated_quantile(self, p: float, expert: Expert) -> float:
        """As `quantile`, of the distribution truncated to `expert`'s range; `p` in [0, 1].

        A float32 value inside the range: below the boundary for the low expert, at or above it for
        the high expert. ConfigError if the distribution has (almost) no probability there.
        """
        import numpy as np

        return float(self.truncated_quantiles(np.asarray(p, dtype=np.float64), expert))

    def truncated_quantiles(self, p: Array, experts: Expert | Sequence[Expert]) -> Array:
        """`truncated_quantile` of each of `p`, for one expert or for the one at the same place of
        `experts`, whose ranges may differ."""
        import numpy as np

        if isinstance(experts, Expert):
            low, high, first, last = self._bounds(experts)
        else:
            bounds = {expert: self._bounds(expert) for expert in dict.fromkeys(experts)}
            low, high, first, last = np.array([bounds[expert] for expert in experts]).T
        # float32, because the training step has its timesteps in a float32 tensor.
        t = self._quantiles(low + p * (high - low)).astype(np.float32).astype(np.float64)
        # Rounding to float32 may cross the boundary, into timesteps that the other expert serves.
        return np.clip(t, first, last)

    def scaled(self, factor: float) -> TimestepDensity:
        """The same distribution with `factor` times the shift."""
        return replace(self, shift=self.shift * factor)

    def reaches(self, expert: Expert) -> bool:
        """Whether there are timesteps in `expert`'s range to draw."""
        low, high = _float32_range(expert)
        return bool(low <= high) and self.mass(expert) >= _MIN_MASS

    def problem(self, expert: Expert) -> str | None:
        """Why `expert` can't draw timesteps, as a line of a `ConfigError`; None if it can."""
        if self.reaches(expert):
            return None
        return (
            f"train.timesteps: with shift {self.shift:g} the range of the {expert.name} "
            f"expert has no timesteps, {expert.t_min:g} to {expert.t_max:g}; choose another "
            "distribution or shift, or exclude that expert by model.experts"
        )

    def require(self, experts: Sequence[Expert]) -> None:
        """ConfigError that names each of `experts` whose range has no timesteps."""
        problems = [text for expert in experts if (text := self.problem(expert))]
        if problems:
            raise ConfigError("run file", problems)

    def _bounds(self, expert: Expert) -> tuple[float, float, float, float]:
        """The probabilities of the timesteps below `expert`'s range and below its end, and the
        lowest and the highest float32 timestep in it. ConfigError if there is nothing to draw."""
        self.require([expert])
        first, last = _float32_range(expert)
        return self.cdf(expert.t_min), self.cdf(expert.t_max), float(first), float(last)

    def _quantiles(self, p: Array) -> Array:
        u = self.base.quantile(p)
        return self.shift * u / (1 + (self.shift - 1) * u)


def official_token_count(variant: Variant) -> int:
    """Tokens of a sample of `variant`'s official size: patches of 1 frame by 2x2 latent pixels."""
    width, height = (side // variant.size_multiple for side in variant.sample_size)
    return ((variant.frames - 1) // variant.temporal_compression + 1) * width * height


def shift_factor(latents_shape: Sequence[int], official: int) -> float:
    """Factor of the shift for latents [..., F, h, w] instead of `official` tokens.

    It is the square root of the ratio of token counts, as in Stable Diffusion 3 (arXiv 2403.03206,
    section 5.3.2): with it, a timestep hides the same share of the picture at every size.
    """
    frames, height, width = latents_shape[-3:]
    return math.sqrt(frames * (height // 2) * (width // 2) / official)


def _float32_range(expert: Expert) -> tuple[np.float32, np.float32]:
    """The lowest and the highest float32 values within `expert`'s range."""
    import numpy as np

    low, high = np.float32(expert.t_min), np.float32(expert.t_max)
    if float(low) < expert.t_min:
        low = np.nextafter(low, np.float32(1))
    if expert.t_max < 1 and float(high) >= expert.t_max:
        high = np.nextafter(high, np.float32(0))
    return low, high
