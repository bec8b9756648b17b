"""A transformer block in parts, each of which can be computed and differentiated by itself.

diffusers computes a block as a whole, so that the backward pass of a recomputed block holds the
intermediate tensors of self-attention, cross-attention and feed-forward layer together: 10.9 GB for
A14B at 81x480x832. These functions compute the same block piece by piece, with the same operations
in the same order, so results and gradients have the same bits as diffusers' (`WanTransformerBlock`
in `diffusers/models/transformers/transformer_wan.py`). A branch is what a part adds to the hidden
states; the sums are the caller's.

Shapes: B samples, N tokens, d channels, H heads of D channels.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from onewan.model.precision import CastOnce, autocast, autocast_dtype
from onewan.model.shared_tokens import SharedTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockInputs:
    """What all blocks get in one forward pass of one batch, besides the hidden states. Where
    processes share its tokens, N counts those of this one."""

    text: Tensor
    """[B, 512, d] text embeddings, projected to the transformer's width."""
    time: Tensor
    """[B, T, 6, d] float32 modulation from the timesteps: T is 1, or that of `groups`."""
    groups: tuple[int, ...]
    """Numbers of tokens that share one of several timesteps, in their order; empty with one."""
    rotary: tuple[Tensor, Tensor]
    """cos and sin of the rotary position embedding, float32 [1, N, 1, D]."""
    frames: int
    """Latent frames; tokens are ordered by frame."""
    shared: SharedTokens | None = None
    """How processes share the tokens; None if this one has all of them."""


class Modulation(NamedTuple):
    """Shift, scale and gate of a block's self-attention and feed-forward layer, [B, T, d] each."""

    shift: Tensor
    scale: Tensor
    gate: Tensor
    ffn_shift: Tensor
    ffn_scale: Tensor
    ffn_gate: Tensor


class Heads(NamedTuple):
    """Queries [B, N, H, D], keys and values [B, M, H, D] of one attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    output_dtype: torch.dtype
    """The dtype of the attention's output where it enters the next layer: that of the normalized
    queries, before autocast converts them for attention. A layer that computes with its input
    before the matrix product, such as OFT's rotation, would otherwise round differently."""

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v


def modulation(block: WanTransformerBlock, time_BT6d: Tensor) -> Modulation:
    """The block's table plus the modulation from the timesteps, float32."""
    table = block.scale_shift_table[:, None] + time_BT6d.float()
    return Modulation(*(chunk.squeeze(2) for chunk in table.chunk(6, dim=2)))


def self_attention_heads(
    block: WanTransformerBlock,
    hidden_BNd: Tensor,
    part: Modulation,
    inputs: BlockInputs,
    *,
    recompute: bool = False,
) -> Heads:
    """Queries, keys and values of self-attention, with rotary positions.

    With `recompute`, autograd keeps no float32 tensor and each bfloat16 one once: 3.3 instead of
    7.4 GB at 81x480x832. Normalization and rotation are then computed again in the backward pass.
    """
    normed = block.norm1(hidden_BNd.float())
    normed = _modulated(normed, part.scale, part.shift, inputs.groups)
    q, k, v = _projections(block.attn1, normed.type_as(hidden_BNd), None, recompute=recompute)
    del normed
    return _as_heads(block.attn1, q, k, v, inputs.rotary, recompute=recompute)


def self_attention_branch(
    block: WanTransformerBlock,
    attended_BNHD: Tensor,
    dtype: torch.dtype,
    part: Modulation,
    groups: tuple[int, ...],
    *,
    recompute: bool = False,
) -> Tensor:
    """What self-attention adds to the hidden states, float32 [B, N, d]. Its output enters the next
    layer in `dtype`, that of `Heads.output_dtype`.

    With `recompute`, autograd keeps the attention's output itself instead of a copy of it.
    """
    projected = _projected(block.attn1, attended_BNHD, dtype, recompute=recompute)
    return _gated(projected, part.gate, groups)


