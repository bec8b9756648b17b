"""`WanModel`: the plain diffusers and transformers objects of one Wan 2.2 model, under one roof.

It adds no behaviour to them. What it knows is which object serves which purpose for its variant,
and the conventions (padding, normalisation) that a caller would otherwise have to remember.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from onewan.errors import CheckpointError
from onewan.model import text, vae
from onewan.variants import Expert, Variant


@dataclass(kw_only=True)
class WanModel:
    """One Wan 2.2 model. A component that was not loaded is None."""

    variant: Variant
    source: str
    """What it was loaded from, for messages and for the metadata of exported files."""
    tokenizer: PreTrainedTokenizerBase | None = None
    text_encoder: UMT5EncoderModel | None = None
    vae: AutoencoderKLWan | None = None
    transformer: WanTransformer3DModel | None = None
    """The high-noise expert, or the only one of TI2V-5B."""
    transformer_2: WanTransformer3DModel | None = None
    """The low-noise expert."""
    noise_scheduler: UniPCMultistepScheduler | None = None
    """The official solver (UniPC) at the variant's official shift."""
    dtype: torch.dtype = torch.float32
    """Precision of the transformers' matrix products (see `onewan.model.precision`)."""
    notices: list[str] = field(default_factory=list)
    """What loading concluded or did that the user should know, a line each."""

    @property
    def frame_count(self) -> int:
        """Frames of an official sample."""
        return self.variant.frames

    @property
    def temporal_compression(self) -> int:
        return self.variant.temporal_compression

    @property
    def spatial_compression(self) -> int:
        return self.variant.spatial_compression

    def expert(self, expert: Expert) -> WanTransformer3DModel:
        """The transformer of `expert`; CheckpointError if it was not loaded."""
        transformer = self.transformer if expert.component == "transformer" else self.transformer_2
        if transformer is None:
            raise CheckpointError(f"{self.source}: the {expert.name} expert was not loaded")
        return transformer

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """[B, 512, dim] embeddings, zero past each prompt's length, in the encoder's dtype."""
        return text.pad_text([self.encode_prompt(p) for p in prompts])

    def encode_prompt(self, prompt: str) -> Tensor:
        """[length, dim]: the valid tokens of one prompt, unpadded."""
        if self.tokenizer is None or self.text_encoder is None:
            raise CheckpointError(f"{self.source}: the text encoder was not loaded")
        return text.encode_prompt(self.tokenizer, self.text_encoder, prompt)

    def encode_video(self, pixels_BCFHW: Tensor) -> Tensor:
        """Normalised latents [B, C, F', h, w], float32, of pixels in [-1, 1]."""
        return vae.encode_video(self._vae(), pixels_BCFHW)

    def encode_first_frame_condition(self, pixels_BCFHW: Tensor) -> Tensor:
        """The condition latents of I2V-A14B for clips whose first frame is given."""
        return vae.encode_first_frame_condition(self._vae(), pixels_BCFHW)

    def decode_video(self, latents_BCFHW: Tensor) -> Tensor:
        """Pixels in [-1, 1], [B, 3, F, H, W], float32; the inverse of `encode_video`."""
        return vae.decode_video(self._vae(), latents_BCFHW)

    def _vae(self) -> AutoencoderKLWan:
        if self.vae is None:
            raise CheckpointError(f"{self.source}: the VAE was not loaded")
        return self.vae
