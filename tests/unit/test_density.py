"""Noise levels: each density against its definition, exact cuts, shifts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from scipy.stats import beta, kstest, norm

from onewan.arithmetic.timestep_density import official_token_count, shift_factor
from onewan.config.objective import (
    BetaTimesteps,
    LogitNormalTimesteps,
    ModeTimesteps,
    TableTimesteps,
    Timesteps,
    UniformTimesteps,
)
from onewan.errors import ConfigError
from onewan.variants import VARIANTS

T2V, I2V, TI2V = VARIANTS["t2v-a14b"], VARIANTS["i2v-a14b"], VARIANTS["ti2v-5b"]
EXPERTS = [(v.name, e) for v in VARIANTS.values() for e in v.experts]
V = np.linspace(1, 0, 2_000_001)

WEIGHTS = (1.0, 0.0, 3.0, 2.0, 0.5)


def sd3_mode(scale: float) -> Callable[[np.ndarray], np.ndarray]:
    """The density of u by the slope of the definition's curve u(v), v uniform."""
    u = 1 - V - scale * (np.cos(np.pi * V / 2) ** 2 - 1 + V)
    slope = 1 + scale - scale * np.pi / 2 * np.sin(np.pi * V)
    return lambda at: 1 / np.interp(at, u, slope)


CHOICES: dict[str, tuple[Timesteps, Callable[[np.ndarray], np.ndarray]]] = {
    "uniform": (UniformTimesteps(), np.ones_like),
    "logit_normal": (
        LogitNormalTimesteps(mean=0.3, std=1.2),
        lambda u: norm.pdf(np.log(u / (1 - u)), 0.3, 1.2) / (u * (1 - u)),
    ),
    "mode": (ModeTimesteps(), sd3_mode(1.29)),
    "mode at the ends": (ModeTimesteps(scale=-0.8), sd3_mode(-0.8)),
    "beta": (BetaTimesteps(alpha=2.0, beta=3.5), lambda u: beta.pdf(u, 2.0, 3.5)),
    "table": (
        TableTimesteps(weights=WEIGHTS),
        lambda u: np.array(WEIGHTS)[np.minimum((u * 5).astype(int), 4)],
    ),
}
"""Choices in the run file, and the densities of u that they mean, written down a second time."""


@pytest.mark.parametrize(("variant", "expert"), EXPERTS)
@pytest.mark.parametrize("shift", [1.0, 5.0, 12.0])
@pytest.mark.parametrize("name", CHOICES)
def test_draws_follow_the_truncated_density(name: str, shift: float, variant: str, expert) -> None:
    """Kolmogorov-Smirnov on 100,000 draws, against the density of t integrated numerically."""
    choice, density_of_u = CHOICES[name]
    density = choice.model_copy(update={"shift": shift}).density(3.0)
    seed = len(variant) + int(shift)
    draws = density.truncated_quantiles(np.random.default_rng(seed).random(100_000), expert)
    assert draws.min() >= expert.t_min and draws.max() <= expert.t_max

    edges = np.linspace(expert.t_min, expert.t_max, 200_001)
    t = (edges[1:] + edges[:-1]) / 2
    u = t / (shift - (shift - 1) * t)
    pdf = density_of_u(u) * shift / (shift - (shift - 1) * t) ** 2
    cdf = np.concatenate([[0.0], np.cumsum(pdf)]) / pdf.sum()
    assert kstest(draws, lambda x: np.interp(x, edges, cdf)).pvalue > 1e-3


@pytest.mark.parametrize(
    ("scheme", "choice"),
    [
        ("logit_normal", LogitNormalTimesteps(mean=0.2, std=0.7)),
        ("mode", ModeTimesteps(scale=1.29)),
    ],
)
def test_densities_match_those_of_diffusers(scheme: str, choice: Timesteps) -> None:
    u = compute_density_for_timestep_sampling(
        scheme, 100_000, 0.2, 0.7, 1.29, generator=torch.Generator().manual_seed(0)
    )
    density = choice.density(1.0)
    assert kstest(u.double().numpy(), np.vectorize(density.cdf)).pvalue > 1e-3


