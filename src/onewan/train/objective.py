"""The flow-matching objective: draw t, make the noised sample and its target, compare. Pure.

x_t = (1 - t) z + t e with t in [0, 1], the target is e - z, and the transformer is told 1000 t
(``wan/utils/fm_solvers_unipc.py:317-323``). The density of t is in
`onewan.arithmetic.timestep_density`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from onewan.arithmetic.timestep_density import (
    TimestepDensity,
    official_token_count,
    shift_factor,
)
from onewan.arithmetic.timestep_weighting import TimestepWeighting, timestep_weights
from onewan.config.objective import LossSection
from onewan.config.schema import TrainSection
from onewan.data.loader import Batch, StepBatches
from onewan.seeds import derive_seed
from onewan.variants import Expert, Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisedBatch:
    """A batch at its noise levels, with what the transformer should say."""

    x: Tensor
    """[B, C, F, h, w] noisy latents."""
    t: Tensor
    """[B] noise levels in [0, 1]."""
    levels: tuple[float, ...]
    """The same numbers, known without asking the device."""
    target: Tensor
    """[B, C, F, h, w]: noise minus clean latents."""
    clean_first_frame: Tensor | None
    """[B] bool, TI2V-5B only: samples whose first latent frame is given (clean, or nearly), and not
    counted. None if there is none."""
    weight: Tensor
    """[B] float32: what each sample's loss is multiplied with, by its noise level and its clip."""
    weighted: bool
    """Whether one of `weight` is not 1, known without asking the device."""
    counts: Tensor | None
    """[B, 1, F, h, w] float32: how much each place counts against the others of its sample: its
    mask, and nothing for a first frame that is given. None where all count alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """How batches of one run are noised and what counts in them.

    Each draw is keyed by the run's seed, its purpose, the step, and the sample's place in the
    step's global batch: however the step is cut into batches, a sample gets the same numbers.
    They are made on the CPU, so that a run gives the same ones on every device.
    """

    density: TimestepDensity
    seed: int
    official_token_count: int | None = None
    """Tokens at which `density` has the shift that is meant; None is at any number of them."""
    stratified: bool = False
    """Draw each of a step's n levels from another one of n equally probable parts."""
    weighting: TimestepWeighting | None = None
    """What the noise levels count."""
    unmasked_weight: float = 0.0
    """What places outside of a mask count, against 1 within."""
    noise_offset: float = 0.0
    """Strength of noise that is one number for each channel, part of the noise and the target."""
    input_perturbation: float = 0.0
    """Strength of noise that is in the noisy sample but not in the target."""
    first_frame_probability: float = 0.0
    """Share of samples (of more than one latent frame) whose first frame is given."""
    first_frame_noise: tuple[float, float] | None = None
    """Mean and standard deviation of the logarithm of the noise level in a given first frame, at
    most 1; its timestep stays 0. None gives it clean, as the official code does
    (``wan/textimage2video.py:550-598``)."""

    def noise(self, batch: Batch, step: StepBatches, expert: Expert) -> NoisedBatch:
        """Noise `batch`, one of `step`'s, which may lie on a device by now."""
        places = batch.sample_indices
        latents_BCFHW = batch.latents
        density = self._density(latents_BCFHW)
        shares = np.array([self._share(step, place) for place in places])
        levels = density.truncated_quantiles(shares, expert)
        shape = latents_BCFHW.shape[1:]
        noise_BCFHW = self._normal("noise", step, places, shape)
        if self.noise_offset:
            each = (shape[0], 1, 1, 1)
            noise_BCFHW += self.noise_offset * self._normal("noise offset", step, places, each)
        seen_BCFHW = noise_BCFHW
        if self.input_perturbation:
            more = self._normal("input perturbation", step, places, shape)
            seen_BCFHW = noise_BCFHW + self.input_perturbation * more
        given_B = self._given(batch, step, places)
        of_levels = timestep_weights(self.weighting, density, expert, levels).tolist()
        sample = noised(
            latents_BCFHW,
            noise_BCFHW,
            levels.tolist(),
            seen_BCFHW=seen_BCFHW,
            weights=[w * c for w, c in zip(of_levels, batch.loss_weights, strict=True)],
            counts_BFHW=self._counts(batch, given_B),
        )
        return sample if given_B is None else self._with_first_frame(sample, batch, step, given_B)

    def fixed(self, batch: Batch, share: float, expert: Expert, seed: int) -> NoisedBatch:
        """Noise `batch` for a measurement: every sample at the level below which `share` of
        `expert`'s levels lie, with noise of `seed` and the sample's place. Levels, clips and masks
        count as in training; nothing else is done to the samples."""
        density = self._density(batch.latents)
        levels = density.truncated_quantiles(np.full(len(batch), share), expert)
        noise_BCFHW = torch.stack(
            [
                seeded_noise(batch.latents.shape[1:], derive_seed(seed, "fixed noise", place))
                for place in batch.sample_indices
            ]
        )
        of_levels = timestep_weights(self.weighting, density, expert, levels).tolist()
        return noised(
            batch.latents,
            noise_BCFHW,
            levels.tolist(),
            weights=[w * c for w, c in zip(of_levels, batch.loss_weights, strict=True)],
            counts_BFHW=self._counts(batch, None),
        )

    @staticmethod
    def levels(count: int) -> tuple[float, ...]:
        """Midpoints of `count` equally probable parts of a range, for `fixed`."""
        return tuple((i + 0.5) / count for i in range(count))

    def _density(self, latents_BCFHW: Tensor) -> TimestepDensity:
        if self.official_token_count is None:
            return self.density
        return self.density.scaled(shift_factor(latents_BCFHW.shape, self.official_token_count))

    def _share(self, step: StepBatches, place: int) -> float:
        """The probability, in [0, 1], at which the level of a sample lies in its distribution."""
        drawn = self._random("t", step, place).random()
        if not self.stratified:
            return drawn
        parts = list(range(step.global_size))
        self._random("strata", step).shuffle(parts)
        return (parts[place] + drawn) / step.global_size

    def _given(self, batch: Batch, step: StepBatches, places: Sequence[int]) -> Tensor | None:
        """[B] bool: whose first frame is given; None if no one's."""
        if self.first_frame_probability == 0 or batch.latents.shape[2] == 1:
            return None
        draws = [self._random("first frame", step, place).random() for place in places]
        given = [draw < self.first_frame_probability for draw in draws]
        return torch.tensor(given) if any(given) else None

    def _with_first_frame(
        self, sample: NoisedBatch, batch: Batch, step: StepBatches, given_B: Tensor
    ) -> NoisedBatch:
        """`sample` with the first frames of `batch`, or nearly those, where `given_B`."""
        frame_BCHW = batch.latents[:, :, 0]
        if self.first_frame_noise is not None:
            places = batch.sample_indices
            mean, std = self.first_frame_noise
            logs = [self._random("first frame level", step, p).gauss(mean, std) for p in places]
            s = torch.tensor([math.exp(min(log, 0.0)) for log in logs]).view(-1, 1, 1, 1)
            noise = self._normal("first frame noise", step, places, frame_BCHW.shape[1:])
            s, noise = _moved(s, frame_BCHW.device), _moved(noise, frame_BCHW.device)
            frame_BCHW = (1 - s) * frame_BCHW + s * noise
        given_B = _moved(given_B, frame_BCHW.device)
        given = given_B.view(-1, 1, 1, 1)
        sample.x[:, :, 0] = torch.where(given, frame_BCHW, sample.x[:, :, 0])
        return replace(sample, clean_first_frame=given_B)

    def _counts(self, batch: Batch, given_B: Tensor | None) -> Tensor | None:
        """[B, 1, F, h, w] as in `NoisedBatch`."""
        if batch.mask is None and given_B is None:
            return None
        if batch.mask is None:
            counts = torch.ones_like(batch.latents[:, :1])
        else:
            counts = self.unmasked_weight + (1 - self.unmasked_weight) * batch.mask
        if given_B is not None:
            counts[:, :, 0] *= ~_moved(given_B, counts.device).view(-1, 1, 1, 1)
        return counts

    def _normal(
        self, purpose: str, step: StepBatches, places: Sequence[int], shape: Sequence[int]
    ) -> Tensor:
        """[B, *shape] standard normal numbers."""
        seeds = [derive_seed(self.seed, purpose, step.number, place) for place in places]
        return torch.stack([seeded_noise(shape, seed) for seed in seeds])

    def _random(self, purpose: str, step: StepBatches, *counters: int) -> random.Random:
        return random.Random(derive_seed(self.seed, purpose, step.number, *counters))


