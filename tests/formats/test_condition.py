"""The conditioning channels and the clean first frame are those of diffusers' pipelines."""

from __future__ import annotations

import torch
from diffusers import WanImageToVideoPipeline

from onewan.model.load import WanModelLoader


def _clip(frames: int, height: int, width: int) -> torch.Tensor:
    """[1, 3, F, H, W] in [-1, 1], no two frames alike."""
    noise = torch.rand(1, 3, frames, height, width, generator=torch.Generator().manual_seed(3))
    return noise * 2 - 1


def test_the_i2v_conditioning_channels_equal_those_of_diffusers(tiny_model):
    folder = tiny_model("i2v-a14b")
    model = WanModelLoader().load(folder, components=["vae"])
    clip = _clip(9, 32, 48)
    ours = model.conditioning.channels(model.encode_condition(clip))

    pipeline = WanImageToVideoPipeline.from_pretrained(folder)
    _, theirs = pipeline.prepare_latents(
        clip[:, :, 0],
        batch_size=1,
        height=32,
        width=48,
        num_frames=9,
        dtype=torch.float32,
        device=torch.device("cpu"),
        generator=torch.Generator().manual_seed(0),
    )
    assert ours.shape == (1, 20, 3, 4, 6)
    # They multiply by 1/std where we divide by std.
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert torch.equal(ours[:, :4], theirs[:, :4])


def test_the_conditioning_frame_of_ti2v_is_latent_frame_0_of_the_clip(tiny_model):
    folder = tiny_model("ti2v-5b")
    model = WanModelLoader().load(folder, components=["vae"])
    clip = _clip(9, 64, 32)
    latents = model.encode_video(clip)
    # Causal: what follows the first frame does not reach its latent, so training needs one encode.
    torch.testing.assert_close(model.encode_video(clip[:, :, :1]), latents[:, :, :1])

    pipeline = WanImageToVideoPipeline.from_pretrained(folder)
    _, theirs, mask = pipeline.prepare_latents(
        clip[:, :, 0],
        batch_size=1,
        num_channels_latents=48,
        height=64,
        width=32,
        num_frames=9,
        dtype=torch.float32,
        device=torch.device("cpu"),
        generator=torch.Generator().manual_seed(0),
    )
    torch.testing.assert_close(latents[:, :, :1], theirs, rtol=1e-5, atol=1e-5)
    assert mask[0, 0, :, 0, 0].tolist() == [0, 1, 1]
