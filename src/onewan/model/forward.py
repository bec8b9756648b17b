"""One forward contract for the three ways in which Wan 2.2 is conditioned.

=======================  =======================================================================
condition                 what the transformer gets
=======================  =======================================================================
text                      the noisy latents and one timestep per sample
first_frame_channels      the noisy latents, 4 mask channels and the condition's 16 latent channels
first_frame_clean         latents whose first frame may be clean; its tokens get timestep 0
=======================  =======================================================================

Everything enters and leaves in float32; t is the noise level in [0, 1] and becomes 1000 t here and
only here, in float32 (in bfloat16 873 would become 872).
"""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from onewan.model.precision import compute_context
from onewan.variants import NUM_TRAIN_TIMESTEPS


def first_frame_channels(condition_BCFHW: Tensor, temporal_compression: int = 4) -> Tensor:
    """[B, 4 + C, F, H, W]: the mask of I2V-A14B in front of the condition's latents.

    The official mask marks pixel frames and folds each four of them into the channels of a latent
    frame, the first frame repeated four times (``wan/image2video.py:289-302``). With only the first
    frame given that is ones in the first latent frame and zeros elsewhere.
    """
    batch, _, frames, height, width = condition_BCFHW.shape
    mask = condition_BCFHW.new_zeros(batch, temporal_compression, frames, height, width)
    mask[:, :, 0] = 1
    return torch.cat([mask, condition_BCFHW], dim=1)


def token_timesteps(t_B: Tensor, clean_B: Tensor, latents_BCFHW: Tensor, patch: int = 2) -> Tensor:
    """[B, N] timesteps, tokens by frame, row, column: 0 in the first frame where `clean_B`."""
    _, _, frames, height, width = latents_BCFHW.shape
    per_frame = (height // patch) * (width // patch)
    timesteps = (t_B * NUM_TRAIN_TIMESTEPS)[:, None].repeat(1, frames * per_frame)
    timesteps[:, :per_frame] *= ~clean_B[:, None]
    return timesteps


def predict_velocity(
    transformer: WanTransformer3DModel,
    x_BCFHW: Tensor,
    t_B: Tensor,
    text_BLD: Tensor,
    *,
    condition_BCFHW: Tensor | None = None,
    clean_first_frame_B: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The transformer's prediction of (noise - clean latents), [B, C, F, H, W], float32.

    `x_BCFHW` are noisy latents, `t_B` noise levels in [0, 1], `text_BLD` embeddings padded to 512.
    `condition_BCFHW` is what `first_frame_channels` makes (I2V-A14B). `clean_first_frame_B` says
    for which samples the first frame of `x_BCFHW` is clean (TI2V-5B). `dtype` is that of the matrix
    products. Sides of the latents must be even: diffusers would crop odd ones without a word.
    """
    height, width = x_BCFHW.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(f"latents of {width}x{height} do not divide into patches of 2x2")
    timestep = t_B.float() * NUM_TRAIN_TIMESTEPS
    # One timestep per token costs about 100 kB per token and block and gives the same to 6e-7.
    if clean_first_frame_B is not None:
        timestep = token_timesteps(t_B.float(), clean_first_frame_B, x_BCFHW)
    hidden = x_BCFHW
    if condition_BCFHW is not None:
        hidden = torch.cat([x_BCFHW, condition_BCFHW], dim=1)
    with compute_context(dtype, x_BCFHW.device):
        prediction = transformer(hidden, timestep, text_BLD, return_dict=False)[0]
    return prediction.float()
