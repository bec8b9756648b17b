"""Inputs of the transformer besides latents, timestep and text, by condition."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanPipeline

from onewan.model.conditioning import conditioning_of, frame_mask
from onewan.variants import VARIANTS


def test_mask_of_the_first_frame_is_its_latent_frame() -> None:
    mask = frame_mask(torch.zeros(2, 16, 3, 4, 6), {0}, 4)
    assert mask.shape == (2, 4, 3, 4, 6)
    assert torch.equal(mask[:, :, 0], torch.ones(2, 4, 4, 6)) and not mask[:, :, 1:].any()


def test_mask_folds_pixel_frames_into_channels_of_latent_frames() -> None:
    """The last of 9 frames is the last of the 4 pixel frames that the last latent frame covers."""
    mask = frame_mask(torch.zeros(1, 16, 3, 1, 1), {0, 8}, 4)
    assert mask[0, :, :, 0, 0].T.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("name", VARIANTS)
def test_channels_fill_the_transformer_of_each_variant(name) -> None:
    variant = VARIANTS[name]
    conditioning = conditioning_of(variant)
    shape = (1, variant.latent_channels, 2, 4, 4)
    encoded = {tensor: torch.ones(shape) for tensor in conditioning.tensor_names}
    channels = conditioning.channels(encoded)
    assert (0 if channels is None else channels.shape[1]) == variant.condition_channels
    assert bool(encoded) == (variant.condition_channels > 0)


@pytest.mark.parametrize("name", VARIANTS)
def test_facts_and_pipelines_agree(name) -> None:
    variant = VARIANTS[name]
    conditioning = conditioning_of(variant)
    assert variant.takes_image or not variant.needs_image
    assert conditioning.sampling_pipeline(with_image=False) is WanPipeline
    with_image = conditioning.sampling_pipeline(with_image=True)
    assert "WanImageToVideoPipeline" in [kind.__name__ for kind in with_image.__mro__]
    assert variant.needs_image == (variant.pipeline == "WanImageToVideoPipeline")
    assert conditioning.pipeline_options() == {"expand_timesteps": name == "ti2v-5b"}