def cross_attention_heads(
    block: WanTransformerBlock,
    hidden_BNd: Tensor,
    text_BLd: Tensor,
    *,
    recompute: bool = False,
) -> Heads:
    """Queries of the tokens, keys and values of the text. `recompute`: as above."""
    normed = block.norm2(hidden_BNd.float()).type_as(hidden_BNd)
    q, k, v = _projections(block.attn2, normed, text_BLd, recompute=recompute)
    del normed
    return _as_heads(block.attn2, q, k, v, None, recompute=recompute)


def cross_attention_branch(
    block: WanTransformerBlock,
    attended_BNHD: Tensor,
    dtype: torch.dtype,
    *,
    recompute: bool = False,
) -> Tensor:
    """What cross-attention adds to the hidden states, [B, N, d] in the precision of products.
    `dtype` and `recompute`: as above."""
    return _projected(block.attn2, attended_BNHD, dtype, recompute=recompute)


def feed_forward_branch(
    block: WanTransformerBlock, hidden_BNd: Tensor, part: Modulation, groups: tuple[int, ...]
) -> Tensor:
    """What the feed-forward layer adds to the hidden states of all tokens or of a chunk of them,
    float32 [B, N, d]. `groups` counts those of each timestep among them."""
    normed = _modulated(block.norm3(hidden_BNd.float()), part.ffn_scale, part.ffn_shift, groups)
    output = block.ffn(normed.type_as(hidden_BNd))
    return _gated(output, part.ffn_gate, groups)


def within_frames(heads: Heads, frames: int) -> Heads:
    """The same heads with the frames folded into the batch, [B F, N / F, H, D]: each token then
    attends to those of its own frame."""
    q, k, v = (x.reshape(x.shape[0] * frames, -1, *x.shape[2:]) for x in heads.tensors)
    return Heads(q, k, v, heads.output_dtype)


def of_all_tokens(heads: Heads, inputs: BlockInputs | None) -> Heads:
    """What self-attention computes with: where processes share the tokens, all tokens of this one's
    part of the heads, and `heads` themselves elsewhere. None is cross-attention."""
    if inputs is None or inputs.shared is None:
        return heads
    q, k, v = map(inputs.shared.to_heads, heads.tensors)
    return Heads(q, k, v, heads.output_dtype)


def of_own_tokens(heads_BNHD: Tensor, inputs: BlockInputs | None) -> Tensor:
    """The reverse for one tensor, such as the output: all heads of this process's tokens."""
    if inputs is None or inputs.shared is None:
        return heads_BNHD
    return inputs.shared.to_tokens(heads_BNHD)


@dataclass(frozen=True)
class BlockParts:
    """The functions of this module, as they are or compiled."""

    modulation: Callable[[WanTransformerBlock, Tensor], Modulation] = modulation
    self_attention_heads: Callable[..., Heads] = self_attention_heads
    self_attention_branch: Callable[..., Tensor] = self_attention_branch
    cross_attention_heads: Callable[..., Heads] = cross_attention_heads
    cross_attention_branch: Callable[..., Tensor] = cross_attention_branch
    feed_forward_branch: Callable[..., Tensor] = feed_forward_branch
    is_compiled: bool = False
    """Whether the compiler decides what is kept for the backward pass, so that nothing is to be
    recomputed by hand."""

    @staticmethod
    @cache
    def compiled(backend: str = "inductor") -> BlockParts:
        """The functions compiled by `torch.compile`, once for all blocks of all experts.

        Weights are inputs of the compiled code, so other blocks, and the same weights at another
        address, use it too; the number of tokens is dynamic. Attention itself is between the parts
        and is not compiled. Results differ from the plain functions' by rounding.
        """
        functions = {f.name: f.default for f in fields(BlockParts) if callable(f.default)}
        compiled: dict[str, Any] = {
            name: torch.compile(function, dynamic=True, backend=backend)
            for name, function in functions.items()
        }
        return BlockParts(**compiled, is_compiled=True)


def groups_within(groups: tuple[int, ...], span: range) -> tuple[int, ...]:
    """How many of the tokens of `span` each of the groups has that follow each other."""
    ends = accumulate(groups)
    return tuple(
        max(0, min(end, span.stop) - max(end - group, span.start))
        for end, group in zip(ends, groups, strict=True)
    )


