"""The transformer's inputs besides noisy latents, timestep and text: one class per kind.

=======================  =====================================================================
`Variant.condition`      the transformer's further input
=======================  =====================================================================
text                     none (T2V-A14B)
first_frame_channels     frame mask and image latents, concatenated to the channels (I2V-A14B)
first_frame_clean        none; latent frames may be clean, at timestep 0 (TI2V-5B)
fun_inp_channels         as in I2V-A14B, zeros where no frame is given (Fun-InP)
fun_control_channels     latents of a control video before the same (Fun-Control)
=======================  =====================================================================

A sample is given the first frame of its clip, the last one, both or none (`Given`). What it needs
for that are named parts, which the VAE encodes (`encode_part`) and the cache stores one by one. The
VAE is causal: a frame has no influence on the latents of frames before it. So all conditions with
a last frame share everything but their last latent frame with those without one, and only that is
stored for them.

A new condition is a class here, its entry in `_CONDITIONINGS`, its parts in `encode_part` and its
facts in `onewan.variants`. Data loader, cache, sampler and the OneTrainer add-on use only the
object's methods.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline
from torch import Tensor

from onewan.arithmetic.condition_shares import (
    ConditionShares,
    Given,
    default_shares,
    given_frames,
)
from onewan.model.vae import encode_video, vae_in_use
from onewan.seeds import derive_seed
from onewan.variants import ConditionName, Variant

ConditionPart = Literal[
    "condition", "end_of_both", "empty", "end_of_last", "last_frame", "control", "reference"
]
"""A tensor that conditions are made of.

``condition``: latents of the image that a sample starts from, followed by gray frames.
``end_of_both``: the last latent frame of the same with the last frame of the clip at the end.
``empty``: latents of gray frames. ``end_of_last``: the last latent frame of those with the last
frame of the clip at the end. ``last_frame``: the last frame of the clip encoded by itself, as one
latent frame. ``control``: latents of the control video. ``reference``: latents of the reference
image, as one latent frame.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class ConditionPixels:
    """What the parts of conditions are encoded from; pixels in [-1, 1]."""

    shape: Sequence[int]
    """That of the clips' pixels, [B, 3, F, H, W]; F = 4n+1."""
    image: Tensor | None = None
    """[B, 3, H, W]: the image that samples start from, usually the first frame; for the part
    ``reference``, the reference image."""
    last: Tensor | None = None
    """[B, 3, H, W]: the last frame."""
    control: Tensor | None = None
    """[B, 3, F, H, W]: the control video."""


def encode_part(vae: AutoencoderKLWan, part: ConditionPart, pixels: ConditionPixels) -> Tensor:
    """A part of the condition of clips: normalized latents [B, C, F', h, w], or [B, C, 1, h, w] of
    the last latent frame alone; float32.

    Frames that are not given are zeros (mid gray), as in ``wan/image2video.py:316-323`` of Wan 2.2
    and ``wan/first_last_frame2video.py`` of Wan 2.1. Their latents are not zero, so the whole
    length has to be encoded.
    """
    if part == "control":
        return encode_video(vae, _required(pixels.control, part))
    if part == "last_frame":
        return encode_video(vae, _required(pixels.last, part)[:, :, None])
    if part == "reference":
        return encode_video(vae, _required(pixels.image, part)[:, :, None])
    video_BCFHW = torch.zeros(tuple(pixels.shape), device=vae.device)
    if part in ("condition", "end_of_both"):
        video_BCFHW[:, :, 0] = _required(pixels.image, part)
    if part in ("end_of_both", "end_of_last"):
        video_BCFHW[:, :, -1] = _required(pixels.last, part)
    latents_BCFHW = encode_video(vae, video_BCFHW)
    return latents_BCFHW if part in ("condition", "empty") else latents_BCFHW[:, :, -1:]


def _required(pixels: Tensor | None, part: ConditionPart) -> Tensor:
    if pixels is None:
        raise ValueError(f"the part {part} of a condition is encoded from pixels that are missing")
    return pixels


