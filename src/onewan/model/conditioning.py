"""The transformer's inputs besides noisy latents, timestep and text: one row per condition.

=======================  =====================================================================
`Variant.condition`      the transformer's further input
=======================  =====================================================================
text                     none (T2V-A14B)
first_frame_channels     frame mask and image latents, concatenated to the channels (I2V-A14B)
first_frame_clean        none; the first latent frame may be clean, at timestep 0 (TI2V-5B)
=======================  =====================================================================

A new condition (first and last frame, control video) is a class here, its entry in `_CONDITIONINGS`
and its facts in `onewan.variants`. Data loader, cache, sampler and the OneTrainer add-on use
only the object's methods.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline
from torch import Tensor

from onewan.model.vae import encode_video, vae_in_use
from onewan.variants import ConditionName, Variant


@dataclass(frozen=True)
class Conditioning:
    """How `variant` is conditioned besides the text; this class is for variants
    without further transformer inputs."""

    variant: Variant
    tensor_names: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors that `encode` returns. The cache stores them under these names."""

    def encode(self, vae: AutoencoderKLWan, pixels_BCFHW: Tensor) -> dict[str, Tensor]:
        """Condition tensors of clips for training, by name; [B, C, F', h, w], float32.

        `pixels_BCFHW` are whole clips in [-1, 1], F = 4n+1.
        """
        del vae, pixels_BCFHW
        return {}

    def channels(self, encoded: Mapping[str, Tensor]) -> Tensor | None:
        """Channels that follow the noisy latents': [B, `condition_channels`, F', h, w], or None.

        `encoded` is what `encode` returned for the batch.
        """
        del encoded
        return None

    def sampling_pipeline(self, *, with_image: bool) -> type[WanPipeline | WanImageToVideoPipeline]:
        """The diffusers pipeline for a sample that does, or does not, start from an image."""
        # Not `variant.pipeline`: the one that TI2V-5B's repository names takes no image.
        return _LockedImageToVideoPipeline if with_image else WanPipeline

    def pipeline_options(self) -> dict[str, Any]:
        """Arguments of the pipeline's constructor that depend on the condition."""
        return {"expand_timesteps": self.variant.has_clean_first_frame}


class FirstFrameChannels(Conditioning):
    """I2V-A14B: the first frame's latents and a frame mask, behind the noisy channels."""

    tensor_names = ("condition",)

    def encode(self, vae: AutoencoderKLWan, pixels_BCFHW: Tensor) -> dict[str, Tensor]:
        """Latents of the clip's first frame followed by zeros (mid gray) for all other frames.

        ``wan/image2video.py:316-323``. The latents of the zero frames are not zero, so the whole
        length has to be encoded.
        """
        condition_BCFHW = torch.zeros_like(pixels_BCFHW)
        condition_BCFHW[:, :, 0] = pixels_BCFHW[:, :, 0]
        return {"condition": encode_video(vae, condition_BCFHW)}

    def channels(self, encoded: Mapping[str, Tensor]) -> Tensor:
        latents_BCFHW = encoded["condition"]
        mask_BCFHW = frame_mask(latents_BCFHW, {0}, self.variant.temporal_compression)
        # The mask's channels come first, as in the official code and in diffusers' pipeline.
        return torch.cat([mask_BCFHW, latents_BCFHW], dim=1)


_CONDITIONINGS: Mapping[ConditionName, type[Conditioning]] = {
    "text": Conditioning,
    "first_frame_channels": FirstFrameChannels,
    "first_frame_clean": Conditioning,
}


def conditioning_of(variant: Variant) -> Conditioning:
    """The object that builds `variant`'s inputs besides latents, timestep and text."""
    return _CONDITIONINGS[variant.condition](variant)


def frame_mask(
    latents_BCFHW: Tensor, condition_frames: Collection[int], temporal_compression: int
) -> Tensor:
    """[B, `temporal_compression`, F, h, w]: 1 for pixel frames of the condition, 0 for others.

    The official mask marks pixel frames and folds each group of `temporal_compression` of them into
    the channels of one latent frame; the first pixel frame is repeated to fill a group of its own
    (``wan/image2video.py:289-302``).
    """
    batch, _, frames, height, width = latents_BCFHW.shape
    mask_F = latents_BCFHW.new_zeros(1 + (frames - 1) * temporal_compression)
    mask_F[list(condition_frames)] = 1
    folded = torch.cat([mask_F[:1].expand(temporal_compression), mask_F[1:]])
    mask_CF = folded.view(frames, temporal_compression).T
    # A view without memory of its own, since the mask is the same at all positions.
    return mask_CF[None, :, :, None, None].expand(batch, -1, -1, height, width)


class _LockedImageToVideoPipeline(WanImageToVideoPipeline):
    """diffusers' pipeline encodes the image itself, so it must take the lock (`model.vae`)."""

    def prepare_latents(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        with vae_in_use():
            return super().prepare_latents(*args, **kwargs)
