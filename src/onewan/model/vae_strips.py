"""Encoding a video in strips, with the numbers of the whole.

The levels of the VAE's encoder above the latents' resolution take nearly all of its memory, and see
only a few latent cells around each point: they are convolutions, and normalization over channels.
So each strip of the picture is computed with a margin as wide as they see, which is cut off
afterwards; the padding at the picture's own edges is that of the whole. What follows, at the
resolution of the latents, has attention over the whole picture, and is small: it gets the strips
put together again.

The result is that of the whole picture but for rounding, since convolutions of another shape may
add in another order. diffusers' own tiles (`enable_tiling`) are blended, and each has an attention
of its own: with random weights, tiles of 128x128 pixels differ by 16 % of the latents' size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanResample,
    patchify,
)
from torch import Tensor

from onewan.arithmetic.strips import strips_of


def moments_in_strips(vae: AutoencoderKLWan, pixels_BCFHW: Tensor, strips: int) -> Tensor:
    """Mean and logarithm of the variance of the latents, [B, 2C, F', h, w], as `vae.encode` has
    them, computed in up to `strips` strips of the longer side."""
    encoder, patch = vae.encoder, vae.config["patch_size"]
    side = 3 if pixels_BCFHW.shape[3] > pixels_BCFHW.shape[4] else 4
    cell = (patch or 1) * 2 ** (len(encoder.dim_mult) - 1)
    parts = [list[Tensor]() for _ in _in_time(pixels_BCFHW)]
    for strip in strips_of(pixels_BCFHW.shape[side] // cell, strips, margin_of(vae)):
        caches = _new_caches(vae)
        computed = pixels_BCFHW.narrow(side, cell * strip.outer[0], cell * len(strip.outer))
        for part, frames in zip(parts, _in_time(computed), strict=True):
            inputs = frames if patch is None else patchify(frames, patch_size=patch)
            seen = _first_levels(encoder, inputs, caches)
            inner = seen.narrow(side, strip.inner[0] - strip.outer[0], len(strip.inner))
            part.append(inner.clone())
    caches = _new_caches(vae)
    moments = [_last_level(encoder, torch.cat(part, side), caches) for part in parts]
    return vae.quant_conv(torch.cat(moments, 2))


def margin_of(vae: AutoencoderKLWan) -> int:
    """Latent cells that the first levels see beside their own, on each side."""
    encoder, levels = vae.encoder, len(vae.encoder.dim_mult) - 1
    seen = 1  # of the first convolution, in points of the encoder's input
    for level in range(levels):
        # Two convolutions in each block, and one that halves the size, and sees one point more.
        seen += (2 * encoder.num_res_blocks + 1) << level
    return -(-seen >> levels)


def _in_time(video: Tensor) -> Iterator[Tensor]:
    """The first frame, and then four frames at a time, as the encoder takes them."""
    yield video[:, :, :1]
    for first in range(1, video.shape[2], 4):
        yield video[:, :, first : first + 4]


def _new_caches(vae: AutoencoderKLWan) -> list[Any]:
    """What each convolution keeps of the frames before: nothing yet."""
    return [None] * sum(isinstance(m, WanCausalConv3d) for m in vae.encoder.modules())


def _first_levels(encoder: Any, frames: Tensor, caches: list[Any]) -> Tensor:
    """The encoder's levels up to the resolution of the latents."""
    values = _convolved(encoder.conv_in, frames, caches, 0)
    index = [1]
    for block in encoder.down_blocks[: _last_halving(encoder)]:
        values = block(values, feat_cache=caches, feat_idx=index)
    return values


def _last_level(encoder: Any, values: Tensor, caches: list[Any]) -> Tensor:
    """The rest of the encoder, at the resolution of the latents."""
    index = [0]
    for block in (*encoder.down_blocks[_last_halving(encoder) :], encoder.mid_block):
        values = block(values, feat_cache=caches, feat_idx=index)
    values = encoder.nonlinearity(encoder.norm_out(values))
    return _convolved(encoder.conv_out, values, caches, index[0])


def _last_halving(encoder: Any) -> int:
    """The number of blocks up to the last one that makes the picture smaller."""
    halving = [
        isinstance(block, WanResample) or getattr(block, "downsampler", None) is not None
        for block in encoder.down_blocks
    ]
    return len(halving) - halving[::-1].index(True)


def _convolved(conv: Any, frames: Tensor, caches: list[Any], index: int) -> Tensor:
    """A causal convolution of `frames` behind those that it has seen before."""
    before = caches[index]
    caches[index] = (frames if before is None else torch.cat([before, frames], 2))[
        :, :, -2:
    ].clone()
    return conv(frames, before)
