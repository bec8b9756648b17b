"""The flow-matching objective: draw t, make the noised sample and its target, compare. Pure.

x_t = (1 - t) z + t e with t in [0, 1], the target is e - z, and the transformer is told 1000 t
(``wan/utils/fm_solvers_unipc.py:317-323``). t is drawn from a density over u, shifted by
t = s u / (1 + (s - 1) u) and truncated exactly to the range of the expert, after the shift: by the
inverse of the distribution function, without rejection and without squeezing the range. The
boundary lies in t, not in u; three public trainers compared the wrong one and had to mend it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from onewan.data.loader import Batch
from onewan.seeds import derive_seed
from onewan.variants import Expert

_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True, kw_only=True)
class TimestepDensity:
    """The distribution of noise levels before truncation: a density over u, then the shift."""

    distribution: Literal["uniform", "logit_normal"]
    shift: float
    mean: float = 0.0
    std: float = 1.0

    def cdf(self, t: float) -> float:
        """Probability of a noise level below `t`."""
        if t <= 0 or t >= 1:
            return float(t >= 1)
        u = t / (self.shift - (self.shift - 1) * t)
        if self.distribution == "uniform":
            return u
        return _NORMAL.cdf((float(np.log(u / (1 - u))) - self.mean) / self.std)

    def quantile(self, p: float) -> float:
        """The noise level below which the probability is `p`; the inverse of `cdf`."""
        if p <= 0 or p >= 1:
            return float(p >= 1)
        u = p
        if self.distribution == "logit_normal":
            u = 1 / (1 + float(np.exp(-(self.mean + self.std * _NORMAL.inv_cdf(p)))))
        return self.shift * u / (1 + (self.shift - 1) * u)

    def mass(self, expert: Expert) -> float:
        """Probability of the noise levels that `expert` serves."""
        return self.cdf(expert.t_max) - self.cdf(expert.t_min)

    def truncated_quantile(self, p: float, expert: Expert) -> float:
        """As `quantile`, of the distribution cut to `expert`'s range; `p` in [0, 1).

        Representable in float32 inside the range: below the boundary for the low expert.
        """
        low, high = self.cdf(expert.t_min), self.cdf(expert.t_max)
        t = self.quantile(low + p * (high - low))
        below = 1.0 if expert.t_max >= 1 else float(np.nextafter(np.float32(expert.t_max), 0))
        return min(max(t, expert.t_min), below)


@dataclass(frozen=True, slots=True, kw_only=True)
class Noised:
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
    """[B] bool, TI2V-5B only: samples whose first latent frame is given clean, and not counted.
    None if there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """How batches of one run are noised."""

    density: TimestepDensity
    seed: int
    first_frame_probability: float = 0.0
    """Share of samples (of more than one latent frame) whose first frame is given clean."""

    def noise(self, batch: Batch, step: int, expert: Expert) -> Noised:
        """Noise `batch` for step `step`. Each draw is keyed by step and place in the global batch.

        Random numbers are made on the CPU, so that a run gives the same ones on every device.
        """
        places = [batch.offset + i for i in range(len(batch))]
        levels = tuple(
            self.density.truncated_quantile(self._uniform("t", step, place), expert)
            for place in places
        )
        clean = None
        if self.first_frame_probability > 0 and batch.latents.shape[2] > 1:
            given = [
                self._uniform("first frame", step, place) < self.first_frame_probability
                for place in places
            ]
            clean = torch.tensor(given) if any(given) else None
        noise = torch.stack(
            [
                seeded_noise(batch.latents.shape[1:], derive_seed(self.seed, "noise", step, place))
                for place in places
            ]
        )
        return noised(batch.latents, noise, levels, clean)

    def _uniform(self, purpose: str, step: int, place: int) -> float:
        return random.Random(derive_seed(self.seed, purpose, step, place)).random()


def seeded_noise(shape: torch.Size, seed: int) -> Tensor:
    """Standard normal float32 numbers on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def noised(
    latents_BCFHW: Tensor,
    noise_BCFHW: Tensor,
    levels: Sequence[float],
    clean_first_frame_B: Tensor | None = None,
) -> Noised:
    """Mix latents and noise at the samples' `levels`, on the latents' device; form the target."""
    device = latents_BCFHW.device
    noise_BCFHW = noise_BCFHW.to(device, non_blocking=True)
    t_B = torch.tensor(levels, dtype=torch.float32).to(device, non_blocking=True)
    t = t_B.view(-1, 1, 1, 1, 1)
    x = (1 - t) * latents_BCFHW + t * noise_BCFHW
    if clean_first_frame_B is not None:
        clean_first_frame_B = clean_first_frame_B.to(device, non_blocking=True)
        given = clean_first_frame_B.view(-1, 1, 1, 1)
        x[:, :, 0] = torch.where(given, latents_BCFHW[:, :, 0], x[:, :, 0])
    return Noised(
        x=x,
        t=t_B,
        levels=tuple(levels),
        target=noise_BCFHW - latents_BCFHW,
        clean_first_frame=clean_first_frame_B,
    )


def velocity_loss(
    prediction_BCFHW: Tensor, noised: Noised, temporal_consistency_weight: float = 1.0
) -> Tensor:
    """Mean squared error of the predicted velocity over all samples, a float32 scalar.

    `temporal_consistency_weight` w splits each sample's error over its latent frames into the mean
    over frames and the deviations from it; the squares of the two add up to the mean squared error,
    and w multiplies the second. At w = 1, all frames counted, this is ``F.mse_loss`` to the bit.
    A frame that was given clean counts in neither part; each sample weighs the same.
    """
    clean = noised.clean_first_frame
    if temporal_consistency_weight == 1 and clean is None:
        return F.mse_loss(prediction_BCFHW.float(), noised.target)
    error = prediction_BCFHW.float() - noised.target
    counts = torch.ones_like(error[:, :1, :, :1, :1])
    if clean is not None:
        counts[:, 0, 0, 0, 0] -= clean.to(counts.dtype)
    num_frames = counts.sum(dim=2, keepdim=True)
    if temporal_consistency_weight == 1:
        per_place = (error.square() * counts).sum(dim=2, keepdim=True) / num_frames
        return per_place.mean()
    mean = (error * counts).sum(dim=2, keepdim=True) / num_frames
    deviation = (error - mean) * counts
    spread = deviation.square().sum(dim=2, keepdim=True) / num_frames
    return (mean.square() + temporal_consistency_weight * spread).mean()
