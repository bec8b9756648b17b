"""Bytes of the tensors that a training step keeps, and of those at the peak within one block.

Every figure is a sum of tensors of three kinds: `stream`, float32 [tokens, width], like the hidden
states; `half`, [tokens, width] in the precision of the matrix products; and `hidden`, [tokens,
feed-forward width] in that precision. How many of each are alive at a peak was counted as live
bytes over fake tensors of the blocks at true size (81x480x832 of the A14B variants, 121x704x1280 of
TI2V-5B). ``tests/unit/test_plan_counts.py`` counts again and compares.
"""

from __future__ import annotations

from dataclasses import dataclass

from onewan.config.method import (
    DoraMethod,
    FineTuneMethod,
    LohaMethod,
    LokrMethod,
    Method,
    OftMethod,
)
from onewan.memory.plan.settings import Settings
from onewan.memory.plan.shapes import TransformerShape
from onewan.variants import TEXT_LENGTH

AHEAD = 1
"""Blocks whose inputs and attention outputs are on the device while they are copied to or from host
memory (`onewan.memory.activations.DEPTH`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors:
    """Numbers of live tensors of the three kinds."""

    stream: float = 0
    half: float = 0
    hidden: float = 0

    def __add__(self, other: Tensors) -> Tensors:
        return Tensors(
            stream=self.stream + other.stream,
            half=self.half + other.half,
            hidden=self.hidden + other.hidden,
        )

    def __truediv__(self, parts: int) -> Tensors:
        return Tensors(
            stream=self.stream / parts, half=self.half / parts, hidden=self.hidden / parts
        )


# A block is recomputed and differentiated in parts (`onewan.memory.block_backward`): the
# feed-forward layer, cross-attention, self-attention. Below is what is alive at the peak of each,
# beside the block's input and what blocks keep.

_FORWARD_ATTENTION = Tensors(stream=2, half=5)
"""The hidden states and the attention's output in float32; the outputs of both attentions, and
those of the last linear layer, its adapter and the scaled sum."""
_FORWARD_BESIDE_FEED_FORWARD = Tensors(stream=1)
_FORWARD_FEED_FORWARD = Tensors(stream=1, hidden=3)
"""A chunk's normalized input; outputs of the first linear layer, its adapter and the scaled sum."""

_BESIDE_FEED_FORWARD = Tensors(stream=3)
"""The hidden states behind each attention, and the gradient."""
_FEED_FORWARD = Tensors(half=1, hidden=4)
"""A chunk's input; before GELU, and three gradients that make up that behind it."""
_CROSS_ATTENTION = Tensors(stream=5, half=5)
"""The hidden states between the attentions, the gradient, and three tensors of the normalization of
the queries; the output of self-attention, the normalized input, the projected queries, and the
gradients of the rotated and the plain ones."""
_SELF_ATTENTION = Tensors(stream=2, half=11)
"""The gradient, and the sum of the queries' gradients inside of flash attention; the normalized
input, queries and keys before and behind their rotation, values, their three gradients, and the
output and its gradient."""

_SELF_HEADS = Tensors(half=7)
"""The normalized input, queries and keys before and behind their rotation, values, the output."""
_CROSS_HEADS = Tensors(half=4)
"""The normalized input, the queries before and behind their normalization, and the output."""

_TRAINED_FEED_FORWARD = Tensors(stream=3, half=4, hidden=2)
"""Where the weights themselves are trained, the peak is earlier, when the gate is differentiated: a
chunk's normalized input and two gradients of products; its inputs and its outputs in the precision
of the matrix products, and the gradient of these; before and behind GELU."""
_DORA_FEED_FORWARD = Tensors(hidden=4)
"""Each DoRA layer keeps its base layer's output and the scaled sum."""

# ------------------------------------------------------------------------- kept for a whole block

