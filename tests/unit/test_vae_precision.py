"""The VAE encodes by exact float32 convolutions on CUDA, whatever is set for other modules."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import nn

from onewan.model.vae import decode_video, encode_video


def tf32_allowed() -> bool:
    """Whether cuDNN may round the inputs of float32 convolutions."""
    return torch.backends.cudnn.conv.fp32_precision != "ieee"


def test_clips_are_encoded_without_tf32_and_all_else_is_as_before() -> None:
    vae = AutoencoderKLWan(base_dim=8)
    seen = list[bool]()
    convolutions = [module for module in vae.modules() if isinstance(module, nn.Conv3d)]
    for module in convolutions:
        module.register_forward_hook(lambda *_: seen.append(tf32_allowed()))
    assert tf32_allowed()  # PyTorch's default, for all other modules
    latents = encode_video(vae, torch.zeros(1, 3, 5, 16, 16))
    assert seen and not any(seen)
    assert tf32_allowed()
    seen.clear()
    decode_video(vae, latents)  # to 8 bits, as the official code does
    assert seen and all(seen)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    convolutions[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        encode_video(vae, torch.zeros(1, 3, 5, 16, 16))
    assert tf32_allowed()


@pytest.mark.parametrize("base_dim", [8, 16])
def test_encoding_under_autocast_has_its_bits_and_leaves_the_weights(base_dim: int) -> None:
    vae = AutoencoderKLWan(base_dim=base_dim)
    before = {name: weight.clone() for name, weight in vae.state_dict().items()}
    pixels = torch.rand(1, 3, 9, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = vae.encode(pixels, return_dict=False)[0].mode()
        latents = encode_video(vae, pixels)
    statistics = (torch.tensor(vae.config[f"latents_{name}"]) for name in ("mean", "std"))
    mean, std = (values.view(1, -1, 1, 1, 1) for values in statistics)
    assert torch.equal(latents, (expected.float() - mean) / std)
    assert all(torch.equal(before[name], weight) for name, weight in vae.state_dict().items())
    assert {weight.dtype for weight in vae.parameters()} == {torch.float32}
