"""The flow-matching objective: draw t, add noise, form the target, compute the loss.

x_t = (1 - t) z + t e for clean latents z, noise e and the noise level t in [0, 1]. The target is
the velocity e - z, and the transformer's timestep input is 1000 t
(``wan/utils/fm_solvers_unipc.py:317-323``). The density of t is in
`onewan.arithmetic.timestep_density`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from onewan.arithmetic.clip_timesteps import ClipTimesteps
from onewan.arithmetic.condition_shares import given_frames
from onewan.arithmetic.timestep_density import Array, TimestepDensity, shift_factor
from onewan.arithmetic.timestep_weighting import TimestepWeighting, timestep_weights
from onewan.data.loader import Batch, StepBatches
from onewan.model.inputs import to_device
from onewan.seeds import derive_seed
from onewan.variants import Expert


class PointwiseLoss(Protocol):
    """The loss of a single error; the run file's `train.loss` is one."""

    @property
    def kind(self) -> Literal["mse", "huber", "pseudo_huber"]: ...
    @property
    def delta(self) -> float:
        """Error beyond which the Huber losses become linear."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisedBatch:
    """A batch with noise added, and the velocity target."""

    x: Tensor
    """[B, C, F, h, w] noisy latents."""
    t: Tensor
    """[B] noise levels in [0, 1]."""
    t_host: tuple[float, ...]
    """The same values in host memory, so that logging them does not wait for the device."""
    target: Tensor
    """[B, C, F, h, w] noise minus clean latents."""
    clean_frames: Tensor | None
    """[B, F] bool, TI2V-5B only: the latent frames that are given (clean, or nearly), which the
    loss leaves out. None if there are none."""
    weight: Tensor
    """[B] float32 loss weights of the samples, by noise level and clip."""
    has_weights: bool
    """Whether any of `weight` is not 1, known without waiting for the device."""
    loss_mask: Tensor | None
    """[B, 1, F, h, w] float32 loss weight of each latent cell: the clip's mask, and 0 in a
    clean frame. None if all cells have the same weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """How noise is added to the batches of a run, and how their losses are weighted.

    Each draw is seeded by the run's seed, its purpose, the step, and the sample's index in the
    global batch, so a sample gets the same values in any division into micro-batches. Values are
    drawn on the CPU, so that they do not depend on the device.
    """

    density: TimestepDensity
    seed: int
    official_token_count: int | None = None
    """Number of tokens at which the shift of `density` applies; it is scaled for clips of other
    sizes. None: it applies to all sizes."""
    stratified: bool = False
    """Draw the n noise levels of a step from n equally probable parts of the density, one each."""
    weighting: TimestepWeighting | None = None
    """Loss weight by noise level; None: 1 everywhere."""
    unmasked_weight: float = 0.0
    """Loss weight outside of a clip's mask; inside it is 1."""
    noise_offset: float = 0.0
    """Strength of noise that is constant in each channel, part of the noise and the target."""
    input_perturbation: float = 0.0
    """Strength of noise that is in the noisy latents but not in the target."""
    clean_frames: bool = False
    """Whether the frames that samples are given are clean latent frames, at timestep 0 (TI2V-5B);
    other variants have them among their channels, or none."""
    first_frame_noise: tuple[float, float] | None = None
    """Mean and standard deviation of the logarithm of the noise level in a clean first frame, at
    most 1; its timestep stays 0. None: no noise, as in the official code
    (``wan/textimage2video.py:550-598``)."""

    def require_timesteps(self, experts: Sequence[Expert]) -> None:
        """ConfigError if one of `experts` would draw no noise levels, or only ones of weight 0."""
        if self.official_token_count is None:  # otherwise each size of clip has its own density
            self.density.require(experts)
            for expert in experts:
                timestep_weights(self.weighting, self.density, expert, np.empty(0))

    def add_noise(self, batch: Batch, step: StepBatches, expert: Expert) -> NoisedBatch:
        """Noise as `step` draws it for the samples of `batch`, on the device of its latents."""
        indices = batch.sample_indices
        latents_BCFHW = batch.latents
        density = self._density(latents_BCFHW)
        # Quantiles first, timesteps from them: stratified draws are then strata of any density.
        quantiles = np.array([self._sample_quantile(step, index) for index in indices])
        parts = [_part_of(expert, own) for own in batch.timesteps]
        weightings = [own.weighting or self.weighting for own in batch.timesteps]
        levels = density.truncated_quantiles(quantiles, parts)
        shape = latents_BCFHW.shape[1:]
        noise_BCFHW = self._normal("noise", step, indices, shape)
        if self.noise_offset:
            per_channel = (shape[0], 1, 1, 1)
            offset = self._normal("noise offset", step, indices, per_channel)
            noise_BCFHW += self.noise_offset * offset
        input_noise_BCFHW = noise_BCFHW
        if self.input_perturbation:
            perturbation = self._normal("input perturbation", step, indices, shape)
            input_noise_BCFHW = noise_BCFHW + self.input_perturbation * perturbation
        clean_BF = self._clean_frames(batch)
        sample = noised_batch(
            latents_BCFHW,
            noise_BCFHW,
            levels.tolist(),
            input_noise_BCFHW=input_noise_BCFHW,
            weights=self._weights(batch, density, levels, [*zip(parts, weightings, strict=True)]),
            loss_mask_BFHW=self._loss_mask(batch, clean_BF),
        )
        return self._with_clean_frames(sample, batch, clean_BF, step)

    def add_noise_at_quantile(
        self, batch: Batch, quantile: float, expert: Expert, seed: int
    ) -> NoisedBatch:
        """Noise for validation: the same level for all samples, and noise of a fixed `seed`.

        A share `quantile` of `expert`'s density lies below the level, and the run's weighting
        applies, whatever the clips have of their own. Masks, clips' weights and clean frames are
        those of training; offset, perturbation and noise in clean frames are left out.
        """
        density = self._density(batch.latents)
        levels = density.truncated_quantiles(np.full(len(batch), quantile), expert)
        noise_BCFHW = torch.stack(
            [
                seeded_noise(batch.latents.shape[1:], derive_seed(seed, "fixed noise", index))
                for index in batch.sample_indices
            ]
        )
        clean_BF = self._clean_frames(batch)
        sample = noised_batch(
            batch.latents,
            noise_BCFHW,
            levels.tolist(),
            weights=self._weights(batch, density, levels, [(expert, self.weighting)] * len(batch)),
            loss_mask_BFHW=self._loss_mask(batch, clean_BF),
        )
        return self._with_clean_frames(sample, batch, clean_BF, None)

    @staticmethod
    def midpoint_quantiles(count: int) -> tuple[float, ...]:
        """Midpoints of `count` equally probable parts of a density."""
        return tuple((i + 0.5) / count for i in range(count))

    def _density(self, latents_BCFHW: Tensor) -> TimestepDensity:
        if self.official_token_count is None:
            return self.density
        return self.density.scaled(shift_factor(latents_BCFHW.shape, self.official_token_count))

    def _weights(
        self,
        batch: Batch,
        density: TimestepDensity,
        levels: Array,
        ranges: Sequence[tuple[Expert, TimestepWeighting | None]],
    ) -> list[float]:
        """Loss weight of each sample: that of its noise level times that of its clip.

        `ranges` are, for each sample, the expert with the range that its level is drawn from, and
        the weighting over this range.
        """
        by_level = [
            timestep_weights(weighting, density, part, levels[i : i + 1]).item()
            for i, (part, weighting) in enumerate(ranges)
        ]
        return [a * b for a, b in zip(by_level, batch.loss_weights, strict=True)]

    def _sample_quantile(self, step: StepBatches, index: int) -> float:
        """The quantile of the density, in [0, 1], that sample `index` of the global batch gets."""
        drawn = self._random("t", step, index).random()
        if not self.stratified:
            return drawn
        # Every sample shuffles the same list in the same way, so that no two get the same part,
        # whichever process or micro-batch they are in.
        parts = list(range(step.global_size))
        self._random("strata", step).shuffle(parts)
        return (parts[index] + drawn) / step.global_size

    def _clean_frames(self, batch: Batch) -> Tensor | None:
        """[B, F] bool, on the host: the latent frames that are clean; None if there are none."""
        if not self.clean_frames:
            return None
        frames = batch.latents.shape[2]
        clean = torch.zeros(len(batch), frames, dtype=torch.bool)
        for index, given in enumerate(batch.given):
            clean[index, list(given_frames(given, frames))] = True
        return clean if clean.any() else None

    def _with_clean_frames(
        self, sample: NoisedBatch, batch: Batch, clean_BF: Tensor | None, step: StepBatches | None
    ) -> NoisedBatch:
        """`sample` with the clean, or nearly clean, latent frames at `clean_BF`. Without a `step`,
        which draws their noise, they are clean."""
        if clean_BF is None:
            return sample
        clean_BF = to_device(clean_BF, sample.x.device)
        self._put_frame(sample, 0, self._first_frame(batch, step), clean_BF)
        if batch.last_frame is not None:
            self._put_frame(sample, -1, batch.last_frame, clean_BF)
        return replace(sample, clean_frames=clean_BF)

    def _first_frame(self, batch: Batch, step: StepBatches | None) -> Tensor:
        frame_BCHW = batch.latents[:, :, 0]
        if self.first_frame_noise is None or step is None:
            return frame_BCHW
        indices = batch.sample_indices
        mean, std = self.first_frame_noise
        logs = [self._random("first frame level", step, i).gauss(mean, std) for i in indices]
        s = torch.tensor([math.exp(min(log, 0.0)) for log in logs]).view(-1, 1, 1, 1)
        noise = self._normal("first frame noise", step, indices, frame_BCHW.shape[1:])
        s, noise = to_device(s, frame_BCHW.device), to_device(noise, frame_BCHW.device)
        return (1 - s) * frame_BCHW + s * noise

    @staticmethod
    def _put_frame(sample: NoisedBatch, index: int, frame_BCHW: Tensor, clean_BF: Tensor) -> None:
        chosen = clean_BF[:, index].view(-1, 1, 1, 1)
        # Assigning by a boolean mask (`x[chosen] = ...`) would wait for the device.
        sample.x[:, :, index] = torch.where(chosen, frame_BCHW, sample.x[:, :, index])

    def _loss_mask(self, batch: Batch, clean_BF: Tensor | None) -> Tensor | None:
        """[B, 1, F, h, w] as in `NoisedBatch`."""
        if batch.mask is None and clean_BF is None:
            return None
        if batch.mask is None:
            mask = torch.ones_like(batch.latents[:, :1])
        else:
            mask = self.unmasked_weight + (1 - self.unmasked_weight) * batch.mask
        if clean_BF is not None:
            # In place, which is safe: `mask` is a new tensor in both cases, not the batch's.
            mask *= ~to_device(clean_BF, mask.device)[:, None, :, None, None]
        return mask

    def _normal(
        self, purpose: str, step: StepBatches, indices: Sequence[int], shape: Sequence[int]
    ) -> Tensor:
        """[B, *shape] standard normal values, on the CPU."""
        # A generator for each sample, so that its noise does not depend on the rest of the batch.
        seeds = [derive_seed(self.seed, purpose, step.number, index) for index in indices]
        return torch.stack([seeded_noise(shape, seed) for seed in seeds])

    def _random(self, purpose: str, step: StepBatches, *counters: int) -> random.Random:
        return random.Random(derive_seed(self.seed, purpose, step.number, *counters))