_SAVED = Tensors(stream=7, half=8.7, hidden=2)
"""What autograd keeps of one block without gradient checkpointing."""
_BEYOND_SAVED = Tensors(stream=2, half=2.2, hidden=1)
"""At the peak, in the last block's forward pass."""
_SAVED_ADDED = {DoraMethod: Tensors(half=7, hidden=1), FineTuneMethod: Tensors(stream=3.4)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Bytes of the activations of one forward and backward pass over a batch."""

    kept_on_device: int
    """Between forward and backward: block inputs and attention outputs, or what autograd saves."""
    kept_on_host: int
    live: int
    """At the peak within one block, beyond what is kept on the device; what is being copied to and
    from host memory is included."""
    forward_live: int
    """At the peak within one block of a forward pass without gradients, its input included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The sizes that activations depend on."""

    shape: TransformerShape
    tokens: int
    """Of one clip."""
    clips: int
    compute_bytes: int
    """Bytes of a value in the precision of the matrix products: 2, or 4 for float32."""

    def bytes(self, tensors: Tensors) -> float:
        rows = self.tokens * self.clips
        d, f = self.shape.width, self.shape.feed_forward
        half = tensors.half * d + tensors.hidden * f
        return rows * (4 * tensors.stream * d + self.compute_bytes * half)

    @property
    def block_input(self) -> int:
        """Bytes of the input of one block, float32."""
        return round(self.bytes(Tensors(stream=1)))

    @property
    def attention_outputs(self) -> int:
        """Bytes of both attention outputs of one block, with the float32 logarithms of the sums of
        exponentials, of which each head has one for each token."""
        sums = 2 * 4 * self.shape.heads * self.tokens * self.clips
        return round(self.bytes(Tensors(half=2))) + sums

    @property
    def text(self) -> int:
        """Bytes of the text tokens' tensors in one block, projected to its width."""
        rows = TEXT_LENGTH * self.clips
        return round(rows * self.shape.width * (4 + 8 * self.compute_bytes))


def activations(
    batch: Batch, settings: Settings, method: Method, *, gradients: int = 0
) -> Activations:
    """The activations of a training step with `settings`. `gradients` are those of the weights of
    one block, if they come and go with its backward pass: they are part of `live` then."""
    layers = batch.shape.layers
    inference = batch.block_input + batch.text + _forward_peak(batch, settings, method)
    if not settings.checkpointing:
        saved = _SAVED + _SAVED_ADDED.get(type(method), Tensors())
        return Activations(
            # With the hidden states after the last block.
            kept_on_device=round(layers * batch.bytes(saved)) + batch.block_input,
            kept_on_host=0,
            live=round(batch.bytes(_BEYOND_SAVED)) + batch.text,
            forward_live=inference,
        )
    device, host, ahead = 0, 0, 0
    if settings.offload_inputs:
        host += batch.block_input
        ahead += AHEAD * batch.block_input
    else:
        device += batch.block_input
    if settings.keep_attention == "host":
        host += batch.attention_outputs
        ahead += AHEAD * batch.attention_outputs
    elif settings.keep_attention == "device":
        device += batch.attention_outputs
    forward = ahead + batch.block_input + _forward_peak(batch, settings, method)
    backward = batch.block_input + _backward_peak(batch, settings, method, ahead, gradients)
    return Activations(
        kept_on_device=layers * device,
        kept_on_host=layers * host,
        # The peak is in the last block, beside what the others keep.
        live=max(forward, backward) + batch.text - device,
        forward_live=inference,
    )


def _forward_peak(batch: Batch, settings: Settings, method: Method) -> int:
    """Of a block's forward pass, beside its input and what other blocks keep."""
    feed_forward = _FORWARD_FEED_FORWARD
    if isinstance(method, DoraMethod):
        feed_forward += _DORA_FEED_FORWARD
    feed_forward = feed_forward / settings.feed_forward_chunks + _FORWARD_BESIDE_FEED_FORWARD
    kept = batch.attention_outputs if settings.keep_attention != "no" else 0
    return round(max(kept + batch.bytes(feed_forward), batch.bytes(_FORWARD_ATTENTION)))


def _backward_peak(
    batch: Batch, settings: Settings, method: Method, ahead: int, gradients: int
) -> int:
    """Of a block's backward pass, beside its input and what other blocks keep. What the next block
    needs, `ahead`, comes to the device when the feed-forward layer is done, and the gradients of
    that layer's weights are complete then."""
    within = _FEED_FORWARD
    cross, self_attention = _CROSS_ATTENTION, _SELF_ATTENTION
    if isinstance(method, DoraMethod):
        within += _DORA_FEED_FORWARD
        cross += Tensors(half=2)
        self_attention += Tensors(half=2)
    elif isinstance(method, OftMethod):
        within += Tensors(half=1)  # rotated inputs
    elif isinstance(method, FineTuneMethod):
        # Normalized inputs and what gates multiply, for the gradients of the modulation.
        within = _TRAINED_FEED_FORWARD
        self_attention += Tensors(stream=1)
    feed_forward = within / settings.feed_forward_chunks + _BESIDE_FEED_FORWARD
    if settings.keep_attention == "no":
        # Queries, keys, values and outputs of both attentions are there from the beginning.
        feed_forward += _SELF_HEADS + _CROSS_HEADS
        if isinstance(method, FineTuneMethod):
            feed_forward += Tensors(stream=1)  # the normalized input of cross-attention
        cross += _SELF_HEADS
    else:
        feed_forward += Tensors(half=2)
    attention = max(batch.bytes(cross), batch.bytes(self_attention))
    # The sums over the chunks before, and the gradients of one chunk.
    sums = 2 * _share_of_feed_forward(batch) * gradients if settings.feed_forward_chunks > 1 else 0
    peak = max(batch.bytes(feed_forward) + sums, attention + ahead + gradients)
    if isinstance(method, FineTuneMethod):
        # One float32 cast is kept from the forward pass on, and two come when all blocks are done.
        cast = _weight_sized(batch, method) // 3
        return round(cast + max(peak, 2 * cast))
    return round(peak + _weight_sized(batch, method))


def _share_of_feed_forward(batch: Batch) -> float:
    """Of the feed-forward layer among the weights of a block, beside its eight projections."""
    d, f = batch.shape.width, batch.shape.feed_forward
    return f / (f + 4 * d)


def _weight_sized(batch: Batch, method: Method) -> int:
    """Bytes of tensors of the size of a weight, which do not depend on the number of tokens."""
    d, f = batch.shape.width, batch.shape.feed_forward
    if isinstance(method, LohaMethod | LokrMethod):
        return 3 * 4 * d * f  # the weight's difference, its gradient and their product, float32
    if isinstance(method, FineTuneMethod):
        return 3 * 4 * 6 * d * d  # float32 casts of the largest outer layer, for its own gradient
    return 0


def smallest_peak(batch: Batch) -> int:
    """Bytes at the peak of a pass over few tokens: before the first block, beside its input, the
    float32 cast of the projection of the time embedding to the modulation of the blocks, 6 widths
    wide."""
    return 4 * 6 * batch.shape.width**2 + batch.block_input


def exchange_bytes(batch: Batch) -> int:
    """Bytes of what processes that share the tokens of `batch` have of them twice in attention:
    queries, keys, values and outputs, of their own tokens and of their own heads."""
    return round(batch.bytes(Tensors(half=4)))
