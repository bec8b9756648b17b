"""The one forward pass that training, validation and the OneTrainer add-on use.

All tensors enter and leave in float32. The noise level t in [0, 1] becomes the transformer's
timestep input 1000 t here and only here, in float32 (bfloat16 would round 873 to 872).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from onewan.model.precision import compute_context
from onewan.model.transformer import TransformerCall, WanTransformer
from onewan.variants import NUM_TRAIN_TIMESTEPS, PATCH_SIZE


def token_timesteps(t_B: Tensor, clean_BF: Tensor, latents_BCFHW: Tensor) -> Tensor:
    """[B, N] timesteps of the tokens, ordered by frame, row and column.

    They are 1000 t, but 0 in clean latent frames (`clean_BF`, [B, F] bool), as in
    ``wan/textimage2video.py:550-598`` for the first frame.
    """
    _, _, _, height, width = latents_BCFHW.shape
    _, rows, columns = PATCH_SIZE
    timesteps_BF = (t_B * NUM_TRAIN_TIMESTEPS)[:, None] * ~clean_BF
    return timesteps_BF.repeat_interleave((height // rows) * (width // columns), dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisyLatents:
    """One batch for the transformer; all tensors but the mask are float32."""

    x: Tensor
    """[B, C, F, H, W] noisy latents."""
    t: Tensor
    """[B] noise levels in [0, 1]."""
    text: Tensor
    """[B, 512, D] text embeddings, zero past each prompt's length."""
    condition: Tensor | None = None
    """[B, K, F, H, W] further input channels (`Conditioning.channels`)."""
    clean_frames: Tensor | None = None
    """[B, F] bool: the latent frames that are clean (TI2V-5B), the first or the last or both."""
    reference: Tensor | None = None
    """[B, C, H, W] latents of reference images (Fun-Control); None: zeros."""

    def timestep(self) -> Tensor:
        """[B], or where a frame is clean [B, N] for each token."""
        # With equal timesteps for all tokens, the result differs by 6e-7 from that of one timestep,
        # and takes more memory: hence only where a frame is clean.
        if self.clean_frames is None:
            return self.t.float() * NUM_TRAIN_TIMESTEPS
        return token_timesteps(self.t.float(), self.clean_frames, self.x)


def predict_velocities(
    transformer: WanTransformer3DModel,
    batches: Sequence[NoisyLatents],
    *,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """The transformer's predictions of (noise - clean latents), [B, C, F, H, W], float32.

    With a block runner all batches go through each block together. `dtype` is the precision of the
    matrix products. ValueError for latents whose sides do not divide into patches, which diffusers
    would crop silently.
    """
    for batch in batches:
        height, width = batch.x.shape[-2:]
        _, rows, columns = PATCH_SIZE
        if height % rows or width % columns:
            raise ValueError(
                f"latents of {width}x{height} do not divide into {columns}x{rows} patches"
            )
    together = isinstance(transformer, WanTransformer) and transformer.runs_batches
    calls = [_call(batch) for batch in batches]
    with compute_context(dtype, batches[0].x.device):
        if together:
            predictions = transformer.forward_batches(calls)
        else:
            predictions = [
                transformer(c.latents, c.timestep, c.text, return_dict=False)[0] for c in calls
            ]
    return [prediction.float() for prediction in predictions]


def predict_velocity(
    transformer: WanTransformer3DModel,
    x_BCFHW: Tensor,
    t_B: Tensor,
    text_BLD: Tensor,
    *,
    condition_BCFHW: Tensor | None = None,
    clean_frames_BF: Tensor | None = None,
    reference_BCHW: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`predict_velocities` for one batch, with its tensors as arguments."""
    batch = NoisyLatents(
        x=x_BCFHW,
        t=t_B,
        text=text_BLD,
        condition=condition_BCFHW,
        clean_frames=clean_frames_BF,
        reference=reference_BCHW,
    )
    return predict_velocities(transformer, [batch], dtype=dtype)[0]


def _call(batch: NoisyLatents) -> TransformerCall:
    latents_BCFHW = batch.x
    if batch.condition is not None:
        latents_BCFHW = torch.cat([latents_BCFHW, batch.condition], dim=1)
    return TransformerCall(latents_BCFHW, batch.timestep(), batch.text, batch.reference)
