"""`WanModel`: container for the diffusers and transformers objects of one Wan 2.2 model.

It adds no behavior to them. It knows which object serves which purpose for its variant, and the
conventions (padding, normalization) that callers would otherwise have to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from onewan.arithmetic.placeholders import placeholder_error
from onewan.errors import CheckpointError, ConfigError
from onewan.model import text, vae
from onewan.model.conditioning import (
    Conditioning,
    ConditionPart,
    ConditionPixels,
    conditioning_of,
    encode_part,
)
from onewan.model.embedding import WanModelEmbedding
from onewan.variants import Expert, Variant


@dataclass(kw_only=True)
class WanModel:
    """One Wan 2.2 model. A component that was not loaded is None."""

    variant: Variant
    source: str
    """Where it was loaded from, for messages and for the metadata of exported files."""
    tokenizer: PreTrainedTokenizerBase | None = None
    text_encoder: UMT5EncoderModel | None = None
    vae: AutoencoderKLWan | None = None
    transformer: WanTransformer3DModel | None = None
    """The high-noise expert, or the single expert of TI2V-5B."""
    transformer_2: WanTransformer3DModel | None = None
    """The low-noise expert."""
    noise_scheduler: UniPCMultistepScheduler | None = None
    """The official solver (UniPC) at the variant's official shift."""
    dtype: torch.dtype = torch.float32
    """Precision of the transformers' matrix products (see `onewan.model.precision`)."""
    notices: list[str] = field(default_factory=list)
    """Messages for the user about loading, a line each."""
    embedding: WanModelEmbedding | None = None
    """The trained vectors that a placeholder in prompts stands for."""
    additional_embeddings: list[WanModelEmbedding] = field(default_factory=list)
    """The embeddings of further placeholders."""

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

    @property
    def conditioning(self) -> Conditioning:
        """How the transformer is conditioned besides the text."""
        return conditioning_of(self.variant)

    def expert(self, expert: Expert) -> WanTransformer3DModel:
        """The transformer of `expert`; CheckpointError if it was not loaded."""
        transformer = self.transformer if expert.component == "transformer" else self.transformer_2
        if transformer is None:
            raise CheckpointError(f"{self.source}: the {expert.name} expert was not loaded")
        return transformer

    @property
    def transformer_lora(self) -> dict[str, nn.Parameter] | None:
        """Weights of the adapters in the transformers, of any kind; None if there are none."""
        found: dict[str, nn.Parameter] = {}
        for component in ("transformer", "transformer_2"):
            transformer: nn.Module | None = getattr(self, component)
            for name, module in [] if transformer is None else transformer.named_modules():
                if isinstance(module, BaseTunerLayer) and isinstance(module, nn.Module):
                    # PEFT's layer contains the wrapped layer, whose weights are not the adapter's.
                    found |= {
                        f"{component}.{name}.{leaf}": parameter
                        for leaf, parameter in module.named_parameters()
                        if not leaf.startswith("base_layer.")
                    }
        return found or None

    def all_embeddings(self) -> list[WanModelEmbedding]:
        """The embeddings whose placeholders prompts may contain."""
        first = [] if self.embedding is None else [self.embedding]
        return [*first, *self.additional_embeddings]

    def add_embedding(self, embedding: WanModelEmbedding) -> None:
        """Add `embedding`; ConfigError if its placeholder overlaps with that of another one."""
        others = [other.placeholder for other in self.all_embeddings()]
        if text := placeholder_error(embedding.placeholder, others):
            raise ConfigError("embedding", [f"placeholder: {text}"])
        if self.embedding is None:
            self.embedding = embedding
        else:
            self.additional_embeddings.append(embedding)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """[B, 512, dim] embeddings, zero past each prompt's length, in the encoder's dtype.

        Gradients reach the vectors of placeholders in the prompts (`onewan.model.text`).
        """
        return text.pad_text([self.encode_prompt(p) for p in prompts])

    def encode_prompt(self, prompt: str) -> Tensor:
        """[length, dim]: the valid tokens of one prompt, unpadded."""
        return text.encode_prompt(*self.prompt_encoder(), prompt, self.all_embeddings())

    def token_count(self, prompt: str) -> int:
        """How many tokens `prompt` has, with the end token, also if `encode_prompt` cuts it."""
        return text.token_count(self.prompt_encoder()[0], prompt)

    def prompt_encoder(self) -> tuple[PreTrainedTokenizerBase, UMT5EncoderModel]:
        """The tokenizer and the text encoder; CheckpointError if they were not loaded."""
        if self.tokenizer is None or self.text_encoder is None:
            raise CheckpointError(f"{self.source}: the text encoder was not loaded")
        return self.tokenizer, self.text_encoder

    def encode_video(self, pixels_BCFHW: Tensor) -> Tensor:
        """Normalized latents [B, C, F', h, w], float32, of pixels in [-1, 1], [B, 3, F, H, W]."""
        return vae.encode_video(self._vae(), pixels_BCFHW)

    def encode_part(self, part: ConditionPart, pixels: ConditionPixels) -> Tensor:
        """A part of the condition of clips (`onewan.model.conditioning.encode_part`)."""
        return encode_part(self._vae(), part, pixels)

    def decode_video(self, latents_BCFHW: Tensor) -> Tensor:
        """Pixels in [-1, 1], [B, 3, F, H, W], float32; the inverse of `encode_video`."""
        return vae.decode_video(self._vae(), latents_BCFHW)

    def _vae(self) -> AutoencoderKLWan:
        if self.vae is None:
            raise CheckpointError(f"{self.source}: the VAE was not loaded")
        return self.vae
