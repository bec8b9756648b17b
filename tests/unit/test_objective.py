"""The objective: exact truncation, the mixing formula, the loss and its temporal split."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from onewan.data.loader import Batch
from onewan.train.objective import Noised, Objective, TimestepDensity, noised, velocity_loss
from onewan.variants import VARIANTS

T2V, I2V, TI2V = VARIANTS["t2v-a14b"], VARIANTS["i2v-a14b"], VARIANTS["ti2v-5b"]


def density(
    distribution: str, shift: float, mean: float = 0.0, std: float = 1.0
) -> TimestepDensity:
    return TimestepDensity(distribution=distribution, shift=shift, mean=mean, std=std)  # pyright: ignore


@pytest.mark.parametrize(
    ("distribution", "shift", "high_t2v", "high_i2v"),
    [  # percent of noise levels above 0.875 and 0.9; the closed forms, tabulated independently
        ("uniform", 1, 12.50, 10.00),
        ("uniform", 5, 41.67, 35.71),
        ("uniform", 12, 63.16, 57.14),
        ("logit_normal", 1, 2.58, 1.40),
        ("logit_normal", 3, 19.84, 13.60),
        ("logit_normal", 12, 70.51, 61.32),
    ],
)
def test_mass_of_the_high_expert(
    distribution: str, shift: float, high_t2v: float, high_i2v: float
) -> None:
    d = density(distribution, shift)
    for variant, percent in ((T2V, high_t2v), (I2V, high_i2v)):
        high, low = variant.experts
        assert 100 * d.mass(high) == pytest.approx(percent, abs=0.005)
        assert d.mass(high) + d.mass(low) == pytest.approx(1)


@pytest.mark.parametrize("variant", [T2V, I2V, TI2V])
@pytest.mark.parametrize(("distribution", "shift"), [("uniform", 12), ("logit_normal", 3)])
def test_draws_follow_the_truncated_density(variant, distribution: str, shift: float) -> None:
    """Kolmogorov-Smirnov against rejection sampling's definition, 20,000 draws, p > 0.001."""
    d = density(distribution, shift, mean=0.3, std=1.2)
    rng = random.Random(1)
    for expert in variant.experts:
        n = 20_000
        draws = sorted(d.truncated_quantile(rng.random(), expert) for _ in range(n))
        assert expert.t_min <= draws[0] and draws[-1] <= expert.t_max
        low, mass = d.cdf(expert.t_min), d.mass(expert)
        distance = max(
            abs((d.cdf(t) - low) / mass - (i + k) / n) for i, t in enumerate(draws) for k in (0, 1)
        )
        assert distance < 1.95 / math.sqrt(n)


def test_cdf_is_that_of_shifted_draws() -> None:
    """The distribution function against a plain simulation: draw, shift, count."""
    generator = torch.Generator().manual_seed(0)
    for name, shift in (("uniform", 5.0), ("logit_normal", 12.0)):
        if name == "uniform":
            u = torch.rand(200_000, generator=generator, dtype=torch.float64)
        else:
            u = torch.randn(200_000, generator=generator, dtype=torch.float64).sigmoid()
        t = shift * u / (1 + (shift - 1) * u)
        for level in (0.2, 0.5, 0.875, 0.95):
            share = float((t < level).double().mean())
            assert density(name, shift).cdf(level) == pytest.approx(share, abs=0.005)


def test_the_boundary_belongs_to_the_high_expert() -> None:
    for variant in (T2V, I2V):
        high, low = variant.experts
        d = density("uniform", 1)
        assert d.truncated_quantile(0.0, high) == variant.boundary
        below = torch.tensor(d.truncated_quantile(1 - 1e-16, low), dtype=torch.float32)
        assert float(below) < variant.boundary


