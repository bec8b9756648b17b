"""Pixels <-> normalized latents through diffusers' AutoencoderKLWan.

diffusers' VAE returns latents that are not normalized, and its pipelines call 1/std "latents_std".
Here z = (mean of the posterior - latents_mean) / latents_std, as the official code has it
(``wan/modules/vae2_1.py:535-542``; official inference never samples the posterior).

The VAE keeps its causal feature cache on the instance, so two threads that use it at once get wrong
latents (measured: 12 of 12 clips). Every call here holds one lock.

On CUDA, PyTorch by default computes float32 convolutions with 10 bits of mantissa (TF32). For
encoding that is turned off: latents that are encoded once and trained on for days should not carry
the rounding of the card that encoded them. Videos are decoded as PyTorch does by default, and with
it the official code. The pixels differ by 0.1 %, less than one of 256 levels. On an H200 it takes a
third to a seventh of the time, and exact kernels for the VAE of TI2V-5B took 133 GB there as
cuDNN's workspace, where these took 1 GB.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from weakref import WeakKeyDictionary

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from onewan.model.inputs import to_device
from onewan.model.precision import autocast_dtype
from onewan.model.vae_strips import moments_in_strips

StripsOf = Callable[[int, int, int], int]
"""In how many strips a clip of (frames, width, height) is encoded; 1: as a whole."""

_LOCK = threading.Lock()
_STRIPS: WeakKeyDictionary[AutoencoderKLWan, StripsOf] = WeakKeyDictionary()


def encode_in_strips(vae: AutoencoderKLWan, strips_of: StripsOf) -> None:
    """From now on `vae` encodes in strips what it should not encode as a whole, with the same
    latents but for rounding (`onewan.model.vae_strips`)."""
    _STRIPS[vae] = strips_of


@contextmanager
def vae_in_use(*, exact: bool = True) -> Iterator[None]:
    """Around every use of a VAE in this process: one at a time, and if `exact`, with exact float32
    convolutions."""
    with _LOCK, _exact_convolutions() if exact else nullcontext():
        yield


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """Float32 convolutions without TF32; the setting of before is restored."""
    convolutions = torch.backends.cudnn.conv  # pyright: ignore[reportAttributeAccessIssue]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


@contextmanager
def _encoder_in(vae: AutoencoderKLWan, dtype: torch.dtype) -> Iterator[None]:
    """Have the encoder's weights in `dtype`; afterwards they are the stored ones again.

    In bfloat16 this has the bits of autocast on a CPU and takes a tenth less time, since autocast
    converts frozen weights at each use.
    """
    weights = [*vae.encoder.parameters(), *vae.quant_conv.parameters()]
    stored = [weight.data for weight in weights]
    for weight in weights:
        weight.data = weight.data.to(dtype)
    try:
        yield
    finally:
        for weight, data in zip(weights, stored, strict=True):
            weight.data = data


def _statistics(vae: AutoencoderKLWan, device: torch.device) -> tuple[Tensor, Tensor]:
    shape = (1, -1, 1, 1, 1)
    values = [vae.config["latents_mean"], vae.config["latents_std"]]
    # One tensor, to be copied once.
    mean, std = to_device(torch.tensor(values, dtype=torch.float32), device)
    return mean.view(shape), std.view(shape)


@torch.no_grad()
def encode_video(vae: AutoencoderKLWan, pixels_BCFHW: Tensor) -> Tensor:
    """Normalized float32 latents [B, C, (F-1)/4+1, H/s, W/s] of pixels [B, 3, F, H, W] in [-1, 1].

    Under autocast the VAE computes in its type. ValueError unless F is 4n+1: the VAE would silently
    drop the remaining frames.
    """
    _, _, frames, height, width = pixels_BCFHW.shape
    if frames % vae.config["scale_factor_temporal"] != 1:
        raise ValueError(f"the VAE takes 4n+1 frames and would drop some of these {frames}")
    strips_of = _STRIPS.get(vae)
    strips = 1 if strips_of is None else strips_of(frames, width, height)
    dtype = autocast_dtype(vae.device) or vae.dtype
    off = torch.autocast(vae.device.type, enabled=False)
    with vae_in_use(), _encoder_in(vae, dtype), off:
        pixels_BCFHW = pixels_BCFHW.to(vae.device, dtype)
        if strips > 1:
            latents = moments_in_strips(vae, pixels_BCFHW, strips).chunk(2, dim=1)[0]
        else:
            latents = vae.encode(pixels_BCFHW, return_dict=False)[0].mode()
    mean, std = _statistics(vae, vae.device)
    # In float32 also for a VAE in bfloat16, which would round each latent again.
    return (latents.float() - mean) / std


@torch.no_grad()
def decode_video(vae: AutoencoderKLWan, latents_BCFHW: Tensor) -> Tensor:
    """Float32 pixels [B, 3, F, H, W] in [-1, 1]; the inverse of `encode_video`. On CUDA, with TF32
    unless the settings of PyTorch forbid it."""
    mean, std = _statistics(vae, vae.device)
    unscaled = latents_BCFHW.to(vae.device, torch.float32) * std + mean
    # diffusers clamps the result to [-1, 1].
    with vae_in_use(exact=False):
        return vae.decode(unscaled.to(vae.dtype), return_dict=False)[0].float()
