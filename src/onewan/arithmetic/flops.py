"""Floating-point operations of a Wan transformer, as PyTorch's `FlopCounterMode` counts them.

A matrix product of [n, k] and [k, m] has 2 n k m; everything else (norms, activations, the softmax,
rotary embeddings) is left out, and so are a LoRA's own products, which add about 1 % per pass at
rank 32. A block of width d with a feed-forward width f, over N tokens and M text tokens, has

    linear layers of the tokens  2 N (6 d^2 + 2 d f)   (self-attention 4 d^2, cross-attention 2 d^2)
    linear layers of the text    2 M 2 d^2             (key and value of cross-attention)
    attention                    4 N^2 d + 4 N M d
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from onewan.variants import PATCH_SIZE, TEXT_LENGTH, Variant

Trained = Literal["adapter", "weights", "embeddings"]
"""What has gradients: adapters beside frozen weights, the weights themselves, or only vectors in
the text."""

FLASH_BACKWARD = 2.5
"""Products of a flash attention's backward pass per product of its forward pass: it computes the
scores again."""
EXACT_BACKWARD = 2.0
"""The same without computing anything again, as in a model FLOPs utilisation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerSize:
    """The sizes of a transformer that decide its operations."""

    layers: int
    width: int
    feed_forward: int
    in_channels: int
    out_channels: int
    text_width: int = 4096
    """Of the text encoder's vectors."""
    frequencies: int = 256
    """Width of the sinusoidal time embedding."""

    @classmethod
    def of_variant(cls, variant: Variant) -> TransformerSize:
        return cls(
            layers=variant.num_layers,
            width=variant.num_attention_heads * variant.attention_head_dim,
            feed_forward=variant.ffn_dim,
            in_channels=variant.in_channels,
            out_channels=variant.latent_channels,
        )

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> TransformerSize:
        """Of a diffusers transformer's configuration."""
        return cls(
            layers=config["num_layers"],
            width=config["num_attention_heads"] * config["attention_head_dim"],
            feed_forward=config["ffn_dim"],
            in_channels=config["in_channels"],
            out_channels=config["out_channels"],
            text_width=config["text_dim"],
            frequencies=config["freq_dim"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """Operations by what their backward pass costs."""

    linear: int
    """Of linear layers (and the patch embedding) over the clip's tokens."""
    text: int
    """Of linear layers over the text's tokens."""
    time: int
    """Of the time embedding."""
    attention: int

    @property
    def total(self) -> int:
        return self.linear + self.text + self.time + self.attention

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            linear=self.linear + other.linear,
            text=self.text + other.text,
            time=self.time + other.time,
            attention=self.attention + other.attention,
        )

    def __mul__(self, factor: int) -> Flops:
        return Flops(
            linear=self.linear * factor,
            text=self.text * factor,
            time=self.time * factor,
            attention=self.attention * factor,
        )


def token_count(frames: int, height: int, width: int) -> int:
    """Tokens of a clip whose latents are [C, `frames`, `height`, `width`]."""
    return (frames // PATCH_SIZE[0]) * (height // PATCH_SIZE[1]) * (width // PATCH_SIZE[2])


def block_flops(size: TransformerSize, tokens: int, text_tokens: int = TEXT_LENGTH) -> Flops:
    """One forward pass of one block for one clip."""
    d, f = size.width, size.feed_forward
    return Flops(
        linear=2 * tokens * (6 * d * d + 2 * d * f),
        text=2 * text_tokens * 2 * d * d,
        time=0,
        attention=4 * tokens * tokens * d + 4 * tokens * text_tokens * d,
    )


def forward_flops(
    size: TransformerSize, tokens: int, *, timesteps: int = 1, text_tokens: int = TEXT_LENGTH
) -> Flops:
    """One forward pass of the whole transformer for one clip.

    `timesteps` is the number of timesteps that the time embedding is computed for: 1, or, where the
    tokens have timesteps of their own, as many as are embedded.
    """
    d = size.width
    cells = PATCH_SIZE[0] * PATCH_SIZE[1] * PATCH_SIZE[2]
    ends = Flops(
        linear=2 * tokens * cells * d * (size.in_channels + size.out_channels),
        text=2 * text_tokens * (size.text_width * d + d * d),
        time=2 * timesteps * (size.frequencies * d + d * d + 6 * d * d),
        attention=0,
    )
    return block_flops(size, tokens, text_tokens) * size.layers + ends


def training_flops(
    forward: Flops,
    trained: Trained,
    *,
    attention_backward: float = EXACT_BACKWARD,
    recomputations: int = 0,
) -> float:
    """A forward and a backward pass, of which `forward` is the forward pass.

    A frozen linear layer's backward pass has one product (the gradient of its input), a trained
    one's two. Frozen layers of the text have none, unless gradients go to vectors in it, and nor
    has the frozen time embedding. The first layers count as others do, although their input needs
    no gradient: less than 1 % of a model with 30 layers.

    `recomputations` is the number of forward passes that gradient checkpointing adds. By default
    the result is what the mathematics requires, which a model FLOPs utilisation is a share of.
    """
    weights = 1 if trained == "weights" else 0
    text = 1 if trained != "adapter" else 0
    backward = (
        forward.linear * (1 + weights)
        + forward.text * (text + weights)
        + forward.time * 2 * weights
        + forward.attention * attention_backward
    )
    return forward.total * (1 + recomputations) + backward