def batch(count: int = 2, frames: int = 3, offset: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(frames)
    return Batch(
        latents=torch.randn(count, 4, frames, 4, 6, generator=generator),
        text=torch.zeros(count, 512, 8),
        condition=None,
        names=tuple(f"clip{i}" for i in range(count)),
        offset=offset,
    )


def test_noising_and_target() -> None:
    latents, noise = torch.randn(2, 4, 3, 4, 6), torch.randn(2, 4, 3, 4, 6)
    t = torch.tensor([0.25, 1.0])
    out = noised(latents, noise, t.tolist())
    torch.testing.assert_close(out.x[0], 0.75 * latents[0] + 0.25 * noise[0])
    assert torch.equal(out.x[1], noise[1])
    torch.testing.assert_close(out.x - t.view(-1, 1, 1, 1, 1) * out.target, latents)


def test_randomness_is_counted_by_place_in_the_global_batch() -> None:
    """Two micro-batches of one and one batch of two draw the same noise and levels."""
    objective = Objective(density=density("uniform", 5), seed=3)
    expert = TI2V.experts[0]
    whole = batch(2)
    together = objective.noise(whole, 7, expert)
    for i in range(2):
        part = Batch(
            latents=whole.latents[i : i + 1],
            text=whole.text[i : i + 1],
            condition=None,
            names=("x",),
            offset=i,
        )
        alone = objective.noise(part, 7, expert)
        assert torch.equal(alone.x[0], together.x[i])
        assert torch.equal(alone.t[0], together.t[i])
    other = objective.noise(whole, 8, expert)
    assert not torch.equal(other.t, together.t)
    assert not torch.equal(other.target, together.target)


def test_clean_first_frame() -> None:
    expert = TI2V.experts[0]
    always = Objective(density=density("uniform", 5), seed=3, first_frame_probability=1.0)
    sample = always.noise(batch(), 0, expert)
    assert sample.clean_first_frame is not None and bool(sample.clean_first_frame.all())
    assert torch.equal(sample.x[:, :, 0], batch().latents[:, :, 0])
    assert not torch.equal(sample.x[:, :, 1], batch().latents[:, :, 1])
    assert always.noise(batch(frames=1), 0, expert).clean_first_frame is None
    some = Objective(density=density("uniform", 5), seed=3, first_frame_probability=0.2)
    given = [some.noise(batch(), step, expert).clean_first_frame for step in range(500)]
    share = sum(int(g.sum()) for g in given if g is not None) / 1000
    assert share == pytest.approx(0.2, abs=0.04)
    assert any(g is None for g in given)  # where no sample is given its frame, none says so


def pair(frames: int = 3, clean: list[bool] | None = None) -> tuple[Tensor, Noised]:
    generator = torch.Generator().manual_seed(frames)
    prediction = torch.randn(2, 4, frames, 4, 6, generator=generator, requires_grad=True)
    target = torch.randn(2, 4, frames, 4, 6, generator=generator)
    mask = None if clean is None else torch.tensor(clean)
    return prediction, Noised(
        x=target, t=torch.zeros(2), levels=(0.0, 0.0), target=target, clean_first_frame=mask
    )


def test_weight_one_is_the_plain_loss_to_the_bit() -> None:
    prediction, sample = pair()
    plain = prediction.detach().clone().requires_grad_()
    loss, expected = velocity_loss(prediction, sample), F.mse_loss(plain, sample.target)
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(prediction.grad, plain.grad)  # pyright: ignore


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("clean", [None, [True, False]])
def test_temporal_split_follows_its_definition(weight: float, clean: list[bool] | None) -> None:
    """Loss and gradient against the definition, written sample by sample in float64."""
    prediction, sample = pair(clean=clean)
    reference = prediction.detach().double().requires_grad_()
    losses = []
    for b in range(2):
        start = 1 if clean and clean[b] else 0
        error = (reference[b] - sample.target[b].double())[:, start:]
        mean = error.mean(dim=1, keepdim=True)
        losses.append(mean.square().mean() + weight * (error - mean).square().mean())
    expected = torch.stack(losses).mean()
    expected.backward()
    loss = velocity_loss(prediction, sample, weight)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(prediction.grad.double(), reference.grad, rtol=1e-5, atol=1e-9)  # pyright: ignore


def test_split_adds_up_to_the_plain_loss() -> None:
    prediction, sample = pair()
    both = velocity_loss(prediction, sample, 2.0) - velocity_loss(prediction, sample, 1.0)
    mean_only = velocity_loss(prediction, sample, 0.0)
    torch.testing.assert_close(mean_only + both, velocity_loss(prediction, sample))


def test_a_clean_frame_does_not_count() -> None:
    prediction, sample = pair(clean=[True, False])
    with torch.no_grad():
        before = velocity_loss(prediction, sample)
        prediction[0, :, 0] += 100
        assert torch.equal(velocity_loss(prediction, sample), before)
        prediction[1, :, 0] += 100
        assert velocity_loss(prediction, sample) > before