def by_group(
    tokens_BNd: Tensor, groups: tuple[int, ...], function: Callable[[Tensor, slice], Tensor]
) -> Tensor:
    """`function` of the tokens of each group and of the place of the group's timestep among the T,
    one behind the other; [B, N, d]. Without groups, all tokens have the one timestep."""
    if not groups:
        return function(tokens_BNd, slice(0, 1))
    results = [
        function(part, slice(index, index + 1))
        for index, part in enumerate(tokens_BNd.split(groups, dim=1))
        if groups[index]
    ]
    return results[0] if len(results) == 1 else torch.cat(results, dim=1)


def _modulated(normed_BNd: Tensor, scale: Tensor, shift: Tensor, groups: tuple[int, ...]) -> Tensor:
    return by_group(
        normed_BNd, groups, lambda part, of: (part * (1 + scale[:, of])).add_(shift[:, of])
    )


def _gated(output_BNd: Tensor, gate: Tensor, groups: tuple[int, ...]) -> Tensor:
    return by_group(output_BNd, groups, lambda part, of: part * gate[:, of])


def _projections(
    attention: WanAttention, hidden_BNd: Tensor, text_BLd: Tensor | None, *, recompute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    other = hidden_BNd if text_BLd is None else text_BLd
    with CastOnce() if recompute else nullcontext():
        return attention.to_q(hidden_BNd), attention.to_k(other), attention.to_v(other)


def _as_heads(
    attention: WanAttention,
    q_BNd: Tensor,
    k_BMd: Tensor,
    v_BMd: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    *,
    recompute: bool,
) -> Heads:
    """The projections as heads: q and k normalized and, with `rotary`, rotated."""

    normalized = q_BNd.dtype

    def prepared(norm: nn.Module, x: Tensor) -> Tensor:
        nonlocal normalized
        heads = norm(x).unflatten(2, (attention.heads, -1))
        normalized = heads.dtype
        return autocast(heads) if rotary is None else _rotated(heads, rotary)

    def head(norm: nn.Module, x: Tensor) -> Tensor:
        if not (recompute and x.requires_grad):
            return prepared(norm, x)
        result: Any = checkpoint(prepared, norm, x, use_reentrant=True, preserve_rng_state=False)
        return result

    v = autocast(v_BMd.unflatten(2, (attention.heads, -1)))
    k = head(attention.norm_k, k_BMd)
    q = head(attention.norm_q, q_BNd)
    return Heads(q, k, v, normalized)


def _projected(
    attention: WanAttention, attended_BNHD: Tensor, dtype: torch.dtype, *, recompute: bool
) -> Tensor:
    linear, dropout = attention.to_out
    attended_BNd = attended_BNHD.flatten(2, 3)
    given = attended_BNd.to(dtype)
    # Autocast converts it back, to the same values.
    with CastOnce((given, attended_BNd)) if recompute else nullcontext():
        return dropout(linear(given))


def _rotated(x_BNHD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotary
    dtype = autocast_dtype(x_BNHD.device) or x_BNHD.dtype
    return _Rotation.apply(x_BNHD, cos[..., 0::2], sin[..., 1::2], dtype)  # pyright: ignore[reportReturnType]


class _Rotation(torch.autograd.Function):
    """Rotary position embedding of pairs of channels, which saves no activation.

    Products are float32; the result is rounded to `dtype`, that of attention, at once. The backward
    pass rounds each of the two products that a channel takes part in to the type of `x` before
    their sum, as autograd does for diffusers' code.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        even, odd = x[..., 0::2], x[..., 1::2]
        out = torch.empty_like(x, dtype=dtype)
        out[..., 0::2] = (even * cos).sub_(odd * sin)
        out[..., 1::2] = (even * sin).add_(odd * cos)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        even, odd = grad[..., 0::2], grad[..., 1::2]
        out = torch.empty_like(grad, dtype=ctx.dtype)
        out[..., 0::2] = (even * cos).type_as(out).add_((odd * sin).type_as(out))
        out[..., 1::2] = (odd * cos).type_as(out).sub_((even * sin).type_as(out))
        return out, None, None, None
