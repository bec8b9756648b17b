"""A VAE without learned weights, with the interfaces of diffusers' and of VideoX-Fun's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from tests.support.named_weights import named_tensor

CHANNELS = 16


class Encoded(NamedTuple):
    latent_dist: Any


class StandInVae(nn.Module):
    """Each latent is a function of 8x8 pixels of its 4 frames; the first frame stands alone. As
    with Wan's VAE, latents of gray frames are not 0."""

    dtype, device = torch.float32, torch.device("cpu")
    latent_channels, spatial_compression_ratio, temporal_compression_ratio = CHANNELS, 8, 4

    def __init__(self) -> None:
        super().__init__()
        self.encoder = self.quant_conv = nn.Identity()
        self.config = FrozenDict(
            latent_channels=CHANNELS,
            z_dim=CHANNELS,
            scale_factor_temporal=4,
            latents_mean=[0.0] * CHANNELS,
            latents_std=[1.0] * CHANNELS,
        )

    def encode(self, pixels_BCFHW: Tensor, **_: Any) -> Encoded:
        pooled = F.avg_pool3d(pixels_BCFHW, (1, 8, 8))
        first = pooled[:, :, :1].expand(-1, -1, 4, -1, -1)
        groups = torch.cat([first, pooled[:, :, 1:]], dim=2).unflatten(2, (-1, 4))
        weight, bias = named_tensor("vae", (CHANNELS, 3, 4)), named_tensor("bias", (CHANNELS,))
        mixed = torch.einsum("ock,bcfkhw->bofhw", weight, groups)
        latents = torch.tanh(mixed + bias.view(-1, 1, 1, 1))
        return Encoded(SimpleNamespace(mode=lambda: latents))
