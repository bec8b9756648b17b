"""What the transformer needs of processes that share the tokens of a clip (sequence parallelism).

Each of P processes computes a slice of the tokens, all layers of a block but self-attention, in
which every token attends to all others. There the processes exchange what they have, so that each
has all tokens of 1/P of the heads, and exchange its result back (DeepSpeed-Ulysses, arXiv
2309.14509). `onewan.parallel.sequence` has the implementation.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class SharedTokens(Protocol):
    """The tokens of one batch, of which this process has a slice: N of all M tokens.

    Each call has to be made by all processes that share them, in the same order. All results have
    gradients where autograd records. A RankError comes from any of them if a process has failed.
    """

    @property
    def own(self) -> range:
        """The indices of this process's tokens."""
        ...

    def to_heads(self, tokens_BNHD: Tensor) -> Tensor:
        """All tokens of this process's part of the H heads, [B, M, H / P, D], from its own tokens
        of all heads, in any dtype."""
        ...

    def to_tokens(self, heads_BMHD: Tensor) -> Tensor:
        """The reverse: [B, N, H, D] from [B, M, H / P, D]. Each of the two is the other's
        transpose, and so computes its gradient."""
        ...

    def gathered(self, tokens_BNd: Tensor) -> Tensor:
        """The tokens of all processes, [B, M, d].

        Its gradient is the own slice of that of the result, and no sum over processes: all of them
        compute the same loss from the same prediction. Gradients of weights are then those of the
        own tokens, and their sum over the processes is that of the loss.
        """
        ...


class TokenSharing(Protocol):
    """The processes that share the tokens of each clip."""

    def of(self, count: int) -> SharedTokens:
        """How they share `count` tokens."""
        ...
