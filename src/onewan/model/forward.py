"""The one forward pass that training, validation and the OneTrainer add-on use.

All tensors enter and leave in float32. The noise level t in [0, 1] becomes the transformer's
timestep input 1000 t here and only here, in float32 (bfloat16 would round 873 to 872).
"""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from onewan.model.precision import compute_context
from onewan.variants import NUM_TRAIN_TIMESTEPS, PATCH_SIZE


def token_timesteps(t_B: Tensor, clean_B: Tensor, latents_BCFHW: Tensor) -> Tensor:
    """[B, N] timesteps of the tokens, ordered by frame, row and column.

    They are 1000 t, but 0 in the first frame of samples whose first frame is clean (`clean_B`,
    [B] bool), as in ``wan/textimage2video.py:550-598``.
    """
    _, _, frames, height, width = latents_BCFHW.shape
    _, rows, columns = PATCH_SIZE
    per_frame = (height // rows) * (width // columns)
    timesteps_BN = (t_B * NUM_TRAIN_TIMESTEPS)[:, None].repeat(1, frames * per_frame)
    timesteps_BN[:, :per_frame] *= ~clean_B[:, None]
    return timesteps_BN


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

    `x_BCFHW`: noisy latents. `t_B`: noise levels in [0, 1]. `text_BLD`: embeddings padded to 512
    tokens. `condition_BCFHW`: further input channels (`Conditioning.channels`).
    `clean_first_frame_B`: [B] bool, the samples whose first latent frame is clean (TI2V-5B).
    `dtype`: precision of the matrix products. ValueError for latents whose sides do not divide
    into patches, which diffusers would crop silently.
    """
    height, width = x_BCFHW.shape[-2:]
    _, rows, columns = PATCH_SIZE
    if height % rows or width % columns:
        raise ValueError(f"latents of {width}x{height} do not divide into {columns}x{rows} patches")
    timestep = t_B.float() * NUM_TRAIN_TIMESTEPS
    if clean_first_frame_B is not None:
        # Only where a frame is clean: a timestep for each token costs about 100 kB per token and
        # block, and with equal timesteps the result differs by 6e-7.
        timestep = token_timesteps(t_B.float(), clean_first_frame_B, x_BCFHW)
    hidden_BCFHW = x_BCFHW
    if condition_BCFHW is not None:
        hidden_BCFHW = torch.cat([x_BCFHW, condition_BCFHW], dim=1)
    with compute_context(dtype, x_BCFHW.device):
        prediction = transformer(hidden_BCFHW, timestep, text_BLD, return_dict=False)[0]
    return prediction.float()