def objective_of(train: TrainSection, variant: Variant, experts: Sequence[Expert]) -> Objective:
    """The objective that the run file's `train` means for `variant`.

    ConfigError if one of `experts`, those that train, would get no noise levels, or none that
    count.
    """
    density = train.timesteps.density(variant.flow_shift)
    given_frames = variant.has_clean_first_frame
    weighting = train.loss.weighting.function()
    if not train.timesteps.shift_by_tokens:  # else each size of clip has a density of its own
        density.require(experts)
        for expert in experts:
            timestep_weights(weighting, density, expert, np.empty(0))
    return Objective(
        density=density,
        seed=train.seed,
        official_token_count=official_token_count(variant)
        if train.timesteps.shift_by_tokens
        else None,
        stratified=train.timesteps.stratified,
        weighting=weighting,
        unmasked_weight=train.loss.unmasked_weight,
        noise_offset=train.noise_offset,
        input_perturbation=train.input_perturbation,
        first_frame_probability=train.first_frame_probability
        if variant.has_clean_first_frame
        else 0.0,
        first_frame_noise=train.first_frame_noise if given_frames else None,
    )


def seeded_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal float32 numbers on the CPU."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def noised(
    latents_BCFHW: Tensor,
    noise_BCFHW: Tensor,
    levels: Sequence[float],
    *,
    seen_BCFHW: Tensor | None = None,
    weights: Sequence[float] | None = None,
    counts_BFHW: Tensor | None = None,
) -> NoisedBatch:
    """Mix latents and noise at the samples' `levels`, on the latents' device; form the target.

    `seen_BCFHW` is what is mixed in where that is not the noise; `weights` and `counts_BFHW`
    ([B, 1, F, h, w]) as in `NoisedBatch`.
    """
    device = latents_BCFHW.device
    seen_BCFHW = _moved(noise_BCFHW if seen_BCFHW is None else seen_BCFHW, device)
    weights = [1.0] * len(levels) if weights is None else weights
    t_B = _moved(torch.tensor(levels, dtype=torch.float32), device)
    t = t_B.view(-1, 1, 1, 1, 1)
    return NoisedBatch(
        x=(1 - t) * latents_BCFHW + t * seen_BCFHW,
        t=t_B,
        levels=tuple(levels),
        target=_moved(noise_BCFHW, device) - latents_BCFHW,
        clean_first_frame=None,
        weight=_moved(torch.tensor(weights, dtype=torch.float32), device),
        weighted=any(w != 1 for w in weights),
        counts=counts_BFHW,
    )