@dataclass(frozen=True)
class Conditioning:
    """How `variant` is conditioned besides the text; this class is for variants
    without further transformer inputs."""

    variant: Variant
    shares: ConditionShares
    """How often training samples are given which frames."""

    def draw(self, frames: int, *, seed: int, step: int, index: int) -> Given:
        """What a training sample of `frames` frames is given: the sample `index` of the global
        batch of a step, in a run with this `seed`."""
        # "first frame" is part of the seed: another string would give other draws.
        value = random.Random(derive_seed(seed, "first frame", step, index)).random()
        return self._applicable(self.shares.drawn(value), frames)

    def usual(self, frames: int) -> Given:
        """What most training samples of `frames` frames are given."""
        return self._applicable(self.shares.most_frequent, frames)

    def all_parts(self, frames: int) -> tuple[ConditionPart, ...]:
        """The parts that training samples of `frames` frames may need."""
        given: list[Given] = [self._applicable(each, frames) for each in self.shares.used]
        return tuple(dict.fromkeys(part for each in given for part in self.parts(each)))

    def _applicable(self, given: Given, frames: int) -> Given:
        """What a sample of `frames` frames that drew `given` is given."""
        del given, frames
        return "none"

    def parts(self, given: Given) -> tuple[ConditionPart, ...]:
        """The parts that the condition of a sample is made of. A clip may be without ``control`` or
        ``reference``, which are zeros then."""
        del given
        return ()

    def channels(
        self, parts: Mapping[ConditionPart, Tensor], given: Given, latents_BCFHW: Tensor
    ) -> Tensor | None:
        """Channels that follow the noisy latents': [B, `condition_channels`, F', h, w], or None.

        `parts` are those of samples with this `given`, and `latents_BCFHW` latents of their shape.
        """
        del parts, given, latents_BCFHW
        return None

    def sampling_pipeline(self, given: Given) -> type[WanPipeline | GivenFramesPipeline]:
        """The diffusers pipeline for a sample that is given these frames."""
        # Not `variant.pipeline`: the one that TI2V-5B's repository names takes no image.
        return WanPipeline if given == "none" else GivenFramesPipeline

    def pipeline_options(self) -> dict[str, Any]:
        """Arguments of the pipeline's constructor that depend on the condition."""
        return {"expand_timesteps": self.variant.has_clean_first_frame}


class GivenFrameChannels(Conditioning):
    """I2V-A14B: the latents of the given frames and a frame mask, behind the noisy channels."""

    def _applicable(self, given: Given, frames: int) -> Given:
        # The only frame of an image is its first and its last one.
        return "first" if frames == 1 and given != "none" else given

    def parts(self, given: Given) -> tuple[ConditionPart, ...]:
        by_given: Mapping[Given, tuple[ConditionPart, ...]] = {
            "first": ("condition",),
            "both": ("condition", "end_of_both"),
            "last": ("empty", "end_of_last"),
            "none": ("empty",),
        }
        return by_given[given]

    def channels(
        self, parts: Mapping[ConditionPart, Tensor], given: Given, latents_BCFHW: Tensor
    ) -> Tensor:
        images_BCFHW, *ends = (parts[name] for name in GivenFrameChannels.parts(self, given))
        if ends:
            images_BCFHW = torch.cat([images_BCFHW[:, :, :-1], *ends], dim=2)
        temporal = self.variant.temporal_compression
        frames = given_frames(given, (latents_BCFHW.shape[2] - 1) * temporal + 1)
        # The mask's channels come first, as in the official code and in diffusers' pipeline.
        return torch.cat([frame_mask(images_BCFHW, frames, temporal), images_BCFHW], dim=1)


class FunInpChannels(GivenFrameChannels):
    """Fun-InP: as I2V-A14B, but without a given frame, mask and latents are zeros
    (``videox_fun/pipeline/pipeline_wan2_2_fun_inpaint.py:606-611``), not those of gray frames."""

    def parts(self, given: Given) -> tuple[ConditionPart, ...]:
        return () if given == "none" else super().parts(given)

    def channels(
        self, parts: Mapping[ConditionPart, Tensor], given: Given, latents_BCFHW: Tensor
    ) -> Tensor:
        if given != "none":
            return super().channels(parts, given, latents_BCFHW)
        return no_frame_channels(latents_BCFHW, self.variant.temporal_compression)

    def sampling_pipeline(self, given: Given) -> type[GivenFramesPipeline]:
        del given
        return FunInpPipeline


class FunControlChannels(FunInpChannels):
    """Fun-Control: the latents of the control video, or zeros, before the channels of Fun-InP
    (``videox_fun/pipeline/pipeline_wan2_2_fun_control.py:694-709,813-821``)."""

    def parts(self, given: Given) -> tuple[ConditionPart, ...]:
        return ("control", "reference", *super().parts(given))

    def channels(
        self, parts: Mapping[ConditionPart, Tensor], given: Given, latents_BCFHW: Tensor
    ) -> Tensor:
        control_BCFHW = parts.get("control")
        if control_BCFHW is None:
            control_BCFHW = torch.zeros_like(latents_BCFHW)
        frames_BCFHW = super().channels(parts, given, latents_BCFHW)
        return torch.cat([control_BCFHW, frames_BCFHW], dim=1)

    def sampling_pipeline(self, given: Given) -> type[GivenFramesPipeline]:
        del given
        return FunControlPipeline


