"""Inputs of the transformer besides latents, timestep and text, by condition."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from diffusers import WanPipeline
from scipy.stats import chisquare

from onewan.arithmetic.condition_shares import ConditionShares, Given, default_shares
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
    for given in get_args(Given):
        parts = {
            name: torch.ones(shape)[:, :, -1 if name.startswith("end") else 0 :]
            for name in conditioning.parts(given)
        }
        channels = conditioning.channels(parts, given, torch.ones(shape))
        assert (0 if channels is None else channels.shape[1]) == variant.condition_channels


@pytest.mark.parametrize("name", VARIANTS)
def test_facts_and_pipelines_agree(name) -> None:
    variant = VARIANTS[name]
    conditioning = conditioning_of(variant)
    assert variant.takes_image or not variant.needs_image
    is_fun = name.startswith("fun")
    assert (conditioning.sampling_pipeline("none") is WanPipeline) == (not is_fun)
    with_image = conditioning.sampling_pipeline("both")
    assert "WanImageToVideoPipeline" in [kind.__name__ for kind in with_image.__mro__]
    image_pipeline = variant.pipeline == "WanImageToVideoPipeline"
    assert image_pipeline == (variant.needs_image or is_fun)
    assert conditioning.pipeline_options() == {"expand_timesteps": name == "ti2v-5b"}


def test_samples_are_given_frames_in_the_shares_of_the_run() -> None:
    shares = ConditionShares(first=0.5, both=0.3, last=0.05, none=0.15)
    conditioning = conditioning_of(VARIANTS["i2v-a14b"], shares)
    drawn = [
        conditioning.draw(5, seed=42, step=step, index=index)
        for step in range(25_000)
        for index in range(4)
    ]
    counts = [drawn.count(given) for given in get_args(Given)]
    expected = [100_000 * getattr(shares, given) for given in get_args(Given)]
    assert chisquare(counts, expected).pvalue > 1e-3
    # By the step and the sample alone, so that a resumed run draws the same.
    assert drawn[:40] == [
        conditioning.draw(5, seed=42, step=n // 4, index=n % 4) for n in range(40)
    ]
    other = [conditioning.draw(5, seed=43, step=n // 4, index=n % 4) for n in range(400)]
    assert drawn[:400] != other


def test_shares_of_a_variant_by_default() -> None:
    found = {name: default_shares(variant) for name, variant in VARIANTS.items()}
    assert found["t2v-a14b"].used == ("none",)
    assert found["i2v-a14b"].used == ("first",)
    assert found["ti2v-5b"] == ConditionShares(first=0.2, none=0.8)
    assert found["fun-inp-a14b"] == found["fun-control-a14b"]
    assert found["fun-inp-a14b"].used == ("first", "both", "none")
    for name in ("t2v-a14b", "i2v-a14b", "ti2v-5b"):
        # Only then does a run encode more than it did without a choice.
        assert set(conditioning_of(VARIANTS[name]).all_parts(5)) <= {"condition"}, name


def test_fun_is_given_zeros_for_what_a_clip_lacks() -> None:
    latents = torch.randn(2, 16, 3, 4, 4)
    inp, control = (conditioning_of(VARIANTS[n]) for n in ("fun-inp-a14b", "fun-control-a14b"))
    nothing = inp.channels({}, "none", latents)
    assert nothing is not None and nothing.shape == (2, 20, 3, 4, 4) and not nothing.any()
    assert inp.parts("none") == () and inp.parts("both") == ("condition", "end_of_both")
    video = torch.randn_like(latents)
    with_control = control.channels({"control": video}, "none", latents)
    assert with_control is not None and torch.equal(with_control[:, :16], video)
    assert not with_control[:, 16:].any()
    image = torch.randn_like(latents)
    first = control.channels({"condition": image}, "first", latents)
    assert first is not None and not first[:, :16].any()
    # The mask comes before the latents of the frame, and both behind those of the control video.
    assert first[:, 16:20, 0].all() and torch.equal(first[:, 20:], image)


def test_a_share_of_1_is_drawn_always_and_rounded_shares_leave_no_gap() -> None:
    tenths = ConditionShares(first=0.1, both=0.2, last=0.3, none=0.4 - 1e-9)
    assert tenths.drawn(1 - 1e-12) == "none" and tenths.most_frequent == "none"
    assert tenths.drawn(0.0) == "first" and tenths.drawn(0.1) == "both"
    assert {ConditionShares(last=1.0).drawn(n / 100) for n in range(100)} == {"last"}
    assert ConditionShares(first=0.5, last=0.5).most_frequent == "first"