def with_base_target(noised: NoisedBatch, velocity_BCFHW: Tensor, batch: Batch) -> NoisedBatch:
    """`noised` with the target `velocity_BCFHW`, the untrained model's, for those samples of
    `batch` that are to teach that."""
    if batch.is_prior is None:
        return noised
    chosen = batch.is_prior.view(-1, 1, 1, 1, 1)
    return replace(noised, target=torch.where(chosen, velocity_BCFHW.float(), noised.target))


def velocity_loss(
    prediction_BCFHW: Tensor,
    noised: NoisedBatch,
    choice: LossSection,
    temporal_consistency_weight: float = 1.0,
) -> Tensor:
    """How far the predicted velocity is from the target, a float32 scalar.

    It is the mean over the samples of `noised.weight` times the sample's loss, and that is the mean
    over all channels and places of rho(error), each place as much as `noised.counts` says. A sample
    in which nothing counts has a loss of 0.

    `temporal_consistency_weight` w splits each sample's error over its latent frames into the mean
    over frames (which count) and the deviations from it, and multiplies the deviations with the
    square root of w. The squares of the two parts add up to the squared error; so, for `mse`, w
    multiplies the second one's mean square. With w = 1, `mse`, and everything counting alike, this
    is ``F.mse_loss`` to the bit.
    """
    w, counts = temporal_consistency_weight, noised.counts
    prediction_BCFHW = prediction_BCFHW.float()
    if w == 1 and choice.kind == "mse" and counts is None and not noised.weighted:
        return F.mse_loss(prediction_BCFHW, noised.target)
    error = prediction_BCFHW - noised.target
    if counts is None:
        counts = torch.ones_like(error[:, :1])
    if w != 1:
        mean = (error * counts).sum(dim=2, keepdim=True) / _or_one(counts.sum(dim=2, keepdim=True))
        error = mean + math.sqrt(w) * (error - mean)
    places = (1, 2, 3, 4)
    total = (_rho(error, choice) * counts).sum(dim=places)
    per_sample = total / (_or_one(counts.sum(dim=places)) * error.shape[1])
    return (noised.weight * per_sample).mean()


def _rho(error: Tensor, choice: LossSection) -> Tensor:
    """The loss of each error: its square, or for the Huber losses that of small ones."""
    if choice.kind == "mse":
        return error.square()
    if choice.kind == "huber":
        return 2 * F.huber_loss(error, torch.zeros_like(error), "none", choice.delta)
    # 2 delta^2 (sqrt(1 + (e/delta)^2) - 1), without the difference that would lose small errors.
    square = error.square()
    return 2 * square / (1 + (1 + square / choice.delta**2).sqrt())


def _or_one(counted: Tensor) -> Tensor:
    """A divisor that is not 0; what it divides is 0 where nothing was counted."""
    return torch.where(counted > 0, counted, torch.ones_like(counted))


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)