def _part_of(expert: Expert, timesteps: ClipTimesteps) -> Expert:
    """`expert` with the range from which it draws the noise level of a clip with `timesteps`."""
    part = timesteps.part_of(expert)
    assert part is not None, "the loader gives an expert its own clips only"
    return part


def seeded_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal float32 values on the CPU."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def noised_batch(
    latents_BCFHW: Tensor,
    noise_BCFHW: Tensor,
    levels: Sequence[float],
    *,
    input_noise_BCFHW: Tensor | None = None,
    weights: Sequence[float] | None = None,
    loss_mask_BFHW: Tensor | None = None,
) -> NoisedBatch:
    """Mix latents and noise at the samples' noise levels, on the latents' device; form the target.

    `input_noise_BCFHW` is mixed in instead of the noise that the target has. `weights` and
    `loss_mask_BFHW` ([B, 1, F, h, w]) are as in `NoisedBatch`.
    """
    device = latents_BCFHW.device
    # The two are usually one tensor, which is then copied once.
    noise_host, noise_BCFHW = noise_BCFHW, to_device(noise_BCFHW, device)
    mixed_in = noise_BCFHW
    if input_noise_BCFHW is not None and input_noise_BCFHW is not noise_host:
        mixed_in = to_device(input_noise_BCFHW, device)
    weights = [1.0] * len(levels) if weights is None else weights
    t_B = to_device(torch.tensor(levels, dtype=torch.float32), device)
    t = t_B.view(-1, 1, 1, 1, 1)
    return NoisedBatch(
        x=(1 - t) * latents_BCFHW + t * mixed_in,
        t=t_B,
        t_host=tuple(levels),
        target=noise_BCFHW - latents_BCFHW,
        clean_frames=None,
        weight=to_device(torch.tensor(weights, dtype=torch.float32), device),
        has_weights=any(w != 1 for w in weights),
        loss_mask=loss_mask_BFHW,
    )


