"""`SequenceParallel`: the processes that share the tokens of each clip, and what they exchange.

DeepSpeed-Ulysses (arXiv 2309.14509): around self-attention, an all-to-all turns a slice of the
tokens with all heads into all tokens with a slice of the heads, and another one turns the result
back. The number of tokens need not divide by that of processes: some then have one token more, and
nothing is padded.

Shapes: B samples, N own tokens of all M, H heads of D channels, P processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from onewan.parallel.division import Part
from onewan.parallel.ranks import Ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceParallel:
    """The `onewan.model.shared_tokens.TokenSharing` of a run of several processes."""

    ranks: Ranks
    group: tuple[int, ...]
    """The processes that share the tokens, for which `ranks` is prepared, this one among them."""

    def of(self, count: int) -> TokenSlices:
        """How they share `count` tokens. ValueError if these are fewer than the processes."""
        if count < len(self.group):
            raise ValueError(f"{len(self.group)} processes can't share {count} tokens")
        parts = [Part(number, len(self.group)).of(count) for number in range(len(self.group))]
        return TokenSlices(self.ranks, self.group, parts, self.group.index(self.ranks.rank))


class TokenSlices:
    """The `onewan.model.shared_tokens.SharedTokens` of one batch."""

    def __init__(
        self, ranks: Ranks, group: tuple[int, ...], parts: list[range], number: int
    ) -> None:
        """`parts` are the tokens of each process of `group`, of which this one is `number`."""
        self._ranks, self._group = ranks, group
        self.own = parts[number]
        self._counts = [len(part) for part in parts]
        self._same = [len(self.own)] * len(parts)

    def to_heads(self, tokens_BNHD: Tensor) -> Tensor:
        """[B, N, H, D] -> [B, M, H / P, D]. ValueError if P does not divide H."""
        heads = tokens_BNHD.shape[2]
        if heads % len(self._group):
            raise ValueError(f"{len(self._group)} processes can't share {heads} attention heads")
        return _differentiable(tokens_BNHD, self._to_heads, self._to_tokens)

    def to_tokens(self, heads_BMHD: Tensor) -> Tensor:
        """[B, M, H / P, D] -> [B, N, H, D]."""
        return _differentiable(heads_BMHD, self._to_tokens, self._to_heads)

    def gathered(self, tokens_BNd: Tensor) -> Tensor:
        """[B, N, d] -> [B, M, d]."""
        return _differentiable(tokens_BNd, self._gathered, self._own_slice)

    # Messages have the tokens as rows, [tokens, B, ...], so that the tokens of one process are
    # consecutive in memory.

    def _to_heads(self, tokens_BNHD: Tensor) -> Tensor:
        by_process = tokens_BNHD.unflatten(2, (len(self._group), -1)).permute(2, 1, 0, 3, 4)
        received = self._exchanged(by_process.flatten(0, 1), self._same, self._counts)
        return received.transpose(0, 1).contiguous()

    def _to_tokens(self, heads_BMHD: Tensor) -> Tensor:
        received = self._exchanged(heads_BMHD.transpose(0, 1), self._counts, self._same)
        by_process = received.unflatten(0, (len(self._group), -1))
        return by_process.permute(2, 1, 0, 3, 4).flatten(2, 3).contiguous()

    def _gathered(self, tokens_BNd: Tensor) -> Tensor:
        copies = tokens_BNd.transpose(0, 1).repeat(len(self._group), 1, 1)
        return self._exchanged(copies, self._same, self._counts).transpose(0, 1).contiguous()

    def _own_slice(self, grad_BMd: Tensor) -> Tensor:
        return grad_BMd[:, self.own.start : self.own.stop]

    def _exchanged(self, rows: Tensor, given: list[int], taken: list[int]) -> Tensor:
        return self._ranks.exchanged(rows, given, taken, self._group)


def _differentiable(
    x: Tensor, function: Callable[[Tensor], Tensor], gradient: Callable[[Tensor], Tensor]
) -> Tensor:
    """`function` of `x`, whose gradient is `gradient` of that of the result."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return function(x.detach())
    return _Exchange.apply(x, function, gradient)  # pyright: ignore[reportReturnType]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        function: Callable[[Tensor], Tensor],
        gradient: Callable[[Tensor], Tensor],
    ) -> Tensor:
        ctx.gradient = gradient
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.gradient(grad), None, None