class CleanFrames(Conditioning):
    """TI2V-5B: the first latent frame, the last one, or both are clean, at timestep 0.

    The first one is that of the clip's own latents, which no later frame reaches. The last one,
    of which the official code and diffusers know nothing, is encoded from the last frame alone: a
    sample has no other frames for it either.
    """

    def _applicable(self, given: Given, frames: int) -> Given:
        return "none" if frames == 1 else given

    def parts(self, given: Given) -> tuple[ConditionPart, ...]:
        return ("last_frame",) if given in ("both", "last") else ()


_CONDITIONINGS: Mapping[ConditionName, type[Conditioning]] = {
    "text": Conditioning,
    "first_frame_channels": GivenFrameChannels,
    "first_frame_clean": CleanFrames,
    "fun_inp_channels": FunInpChannels,
    "fun_control_channels": FunControlChannels,
}


def conditioning_of(variant: Variant, shares: ConditionShares | None = None) -> Conditioning:
    """The object that builds `variant`'s inputs besides latents, timestep and text; without
    `shares`, with those that the variant has by default."""
    return _CONDITIONINGS[variant.condition](variant, shares or default_shares(variant))


def frame_mask(
    latents_BCFHW: Tensor, condition_frames: Collection[int], temporal_compression: int
) -> Tensor:
    """[B, `temporal_compression`, F, h, w]: 1 for pixel frames of the condition, 0 for others.

    The official mask marks pixel frames and folds each group of `temporal_compression` of them into
    the channels of one latent frame; the first pixel frame is repeated to fill a group of its own
    (``wan/image2video.py:289-302``).
    """
    batch, _, frames, height, width = latents_BCFHW.shape
    mask_F = latents_BCFHW.new_zeros(1 + (frames - 1) * temporal_compression)
    mask_F[list(condition_frames)] = 1
    folded = torch.cat([mask_F[:1].expand(temporal_compression), mask_F[1:]])
    mask_CF = folded.view(frames, temporal_compression).T
    # A view without memory of its own, since the mask is the same at all positions.
    return mask_CF[None, :, :, None, None].expand(batch, -1, -1, height, width)


def no_frame_channels(latents_BCFHW: Tensor, temporal_compression: int) -> Tensor:
    """[B, `temporal_compression` + C, F, h, w] zeros: mask and image latents without a frame, as
    Wan2.2-Fun has them."""
    batch, channels, *shape = latents_BCFHW.shape
    return latents_BCFHW.new_zeros(batch, temporal_compression + channels, *shape)


class GivenFramesPipeline(WanImageToVideoPipeline):
    """diffusers' image-to-video pipeline, which may also be given the last image without the first,
    and the last one for TI2V-5B.

    The VAE encodes the images here, so it must take the lock (`model.vae`).
    """

    given: Given = "first"
    """Which of the images count. Without a first one, `image` is gray: a tensor of 0.5."""

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
        with vae_in_use():
            latents, condition, *mask = super().prepare_latents(*args, **kwargs)
        if not mask:
            if self.given == "last":
                # The mask's channels come first; a gray frame is like any that is not given.
                condition[:, : self.vae_scale_factor_temporal, 0] = 0
            return latents, condition
        last_image_BCHW: Tensor | None = args[-1]
        return self._with_clean_last_frame(latents, condition, mask[0], last_image_BCHW)

    def _with_clean_last_frame(
        self, latents: Tensor, first: Tensor, mask: Tensor, last_image_BCHW: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What diffusers makes of the first frame, with the last frame too. `mask` is 0 in clean
        latent frames and 1 in others."""
        if last_image_BCHW is None:
            return latents, first, mask
        condition = first.expand_as(latents).clone()
        condition[:, :, -1:] = encode_video(self.vae, last_image_BCHW[:, :, None])
        if self.given == "last":
            mask[:, :, 0] = 1
        mask[:, :, -1] = 0
        return latents, condition, mask


class FunInpPipeline(GivenFramesPipeline):
    """The same for Fun-InP, which may also be given no frame; `image` is then not used."""

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
        if self.given != "none":
            return super().prepare_latents(*args, **kwargs)
        # As diffusers draws them; its image-to-video pipeline would encode the image.
        _image, *shape, _last_image = args
        latents = WanPipeline.prepare_latents(self, *shape)  # pyright: ignore[reportArgumentType]
        return latents, no_frame_channels(latents, self.vae_scale_factor_temporal)


class FunControlPipeline(FunInpPipeline):
    """The same for Fun-Control, with the latents of a control video before the frames'."""

    control: Tensor | None = None
    """[1, C, F', h, w], normalized latents; None: zeros."""

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
        latents, frames = super().prepare_latents(*args, **kwargs)
        control = torch.zeros_like(latents) if self.control is None else self.control.to(latents)
        return latents, torch.cat([control, frames], dim=1)
