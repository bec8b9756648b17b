"""Sizes of the three networks, as numbers of weights by diffusers' names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from onewan.arithmetic.flops import TransformerSize
from onewan.arithmetic.strips import widest_strip
from onewan.memory.plan.bucket import Bucket
from onewan.variants import PATCH_SIZE, TEXT_WIDTH, TIME_FREQUENCIES, Variant

LinearShapes = Mapping[str, tuple[int, int]]
"""(outputs, inputs) of linear layers by name."""

_PATCH = PATCH_SIZE[0] * PATCH_SIZE[1] * PATCH_SIZE[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerShape:
    """Widths and depth of one expert."""

    layers: int
    """Transformer blocks."""
    width: int
    """Channels of the residual stream."""
    feed_forward: int
    """Channels inside the feed-forward layer."""
    heads: int
    in_channels: int
    out_channels: int
    reference_channels: int = 0
    """Input channels of `ref_conv`, 0 without that layer."""
    text_width: int = TEXT_WIDTH
    time_frequencies: int = TIME_FREQUENCIES

    @staticmethod
    def of_variant(variant: Variant) -> TransformerShape:
        return TransformerShape(
            layers=variant.num_layers,
            width=variant.num_attention_heads * variant.attention_head_dim,
            feed_forward=variant.ffn_dim,
            heads=variant.num_attention_heads,
            in_channels=variant.in_channels,
            out_channels=variant.latent_channels,
            reference_channels=variant.reference_channels or 0,
        )

    @staticmethod
    def of_config(config: Mapping[str, Any]) -> TransformerShape:
        """From diffusers' configuration of a transformer, as `formats.configs` returns it."""
        heads = config["num_attention_heads"]
        return TransformerShape(
            layers=config["num_layers"],
            width=heads * config["attention_head_dim"],
            feed_forward=config["ffn_dim"],
            heads=heads,
            in_channels=config["in_channels"],
            out_channels=config.get("out_channels") or config["in_channels"],
            reference_channels=config.get("reference_channels") or 0,
            text_width=config.get("text_dim", TEXT_WIDTH),
            time_frequencies=config.get("freq_dim", TIME_FREQUENCIES),
        )

    @property
    def size(self) -> TransformerSize:
        """The sizes that decide the number of operations."""
        return TransformerSize(
            layers=self.layers,
            width=self.width,
            feed_forward=self.feed_forward,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            text_width=self.text_width,
            frequencies=self.time_frequencies,
        )

    def block_linears(self) -> LinearShapes:
        """The linear layers of one block, by their names within it."""
        d, f = self.width, self.feed_forward
        attention = {
            f"attn{n}.{name}": (d, d)
            for n in (1, 2)
            for name in ("to_q", "to_k", "to_v", "to_out.0")
        }
        return {**attention, "ffn.net.0.proj": (f, d), "ffn.net.2": (d, f)}

    def outer_linears(self) -> LinearShapes:
        """The linear layers outside the blocks."""
        d = self.width
        embedder = "condition_embedder"
        return {
            f"{embedder}.time_embedder.linear_1": (d, self.time_frequencies),
            f"{embedder}.time_embedder.linear_2": (d, d),
            f"{embedder}.time_proj": (6 * d, d),
            f"{embedder}.text_embedder.linear_1": (d, self.text_width),
            f"{embedder}.text_embedder.linear_2": (d, d),
            "proj_out": (self.out_channels * _PATCH, d),
        }

    def linears(self) -> LinearShapes:
        """All linear layers by their full names, in the model's order."""
        outer = self.outer_linears()
        head = outer["proj_out"]
        before = {name: shape for name, shape in outer.items() if name != "proj_out"}
        blocks = {
            f"blocks.{index}.{name}": shape
            for index in range(self.layers)
            for name, shape in self.block_linears().items()
        }
        return {**before, **blocks, "proj_out": head}

    def block_vectors(self) -> Mapping[str, int]:
        """Numbers of the weights of one block outside its linear layers: norms, modulation."""
        norms = {f"attn{n}.norm_{name}.weight": self.width for n in (1, 2) for name in ("q", "k")}
        norm2 = {"norm2.weight": self.width, "norm2.bias": self.width}
        return {**norms, **norm2, "scale_shift_table": 6 * self.width}

    @property
    def block_matrix_weights(self) -> int:
        """Weights in the linear layers of one block, without biases."""
        return sum(out * inputs for out, inputs in self.block_linears().values())

    @property
    def block_vector_weights(self) -> int:
        """All other weights of one block: biases, norms and modulation."""
        biases = sum(out for out, _ in self.block_linears().values())
        return biases + sum(self.block_vectors().values())

    @property
    def outer_weights(self) -> int:
        """Weights outside the blocks: embeddings of patches, time and text, and the head."""
        linears = sum(out * inputs + out for out, inputs in self.outer_linears().values())
        patches = self.width * self.in_channels * _PATCH + self.width
        if self.reference_channels:
            patches += self.width * self.reference_channels * _PATCH + self.width
        return linears + patches + 2 * self.width

    @property
    def weights(self) -> int:
        """All weights of the expert."""
        block = self.block_matrix_weights + self.block_vector_weights
        return self.layers * block + self.outer_weights

    def named_weights(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of every weight, as full fine-tuning selects them."""
        for name, shape in self.linears().items():
            yield f"{name}.weight", shape
            yield f"{name}.bias", shape[:1]
        for index in range(self.layers):
            for name, size in self.block_vectors().items():
                yield f"blocks.{index}.{name}", (size,)
        yield "patch_embedding.weight", (self.width, self.in_channels * _PATCH)
        yield "patch_embedding.bias", (self.width,)
        if self.reference_channels:
            yield "ref_conv.weight", (self.width, self.reference_channels * _PATCH)
            yield "ref_conv.bias", (self.width,)
        yield "scale_shift_table", (2 * self.width,)


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeShape:
    """What the VAE needs: its weights, and floats per pixel of one frame while it runs.

    Video goes through it in pieces of four frames, so what a piece needs does not depend on the
    length; only the finished part does, `per_frame`. Counted as live bytes over fake tensors of
    diffusers' AutoencoderKLWan in float32, at seven sizes from 1x480x832 to 121x704x1280.
    """

    weights: int
    encode: tuple[float, float, float]
    """Float32 values per pixel while encoding 1 frame, 5 frames, or more."""
    decode: tuple[float, float, float]
    encode_per_frame: float
    """Values per pixel that each further frame adds."""
    decode_per_frame: float
    cell: int
    """Pixels that a latent cell is wide."""
    strip_per_frame: float
    """Values per pixel of the whole picture that each frame adds where it is encoded in strips."""

    @staticmethod
    def of_variant(variant: Variant) -> VaeShape:
        return _VAE_2_1 if variant.spatial_compression == 8 else _VAE_2_2

    def scaled(self, weights: int) -> VaeShape:
        """The VAE of this architecture with another number of `weights`, such as a test model's.

        Weights grow with the square of the width, activations with the width.
        """
        factor = (weights / self.weights) ** 0.5
        return VaeShape(
            weights=weights,
            encode=tuple(factor * value for value in self.encode),  # pyright: ignore[reportArgumentType]
            decode=tuple(factor * value for value in self.decode),  # pyright: ignore[reportArgumentType]
            encode_per_frame=self.encode_per_frame,
            decode_per_frame=self.decode_per_frame,
            cell=self.cell,
            strip_per_frame=self.strip_per_frame,
        )

    def encoding_bytes(self, bucket: Bucket, strips: int = 1) -> int:
        """Live bytes at the peak of encoding a clip in so many strips, over the weights."""
        if strips == 1:
            return _vae_bytes(self.encode, self.encode_per_frame, bucket.pixels, bucket.frames)
        cells = max(bucket.width, bucket.height) // self.cell
        pixels = bucket.pixels * widest_strip(cells, strips, STRIP_MARGIN) // cells
        at_once = _vae_bytes(self.encode, 0.0, pixels, bucket.frames)
        return at_once + round(4 * self.strip_per_frame * bucket.pixels * bucket.frames)

    def strips(self, bucket: Bucket, room: int) -> int:
        """The fewest strips in which encoding a clip takes at most `room` bytes over the weights;
        `_MOST_STRIPS` if that is not enough."""
        numbers = range(1, _MOST_STRIPS)
        return next((n for n in numbers if self.encoding_bytes(bucket, n) <= room), _MOST_STRIPS)

    def decoding_bytes(self, pixels: int, frames: int) -> int:
        """Live bytes at the peak of decoding, over the weights."""
        return _vae_bytes(self.decode, self.decode_per_frame, pixels, frames)


def _vae_bytes(
    values: tuple[float, float, float], per_frame: float, pixels: int, frames: int
) -> int:
    one, five, more = values
    floats = one if frames == 1 else five if frames <= 5 else more + per_frame * frames
    return round(4 * pixels * floats)


STRIP_MARGIN = 5
"""Latent cells that a strip is computed beyond its own on each side (`onewan.model.vae_strips`)."""
_MOST_STRIPS = 8
"""More of them save hardly any memory: at 1280 pixels, the VAE of A14B computes 160 in each of 8,
and 80 of its margins."""

_VAE_2_1 = VaeShape(
    weights=126_892_531,
    encode=(967.9, 3037.3, 3522.7),
    decode=(1730.6, 4580.3, 4867.4),
    encode_per_frame=3.09,
    decode_per_frame=3.09,
    cell=8,
    strip_per_frame=4.1,
)
_VAE_2_2 = VaeShape(
    weights=704_688_668,
    encode=(490.6, 1614.5, 1791.6),
    decode=(1451.1, 4742.2, 5375.5),
    encode_per_frame=6.09,
    decode_per_frame=3.09,
    cell=16,
    strip_per_frame=3.5,
)

TEXT_ENCODER_WEIGHTS = 5_680_910_336
"""Of the UMT5-XXL encoder: a table of 256,384 rows and 24 blocks of width 4096."""

TEXT_HEADS = 64
"""Attention heads of that encoder."""

CAPTION_BYTES_PER_HEAD = 4_700_000
"""Live bytes for each head while the encoder encodes one text of 512 tokens in bfloat16, over its
weights: mostly attention scores, [512, 512] for each head."""
