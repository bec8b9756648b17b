"""The VAE computes exact float32 convolutions on CUDA, whatever is set for other modules."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import nn

from onewan.model.vae import decode_video, encode_video


def tf32_allowed() -> bool:
    """Whether cuDNN may round the inputs of float32 convolutions."""
    conv = getattr(torch.backends.cudnn, "conv", None)
    return torch.backends.cudnn.allow_tf32 if conv is None else conv.fp32_precision != "ieee"


def test_convolutions_of_the_vae_are_without_tf32_and_others_as_before() -> None:
    vae = AutoencoderKLWan(base_dim=8)
    seen = list[bool]()
    convolutions = [module for module in vae.modules() if isinstance(module, nn.Conv3d)]
    for module in convolutions:
        module.register_forward_hook(lambda *_: seen.append(tf32_allowed()))
    assert tf32_allowed()  # PyTorch's default, for all other modules
    latents = encode_video(vae, torch.zeros(1, 3, 5, 16, 16))
    after_encoding = len(seen)
    decode_video(vae, latents)
    assert len(seen) > after_encoding > 0 and not any(seen)
    assert tf32_allowed()

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    convolutions[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        encode_video(vae, torch.zeros(1, 3, 5, 16, 16))
    assert tf32_allowed()
