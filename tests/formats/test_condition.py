"""The conditioning channels and the clean first frame are those of diffusers' pipelines."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanImageToVideoPipeline

from onewan.arithmetic.condition_shares import ConditionShares, Given
from onewan.model.conditioning import ConditionPart, ConditionPixels, conditioning_of
from onewan.model.load import WanModelLoader
from onewan.model.wan import WanModel


def _clip(frames: int, height: int, width: int) -> torch.Tensor:
    """[1, 3, F, H, W] in [-1, 1], no two frames alike."""
    noise = torch.rand(1, 3, frames, height, width, generator=torch.Generator().manual_seed(3))
    return noise * 2 - 1


def _parts(model: WanModel, given: Given, clip: torch.Tensor) -> dict[ConditionPart, torch.Tensor]:
    pixels = ConditionPixels(shape=clip.shape, image=clip[:, :, 0], last=clip[:, :, -1])
    return {part: model.encode_part(part, pixels) for part in model.conditioning.parts(given)}


def _ours(model: WanModel, given: Given, clip: torch.Tensor) -> torch.Tensor:
    latents = model.encode_video(clip)
    channels = model.conditioning.channels(_parts(model, given, clip), given, latents)
    assert channels is not None
    return channels


@pytest.mark.parametrize("frames", [5, 9])
@pytest.mark.parametrize("given", ["first", "both"])
def test_the_i2v_conditioning_channels_equal_those_of_diffusers(
    tiny_model, given: Given, frames: int
):
    folder = tiny_model("i2v-a14b")
    model = WanModelLoader().load(folder, components=["vae"])
    clip = _clip(frames, 32, 48)
    ours = _ours(model, given, clip)

    pipeline = WanImageToVideoPipeline.from_pretrained(folder)
    _, theirs = pipeline.prepare_latents(
        clip[:, :, 0],
        batch_size=1,
        height=32,
        width=48,
        num_frames=frames,
        dtype=torch.float32,
        device=torch.device("cpu"),
        generator=torch.Generator().manual_seed(0),
        last_image=clip[:, :, -1] if given == "both" else None,
    )
    assert ours.shape == (1, 20, 1 + frames // 4, 4, 6)
    # They multiply by 1/std where we divide by std.
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert torch.equal(ours[:, :4], theirs[:, :4])
    # The last pixel frame is the last of the four that the last latent frame covers.
    last = [0, 0, 0, 1] if given == "both" else [0, 0, 0, 0]
    assert ours[0, :4, -1, 0, 0].tolist() == last


def test_conditions_with_a_last_frame_differ_from_those_without_in_the_last_latent_frame(
    tiny_model,
):
    """The VAE is causal, so that only this frame of them has to be stored."""
    model = WanModelLoader().load(tiny_model("i2v-a14b"), components=["vae"])
    clip = _clip(9, 32, 48)
    gray = torch.zeros_like(clip)
    for given, without in (("both", "condition"), ("last", "empty")):
        video = gray.clone()
        video[:, :, -1] = clip[:, :, -1]
        if given == "both":
            video[:, :, 0] = clip[:, :, 0]
        whole = model.encode_video(video)
        parts = _parts(model, given, clip)
        torch.testing.assert_close(parts[without][:, :, :-1], whole[:, :, :-1], rtol=0, atol=1e-6)
        torch.testing.assert_close(_ours(model, given, clip)[:, 4:], whole, rtol=0, atol=1e-6)
        assert float((parts[without][:, :, -1] - whole[:, :, -1]).abs().max()) > 0.01
    # And without any frame, the condition does not depend on the clip.
    assert torch.equal(_ours(model, "none", clip), _ours(model, "none", -clip))
    assert not _ours(model, "none", clip)[:, :4].any()


def test_an_image_is_its_own_first_and_last_frame(tiny_model):
    model = WanModelLoader().load(tiny_model("i2v-a14b"), components=["vae"])
    shares = ConditionShares(both=0.5, last=0.5)
    conditioning = conditioning_of(model.variant, shares)
    drawn = {conditioning.draw(1, seed=0, step=n, index=0) for n in range(50)}
    assert drawn == {"first"} and conditioning.all_parts(1) == ("condition",)
    assert {conditioning.draw(5, seed=0, step=n, index=0) for n in range(50)} == {"both", "last"}


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


def test_the_last_frame_of_ti2v_is_encoded_as_an_image(tiny_model):
    model = WanModelLoader().load(tiny_model("ti2v-5b"), components=["vae"])
    clip = _clip(9, 64, 32)
    parts = _parts(model, "both", clip)
    assert parts.keys() == {"last_frame"} == _parts(model, "last", clip).keys()
    assert parts["last_frame"].shape == (1, 48, 1, 4, 2)
    assert torch.equal(parts["last_frame"], model.encode_video(clip[:, :, -1:]))
    assert not _parts(model, "first", clip) and not _parts(model, "none", clip)