def with_base_target(noised: NoisedBatch, velocity_BCFHW: Tensor, batch: Batch) -> NoisedBatch:
    """`noised` whose target is `velocity_BCFHW`, the base model's prediction, in prior samples."""
    if batch.is_prior is None:
        return noised
    chosen = batch.is_prior.view(-1, 1, 1, 1, 1)
    return replace(noised, target=torch.where(chosen, velocity_BCFHW.float(), noised.target))


def with_preserved_target(
    noised: NoisedBatch, velocity_BCFHW: Tensor, weights_B: Tensor
) -> NoisedBatch:
    """`noised` with the target `velocity_BCFHW`, the base model's prediction, and each sample's
    weight multiplied by `weights_B`."""
    target, weight = velocity_BCFHW.float(), noised.weight * weights_B
    return replace(noised, target=target, weight=weight, has_weights=True)


def velocity_loss(
    prediction_BCFHW: Tensor,
    noised: NoisedBatch,
    loss: PointwiseLoss,
    temporal_consistency_weight: float = 1.0,
) -> Tensor:
    """The distance of the predicted velocity from the target, a float32 scalar.

    It is the mean over the samples of `noised.weight` times the sample's loss, which is the mean
    over channels and latent cells of the pointwise `loss`, weighted by `noised.loss_mask`. A sample
    whose mask is 0 everywhere has a loss of 0.

    `temporal_consistency_weight` w splits each sample's error over its latent frames into the mean
    over frames (weighted by the mask) and the deviations from it, and multiplies the deviations by
    the square root of w. The squares of the two parts add up to the squared error; so for `mse`, w
    multiplies the mean square of the deviations. With w = 1, `mse` and no weights or mask, the
    result is ``F.mse_loss``, bit-exact.
    """
    w, mask = temporal_consistency_weight, noised.loss_mask
    prediction_BCFHW = prediction_BCFHW.float()
    if w == 1 and loss.kind == "mse" and mask is None and not noised.has_weights:
        return F.mse_loss(prediction_BCFHW, noised.target)
    error = prediction_BCFHW - noised.target
    if mask is None:
        mask = torch.ones_like(error[:, :1])
    if w != 1:
        mean = (error * mask).sum(dim=2, keepdim=True) / _nonzero(mask.sum(dim=2, keepdim=True))
        error = mean + math.sqrt(w) * (error - mean)
    cells = (1, 2, 3, 4)
    # Divided by the sum of each sample's own mask, so that a small mask does not weaken its sample.
    total = (_pointwise_loss(error, loss) * mask).sum(dim=cells)
    # The mask has one channel for all channels of the error.
    per_sample = total / (_nonzero(mask.sum(dim=cells)) * error.shape[1])
    return (noised.weight * per_sample).mean()


def _pointwise_loss(error: Tensor, loss: PointwiseLoss) -> Tensor:
    """The loss of each error: its square; the Huber losses equal it for small errors."""
    if loss.kind == "mse":
        return error.square()
    if loss.kind == "huber":
        # Doubled, since PyTorch's Huber loss is half the square for small errors.
        return 2 * F.huber_loss(error, torch.zeros_like(error), "none", loss.delta)
    # 2 delta^2 (sqrt(1 + (e/delta)^2) - 1), without the difference, which loses small errors.
    square = error.square()
    return 2 * square / (1 + (1 + square / loss.delta**2).sqrt())


def _nonzero(total: Tensor) -> Tensor:
    """`total` as a divisor: 1 where it is 0, since the dividend is 0 there."""
    return torch.where(total > 0, total, torch.ones_like(total))