@pytest.mark.parametrize("name", CHOICES)
def test_quantile_is_the_inverse_of_cdf(name: str) -> None:
    density = CHOICES[name][0].density(5.0)
    for p in (1e-6, 0.1, 0.33, 0.5, 0.9, 1 - 1e-6):
        assert density.cdf(density.quantile(p)) == pytest.approx(p, rel=1e-9)
    assert (density.cdf(0.0), density.cdf(1.0)) == (0, 1)
    assert density.quantile(0.0) == pytest.approx(0, abs=1e-12)
    assert density.quantile(1.0) == pytest.approx(1)


@pytest.mark.parametrize(
    ("choice", "shift", "high_t2v", "high_i2v"),
    [  # percent of noise levels above 0.875 and 0.9; the closed forms, tabulated independently
        (UniformTimesteps(), 1, 12.50, 10.00),
        (UniformTimesteps(), 5, 41.67, 35.71),
        (UniformTimesteps(), 12, 63.16, 57.14),
        (LogitNormalTimesteps(), 1, 2.58, 1.40),
        (LogitNormalTimesteps(), 3, 19.84, 13.60),
        (LogitNormalTimesteps(), 12, 70.51, 61.32),
    ],
)
def test_the_mass_of_the_high_expert_matches_closed_forms(
    choice: Timesteps, shift: float, high_t2v: float, high_i2v: float
) -> None:
    density = choice.density(shift)
    for variant, percent in ((T2V, high_t2v), (I2V, high_i2v)):
        high, low = variant.experts
        assert 100 * density.mass(high) == pytest.approx(percent, abs=0.005)
        assert density.mass(high) + density.mass(low) == pytest.approx(1)


def test_the_boundary_belongs_to_the_high_expert() -> None:
    """Also in float32, which can't represent 0.9: the nearest float32 value is below it."""
    for variant in (T2V, I2V):
        assert variant.boundary is not None
        high, low = variant.experts
        for name in CHOICES:
            density = CHOICES[name][0].density(5.0)
            first = density.truncated_quantile(0.0, high)
            last = density.truncated_quantile(1.0, low)
            assert last < variant.boundary <= first
            assert [float(np.float32(t)) for t in (first, last)] == [first, last]
        uniform = UniformTimesteps().density(1.0)
        between = (uniform.truncated_quantile(p, e) for p, e in ((0.0, high), (1.0, low)))
        assert next(between) - next(between) == pytest.approx(6e-8, rel=0.1)


def test_parts_of_a_table_without_weight_are_never_drawn() -> None:
    density = TableTimesteps(weights=(0.0, 1.0, 0.0, 0.0, 2.0, 0.0)).density(1.0)
    p = np.array([0.0, 1 / 3 - 1e-12, 1 / 3 + 1e-12, 1.0])
    draws = density.truncated_quantiles(p, TI2V.experts[0])
    assert draws == pytest.approx([1 / 6, 1 / 3, 4 / 6, 5 / 6])


def test_an_expert_without_noise_levels_is_named() -> None:
    density = TableTimesteps(weights=(1.0, 0.0)).density(1.0)
    high, low = T2V.experts
    density.require([low])
    with pytest.raises(ConfigError, match=r"train\.timesteps: .*high expert.*0\.875 to 1") as error:
        density.require([high, low])
    assert len(error.value.problems) == 1
    with pytest.raises(ConfigError, match="high expert"):
        density.truncated_quantile(0.5, high)


def test_the_shift_is_the_official_one_unless_set_and_can_be_scaled() -> None:
    assert UniformTimesteps().density(12.0).quantile(0.5) == pytest.approx(12 / 13)
    given = UniformTimesteps(shift=3.0).density(12.0)
    assert given.quantile(0.5) == pytest.approx(3 / 4)
    assert given.scaled(0.5).quantile(0.5) == pytest.approx(1.5 / 2.5)


def test_the_shift_factor_is_the_root_of_the_ratio_of_token_counts() -> None:
    assert official_token_count(T2V) == 21 * 45 * 80
    assert official_token_count(TI2V) == 31 * 22 * 40
    assert shift_factor((16, 21, 90, 160), 75600) == 1
    assert shift_factor((2, 16, 21, 90, 160), 75600) == 1
    assert shift_factor((16, 1, 90, 160), 75600) == pytest.approx(21**-0.5)
