"""The objective: draws, noisy latents, targets and loss weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import kstest, norm

from onewan.arithmetic.clip_timesteps import ALL_TIMESTEPS, ClipTimesteps
from onewan.arithmetic.condition_shares import Given
from onewan.arithmetic.timestep_weighting import EVEN, Curve, MinSnr, Spline, timestep_weights
from onewan.config.objective import (
    CurveWeighting,
    LogitNormalTimesteps,
    LossSection,
    MinSnrWeighting,
    SplineWeighting,
    TableTimesteps,
    Timesteps,
    UniformTimesteps,
    Weighting,
)
from onewan.config.schema import TrainSection
from onewan.data.loader import Batch, StepBatches
from onewan.errors import ConfigError
from onewan.train.objective import (
    NoisedBatch,
    Objective,
    noised_batch,
    with_base_target,
)
from onewan.train.run import objective_of
from onewan.variants import VARIANTS

T2V, I2V, TI2V = VARIANTS["t2v-a14b"], VARIANTS["i2v-a14b"], VARIANTS["ti2v-5b"]
SINGLE = TI2V.experts[0]
UNIFORM = UniformTimesteps().density(5.0)


def batch(
    count: int = 2,
    frames: int = 3,
    size: tuple[int, int] = (4, 6),
    given: Sequence[Given] = ("none",),
) -> Batch:
    """`given` is repeated for all samples."""
    generator = torch.Generator().manual_seed(frames)
    return Batch(
        latents=torch.randn(count, 4, frames, *size, generator=generator),
        text=torch.zeros(count, 512, 8),
        captions=("",) * count,
        condition=None,
        mask=None,
        loss_weights=(1.0,) * count,
        timesteps=(ALL_TIMESTEPS,) * count,
        is_prior=None,
        names=tuple(f"clip{i}" for i in range(count)),
        given=(tuple(given) * count)[:count],
        last_frame=None,
        first_sample_index=0,
    )


def step_of(*batches: Batch, number: int = 7) -> StepBatches:
    return StepBatches(
        number=number,
        expert="single",
        batches=batches,
        global_size=sum(len(batch) for batch in batches),
    )


def split(whole: Batch) -> list[Batch]:
    """`whole` as batches of one."""
    return [
        replace(
            whole,
            latents=whole.latents[i : i + 1],
            mask=None if whole.mask is None else whole.mask[i : i + 1],
            loss_weights=whole.loss_weights[i : i + 1],
            timesteps=whole.timesteps[i : i + 1],
            names=(whole.names[i],),
            given=(whole.given[i],),
            first_sample_index=i,
        )
        for i in range(len(whole))
    ]


def draw(objective: Objective, whole: Batch | None = None, number: int = 7) -> NoisedBatch:
    whole = batch() if whole is None else whole
    return objective.add_noise(whole, step_of(whole, number=number), SINGLE)


# ------------------------------------------------------------------------------- noising


def test_noisy_latents_and_target_follow_the_definition() -> None:
    latents, noise = torch.randn(2, 4, 3, 4, 6), torch.randn(2, 4, 3, 4, 6)
    t = torch.tensor([0.25, 1.0])
    out = noised_batch(latents, noise, t.tolist())
    torch.testing.assert_close(out.x[0], 0.75 * latents[0] + 0.25 * noise[0])
    assert torch.equal(out.x[1], noise[1])
    torch.testing.assert_close(out.x - t.view(-1, 1, 1, 1, 1) * out.target, latents)
    assert torch.equal(out.weight, torch.ones(2)) and not out.has_weights and out.loss_mask is None


EVERYTHING = Objective(
    density=UNIFORM,
    seed=3,
    official_token_count=100,
    stratified=True,
    weighting=MinSnr(),
    unmasked_weight=0.1,
    noise_offset=0.3,
    input_perturbation=0.2,
    clean_frames=True,
    first_frame_noise=(-1.0, 0.5),
)


@pytest.mark.parametrize("objective", [Objective(density=UNIFORM, seed=3), EVERYTHING])
def test_a_sample_draws_the_same_in_any_division_into_micro_batches(objective: Objective) -> None:
    """Four micro-batches of one and one batch of four draw the same values for each sample."""
    whole = replace(batch(4, given=("first", "none")), loss_weights=(1.0, 2.0, 3.0, 4.0))
    whole = replace(whole, mask=torch.rand(4, 1, 3, 4, 6).round())
    together = draw(objective, whole)
    parts = split(whole)
    step = step_of(*parts)
    seen_given = []
    for i, part in enumerate(parts):
        alone = objective.add_noise(part, step, SINGLE)
        for name in ("x", "t", "target", "weight", "loss_mask"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[i]), name
        assert alone.t_host == together.t_host[i : i + 1]
        seen_given.append(alone.clean_frames is not None)
    if objective is EVERYTHING:
        assert together.clean_frames is not None and set(seen_given) == {True, False}
        assert together.clean_frames[:, 0].tolist() == seen_given
    other = draw(objective, whole, number=8)
    assert not set(other.t_host) & set(together.t_host)
    assert not torch.equal(other.target, together.target)


def test_two_samples_of_a_batch_draw_different_values() -> None:
    whole = batch(2, given=("first",))
    whole.latents[1] = whole.latents[0]
    always = replace(EVERYTHING, official_token_count=None)
    sample = draw(always, whole)
    assert sample.t_host[0] != sample.t_host[1]
    for tensor in (sample.target, sample.x[:, :, 0]):
        assert not torch.equal(tensor[0], tensor[1])


def test_noise_levels_on_the_host_are_those_of_the_tensor() -> None:
    sample = draw(Objective(density=UNIFORM, seed=0), batch(50))
    assert sample.t_host == tuple(sample.t.tolist())


def drawn_levels(objective: Objective, size: int, steps: int, expert) -> np.ndarray:
    """[steps, size]"""
    whole = batch(size, 1, (2, 2))
    return np.array(
        [objective.add_noise(whole, step_of(whole, number=n), expert).t_host for n in range(steps)]
    )


def test_stratified_draws_take_each_part_once_and_keep_the_density() -> None:
    high = I2V.experts[0]
    density = LogitNormalTimesteps(mean=0.5).density(5.0)
    plain, even = (
        drawn_levels(Objective(density=density, seed=1, stratified=s), 5, 1000, high)
        for s in (False, True)
    )
    low, mass = density.cdf(high.t_min), density.mass(high)
    shares = np.vectorize(lambda t: (density.cdf(t) - low) / mass)
    assert (np.sort((shares(even) * 5).astype(int)) == np.arange(5)).all()
    assert not (np.sort((shares(plain) * 5).astype(int)) == np.arange(5)).all()
    for levels in (plain, even):
        assert kstest(shares(levels).ravel(), "uniform").pvalue > 1e-3
    for index in range(5):  # no index in the batch always gets the same part
        assert kstest(shares(even)[:, index], "uniform").pvalue > 1e-3


RANGES = (
    ClipTimesteps(),
    ClipTimesteps(t_min=0.0, t_max=0.3),
    ClipTimesteps(t_min=0.95, t_max=1.0),
    ClipTimesteps(t_min=0.2, t_max=0.96),
)


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("official", [None, 75])
def test_samples_draw_from_the_density_truncated_to_the_ranges_of_clip_and_expert(
    *, stratified: bool, official: int | None
) -> None:
    """Kolmogorov-Smirnov, for each place in a batch whose clips have ranges of their own."""
    density = LogitNormalTimesteps(mean=0.5).density(3.0)
    objective = Objective(
        density=density, seed=5, stratified=stratified, official_token_count=official
    )
    if official is not None:  # one token: the density of the clip's size is the truncated one
        density = density.scaled((1 / official) ** 0.5)
    for expert in (*I2V.experts, SINGLE):
        ranges = [own for own in RANGES if own.part_of(expert)]
        mixed = replace(batch(len(ranges), 1, (2, 2)), timesteps=tuple(ranges))
        steps = [step_of(mixed, number=n) for n in range(1500)]
        levels = np.array([objective.add_noise(mixed, step, expert).t_host for step in steps])
        for place, own in enumerate(ranges):
            low, high = max(own.t_min, expert.t_min), min(own.t_max, expert.t_max)
            drawn, below = levels[:, place], density.cdf(low)
            assert drawn.min() >= low and (drawn.max() < high or high == 1)
            mass = density.cdf(high) - below
            shares = (np.vectorize(density.cdf)(drawn) - below) / mass
            assert kstest(shares, "uniform").pvalue > 1e-3
        # A clip without a range of its own draws what it draws among such clips.
        plain = replace(mixed, timesteps=RANGES[:1] * len(ranges))
        assert objective.add_noise(plain, steps[0], expert).t_host[0] == levels[0, 0]


def test_stratified_draws_of_clips_with_ranges_are_parts_of_each_ones_own_density() -> None:
    objective = Objective(density=UNIFORM, seed=5, stratified=True)
    whole = replace(batch(4, 1, (2, 2)), timesteps=RANGES)
    for number in range(50):
        levels = objective.add_noise(whole, step_of(whole, number=number), SINGLE).t_host
        shares = [
            (UNIFORM.cdf(level) - UNIFORM.cdf(own.t_min))
            / (UNIFORM.cdf(own.t_max) - UNIFORM.cdf(own.t_min))
            for level, own in zip(levels, RANGES, strict=True)
        ]
        # Rounded to float32, a level may be a little beside its part.
        assert sorted(int(4 * share + 1e-5) for share in shares) == [0, 1, 2, 3]


def test_validation_measures_clips_with_ranges_like_others() -> None:
    whole = batch(2)
    own = ClipTimesteps(t_min=0.9, t_max=1.0, weighting=Curve(((0.0, 0.0), (1.0, 1.0))))
    objective = Objective(density=UNIFORM, seed=5, weighting=MinSnr())
    fixed = [
        objective.add_noise_at_quantile(replace(whole, timesteps=timesteps), 0.1, SINGLE, 3)
        for timesteps in ((ALL_TIMESTEPS,) * 2, (own, ALL_TIMESTEPS))
    ]
    for name in ("x", "t", "target", "weight"):
        assert torch.equal(*(getattr(sample, name) for sample in fixed)), name


def test_a_clip_that_another_expert_trains_is_not_drawn_for() -> None:
    only_high = ClipTimesteps(t_min=0.9, t_max=1.0)
    high, low = T2V.experts
    assert only_high.part_of(high) == replace(high, t_min=0.9)
    assert only_high.part_of(low) is None
    # The end of a range belongs to it only at 1, so that the boundary is the high expert's.
    below = ClipTimesteps(t_min=0.0, t_max=0.875)
    assert below.part_of(low) == low and below.part_of(high) is None
    assert ALL_TIMESTEPS.part_of(high) == high and ALL_TIMESTEPS.part_of(low) == low


def test_shift_by_tokens_gives_small_clips_less_noise() -> None:
    """6 tokens for each latent frame; the same quantile of the distribution with another shift."""
    plain = Objective(density=UNIFORM, seed=1)
    scaled = replace(plain, official_token_count=75)
    for frames in (1, 2):
        levels = [draw(o, batch(2, frames)).t_host for o in (plain, scaled)]
        other = UNIFORM.scaled(math.sqrt(6 * frames / 75))
        for before, after in zip(*levels, strict=True):
            assert after == pytest.approx(other.quantile(UNIFORM.cdf(before)), abs=1e-6)
            assert after < before


def test_noise_offset_is_one_value_for_each_channel_of_noise_and_target() -> None:
    plain, offset = (Objective(density=UNIFORM, seed=1, noise_offset=o) for o in (0.0, 0.5))
    whole = batch(64, 2)
    a, b = draw(plain, whole), draw(offset, whole)
    added = b.target - a.target
    torch.testing.assert_close(added, added[:, :, :1, :1, :1].expand_as(added))
    torch.testing.assert_close(b.x - a.x, b.t.view(-1, 1, 1, 1, 1) * added)
    offsets = added[:, :, 0, 0, 0] / 0.5
    assert kstest(offsets.flatten().numpy(), "norm").pvalue > 1e-3
    assert len(offsets.flatten().unique()) == 64 * 4


def test_input_perturbation_is_in_the_noisy_latents_and_not_in_the_target() -> None:
    plain, moved = (Objective(density=UNIFORM, seed=1, input_perturbation=g) for g in (0.0, 0.1))
    a, b = draw(plain, batch(8)), draw(moved, batch(8))
    assert torch.equal(a.target, b.target)
    added = (b.x - a.x) / (0.1 * b.t.view(-1, 1, 1, 1, 1))
    assert kstest(added.flatten().numpy(), "norm").pvalue > 1e-3
    noise = a.target + batch(8).latents
    assert abs(float((added * noise).mean())) < 0.1  # independent of the sample's noise


def test_a_conditioning_frame_is_clean_and_left_out_of_the_loss() -> None:
    objective = Objective(density=UNIFORM, seed=3, clean_frames=True)
    sample = draw(objective, batch(given=("first",)))
    assert sample.clean_frames is not None
    assert sample.clean_frames.tolist() == [[True, False, False]] * 2
    assert torch.equal(sample.x[:, :, 0], batch().latents[:, :, 0])
    assert sample.loss_mask is not None and sample.loss_mask.shape == (2, 1, 3, 4, 6)
    assert not sample.loss_mask[:, :, 0].any() and bool((sample.loss_mask[:, :, 1:] == 1).all())
    never = draw(objective, batch())
    assert torch.equal(never.x[:, :, 1:], sample.x[:, :, 1:])
    assert torch.equal(never.target, sample.target)
    assert never.clean_frames is None and never.loss_mask is None
    # Of other variants, given frames are among the channels.
    assert torch.equal(
        draw(replace(objective, clean_frames=False), batch(given=("first",))).x, never.x
    )


def test_the_last_frame_is_the_given_one_and_left_out_of_the_loss() -> None:
    objective = Objective(density=UNIFORM, seed=3, clean_frames=True, first_frame_noise=(-1.0, 0.5))
    last = torch.randn(3, 4, 4, 6, generator=torch.Generator().manual_seed(8))
    whole = replace(batch(3, given=("both", "last", "none")), last_frame=last)
    sample, plain = draw(objective, whole), draw(objective, batch(3))
    assert sample.clean_frames is not None
    assert sample.clean_frames.int().tolist() == [[1, 0, 1], [0, 0, 1], [0, 0, 0]]
    assert torch.equal(sample.x[:2, :, -1], last[:2])
    assert torch.equal(sample.x[1:, :, :-1], plain.x[1:, :, :-1])
    assert torch.equal(sample.x[2], plain.x[2])
    assert sample.loss_mask is not None
    assert torch.equal(sample.loss_mask[:, 0, :, 0, 0] == 0, sample.clean_frames)
    validated = objective.add_noise_at_quantile(whole, 0.25, SINGLE, 5)
    assert validated.clean_frames is not None
    assert torch.equal(validated.clean_frames, sample.clean_frames)
    assert torch.equal(validated.x[0, :, 0], whole.latents[0, :, 0])  # without its noise


def test_noise_in_a_conditioning_frame_follows_its_distribution() -> None:
    """Its level is log-normal, at most 1; the noise is not the one of the sample."""
    latents = torch.zeros(2000, 4, 2, 8, 8)
    whole = replace(batch(2000, 2, given=("first",)), latents=latents)
    objective = Objective(density=UNIFORM, seed=3, clean_frames=True, first_frame_noise=(-1.0, 0.8))
    sample = draw(objective, whole)
    first = sample.x[:, :, 0]
    level = first.square().mean(dim=(1, 2, 3)).sqrt()  # an estimate from 256 values
    assert kstest(level.log()[level < 0.8].numpy(), _cut_normal).pvalue > 1e-3
    assert float(level.max()) < 1.2 and float((level > 0.85).float().mean()) > 0.08
    assert abs(float((first / level.view(-1, 1, 1, 1) * sample.target[:, :, 0]).mean())) < 0.01
    # Mixed, not added: the clean frame has the weight 1 - s.
    shown = draw(objective, replace(whole, latents=torch.full_like(latents, 3.0))).x[:, :, 0]
    rest = (shown - first).mean(dim=(1, 2, 3)) / 3
    torch.testing.assert_close(rest.clamp(min=0), (1 - level).clamp(min=0), atol=0.2, rtol=0)
    exact = replace(objective, first_frame_noise=(-1.0, 0.0))
    frames = [draw(exact, replace(whole, latents=z)).x[:, :, 0] for z in (latents, latents + 1)]
    torch.testing.assert_close(
        frames[1] - frames[0], torch.full_like(frames[0], 1 - math.exp(-1)), atol=1e-5, rtol=0
    )
    # A great mean is a frame of pure noise, and no overflow.
    noise = draw(replace(objective, first_frame_noise=(2000.0, 0.0)), whole).x[:, :, 0]
    assert kstest(noise[:20].flatten().numpy(), "norm").pvalue > 1e-3


def _cut_normal(x: np.ndarray) -> np.ndarray:
    return norm.cdf(x, -1.0, 0.8) / norm.cdf(math.log(0.8), -1.0, 0.8)


def test_masks_weight_each_latent_cell() -> None:
    mask = torch.rand(2, 1, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    masked = replace(batch(), mask=mask)
    objective = Objective(density=UNIFORM, seed=3, unmasked_weight=0.25)
    sample = draw(objective, masked)
    torch.testing.assert_close(sample.loss_mask, mask + (1 - mask) * 0.25)
    first = replace(masked, given=("first",) * 2)
    given = draw(replace(objective, clean_frames=True), first)
    assert given.loss_mask is not None and sample.loss_mask is not None
    assert not given.loss_mask[:, :, 0].any()
    assert torch.equal(given.loss_mask[:, :, 1:], sample.loss_mask[:, :, 1:])
    assert torch.equal(masked.mask, mask)  # pyright: ignore  (the batch's own is left alone)


def test_sample_weight_is_that_of_its_noise_level_times_that_of_its_clip() -> None:
    weighting = Curve(((0.0, 0.0), (1.0, 1.0)))
    objective = Objective(density=UniformTimesteps().density(1.0), seed=3, weighting=weighting)
    sample = draw(objective, replace(batch(), loss_weights=(1.0, 3.0)))
    torch.testing.assert_close(sample.weight, 2 * sample.t * torch.tensor([1.0, 3.0]))
    assert sample.weight.dtype == torch.float32 and sample.has_weights
    assert not draw(replace(objective, weighting=None)).has_weights


def test_validation_noise_is_the_same_each_time_and_without_extras() -> None:
    objective = EVERYTHING
    whole = replace(batch(3), mask=torch.ones(3, 1, 3, 4, 6))
    plain = replace(whole, mask=None)
    a, b = (objective.add_noise_at_quantile(whole, 0.25, SINGLE, 5) for _ in range(2))
    assert torch.equal(a.x, b.x) and torch.equal(a.target, b.target)
    assert a.loss_mask is not None and a.loss_mask.min() == 1
    bare = Objective(density=objective.density, seed=99, official_token_count=100)
    reference = bare.add_noise_at_quantile(plain, 0.25, SINGLE, 5)
    assert torch.equal(reference.x, a.x) and reference.loss_mask is None
    assert not reference.has_weights
    assert a.clean_frames is None
    density = UNIFORM.scaled(math.sqrt(18 / 100))
    assert a.t_host == (density.truncated_quantile(0.25, SINGLE),) * 3
    t = a.t.view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(a.x, whole.latents + t * a.target)
    for i, part in enumerate(split(whole)):
        assert torch.equal(objective.add_noise_at_quantile(part, 0.25, SINGLE, 5).x[0], a.x[i])
    assert not torch.equal(objective.add_noise_at_quantile(whole, 0.25, SINGLE, 6).target, a.target)
    noise = a.target + whole.latents
    assert not torch.allclose(noise[0], noise[1], atol=0.1)
    # Weighted as in training.
    weights = timestep_weights(MinSnr(), density, SINGLE, np.array(a.t_host))
    torch.testing.assert_close(a.weight, torch.tensor(weights, dtype=torch.float32))
    weighted = replace(whole, loss_weights=(2.5,) * 3)
    heavy = objective.add_noise_at_quantile(weighted, 0.25, SINGLE, 5)
    torch.testing.assert_close(heavy.weight, 2.5 * a.weight)


def test_validation_quantiles_are_midpoints() -> None:
    assert Objective.midpoint_quantiles(4) == (0.125, 0.375, 0.625, 0.875)
    assert Objective.midpoint_quantiles(1) == (0.5,)


def test_prior_samples_get_the_base_models_prediction_as_target() -> None:
    sample = draw(Objective(density=UNIFORM, seed=1))
    velocity = torch.randn_like(sample.target)
    taught = with_base_target(
        sample, velocity, replace(batch(), is_prior=torch.tensor([False, True]))
    )
    assert torch.equal(taught.target[0], sample.target[0])
    assert torch.equal(taught.target[1], velocity[1])
    assert with_base_target(sample, velocity, batch()) is sample


def test_objective_has_the_values_of_the_run_file() -> None:
    train = TrainSection.model_validate(
        {
            "seed": 9,
            "timesteps": {"distribution": "mode", "shift_by_tokens": True, "stratified": True},
            "loss": {"weighting": "min_snr", "unmasked_weight": 0.3},
            "noise_offset": 0.1,
            "input_perturbation": 0.2,
            "first_frame_noise": [-3.5, 0.5],
        }
    )
    assert objective_of(train, TI2V, TI2V.experts) == Objective(
        density=train.timesteps.density(5.0),
        seed=9,
        official_token_count=27280,
        stratified=True,
        weighting=MinSnr(),
        unmasked_weight=0.3,
        noise_offset=0.1,
        input_perturbation=0.2,
        clean_frames=True,
        first_frame_noise=(-3.5, 0.5),
    )
    plain = objective_of(TrainSection(), T2V, T2V.experts)
    assert (plain.density.shift, plain.official_token_count) == (12.0, None)
    assert (plain.clean_frames, plain.first_frame_noise) == (False, None)


def test_an_expert_without_noise_levels_or_weights_is_refused() -> None:
    high, low = T2V.experts
    none = TrainSection(timesteps=TableTimesteps(weights=(1.0, 0.0), shift=1.0))
    with pytest.raises(ConfigError, match=r"train\.timesteps.*high expert"):
        objective_of(none, T2V, [high, low])
    objective_of(none, T2V, [low])
    curve = CurveWeighting(points=((0.0, 1.0), (0.5, 0.0)))
    unweighted = TrainSection(loss=LossSection(weighting=curve))
    with pytest.raises(ConfigError, match=r"train\.loss\.weighting.*high expert"):
        objective_of(unweighted, T2V, [high, low])
    objective_of(unweighted, T2V, [low])


# ------------------------------------------------------------------------ weights of levels

CURVE = CurveWeighting(points=((0.1, 2.0), (0.6, 0.5), (0.95, 4.0)))


def curve(t: float) -> float:
    if t <= 0.1:
        return 2.0
    if t >= 0.95:
        return 4.0
    return 2.0 - 1.5 * (t - 0.1) / 0.5 if t <= 0.6 else 0.5 + 3.5 * (t - 0.6) / 0.35


SPLINE = SplineWeighting(points=CURVE.points)


def spline(t: float) -> float:
    """By the formulas of Fritsch and Butland, for the three points: the slope at the middle one, a
    minimum, is 0; at the ends it is that of a parabola through all three, with its sign kept."""
    (a, p), (b, q), (c, r) = SPLINE.points
    h, k, d, e = b - a, c - b, (q - p) / (b - a), (r - q) / (c - b)
    first, last = ((2 * h + k) * d - h * e) / (h + k), ((2 * k + h) * e - k * d) / (h + k)
    first = min(max(first, 3 * d), 0.0)
    last = max(min(last, 3 * e), 0.0)
    if t <= a or t >= c:
        return p if t <= a else r
    x, left, right, start, end, width = (
        ((t - a) / h, p, q, first, 0.0, h) if t <= b else ((t - b) / k, q, r, 0.0, last, k)
    )
    return (
        (1 + 2 * x) * (1 - x) ** 2 * left
        + x**2 * (3 - 2 * x) * right
        + width * x * (1 - x) ** 2 * start
        + width * x**2 * (x - 1) * end
    )


def test_curves_go_through_their_points_and_stay_between_them() -> None:
    points = CURVE.points
    levels = np.linspace(0, 1, 2001)
    for weighting in (Curve(points), Spline(points)):
        np.testing.assert_allclose(
            weighting(np.array([t for t, _ in points])), [weight for _, weight in points]
        )
        values = weighting(levels)
        assert values.min() >= 0.5 and values.max() <= 4.0
        assert set(values[levels <= 0.1]) == {2.0} and set(values[levels >= 0.95]) == {4.0}
        for (start, _), (end, _) in pairwise(points):  # no bump between two points
            rises = np.sign(np.diff(values[(levels > start) & (levels < end)]))
            assert len(set(rises)) == 1
    # The slope of the spline has no jump where that of the curve does.
    for weighting, jumps in ((Curve(points), True), (Spline(points), False)):
        before, at, after = weighting(np.array([0.6 - 1e-6, 0.6, 0.6 + 1e-6]))
        assert (abs((after - at) - (at - before)) > 1e-6) == jumps
    assert set(EVEN(levels)) == {1.0}


def test_a_clips_own_weighting_replaces_the_runs_and_has_a_mean_of_one_over_its_range() -> None:
    _, low = T2V.experts
    run, own = MinSnr(), Curve(((0.0, 1.0), (0.3, 3.0)))
    objective = Objective(density=UNIFORM, seed=5, weighting=run)
    clips = (
        ALL_TIMESTEPS,
        ClipTimesteps(t_max=0.3),
        ClipTimesteps(weighting=own),
        ClipTimesteps(t_max=0.3, weighting=own),
        ClipTimesteps(weighting=EVEN),
    )
    whole = replace(batch(5, 1, (2, 2)), timesteps=clips, loss_weights=(1.0, 1.0, 2.0, 1.0, 1.0))
    samples = [objective.add_noise(whole, step_of(whole, number=n), low) for n in range(3000)]
    levels = np.array([sample.t_host for sample in samples])
    weights = torch.stack([sample.weight for sample in samples]).double().numpy()
    assert weights.mean(axis=0) == pytest.approx([1, 1, 2, 1, 1], abs=0.06)
    for place, weighting in enumerate((run, run, own, own, EVEN)):
        expected = weighting(levels[:, place])
        np.testing.assert_allclose(
            weights[:, place] / weights[0, place], expected / expected[0], rtol=1e-5
        )
    assert (weights[:, 4] == 1).all() and not (weights[:, 0] == 1).any()


@pytest.mark.parametrize(
    ("weighting", "definition"),
    [
        (MinSnrWeighting(), lambda t: t**2 * min(((1 - t) / t) ** 2, 5)),
        (MinSnrWeighting(gamma=0.5), lambda t: t**2 * min(((1 - t) / t) ** 2, 0.5)),
        (CURVE, curve),
        (SPLINE, spline),
    ],
)
@pytest.mark.parametrize("timesteps", [UniformTimesteps(), LogitNormalTimesteps(std=0.8)])
def test_timestep_weights_have_their_shape_and_a_mean_of_one(
    weighting: Weighting, definition, timesteps: Timesteps
) -> None:
    """The mean by an integral over the density of t, which is the slope of its cdf."""
    density = timesteps.density(3.0)
    for expert in (*T2V.experts, SINGLE):
        levels = np.linspace(expert.t_min, expert.t_max, 9)[1:-1]
        weights = timestep_weights(weighting.function(), density, expert, levels)
        expected = np.array([definition(t) for t in levels])
        np.testing.assert_allclose(weights / weights[3], expected / expected[3], rtol=1e-12)

        def pdf(t: float) -> float:
            return (density.cdf(t + 1e-6) - density.cdf(t - 1e-6)) / 2e-6

        mean, _ = quad(
            lambda t: definition(t) * pdf(t),
            expert.t_min + 2e-6,
            expert.t_max - 2e-6,
            points=(0.3, 0.5, 0.6, 0.95),
            limit=200,
        )
        scale = float(weights[3] / expected[3])
        assert scale * mean / density.mass(expert) == pytest.approx(1, rel=1e-3)


def test_min_snr_weights_the_error_of_the_clean_sample() -> None:
    """min(SNR, gamma) times the error of x - t v is the weight times the error of v."""
    z, e, error, t = 0.7, -0.4, 0.05, 0.3
    x, v = (1 - t) * z + t * e, e - z
    of_clean = min(((1 - t) / t) ** 2, 2.0) * ((x - t * (v + error)) - z) ** 2
    density = UniformTimesteps().density(1.0)
    levels = np.array([t, 0.6])
    a, b = timestep_weights(MinSnr(2.0), density, SINGLE, levels)
    assert of_clean / ((1 - 0.6) ** 2 * error**2) == pytest.approx(a / b)
