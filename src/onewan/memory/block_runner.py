"""`CheckpointedBlocks`: runs a transformer's blocks with gradient checkpointing, block by block.

Each block is one autograd function. Its forward pass keeps the block's input, and, if the settings
say so, the outputs of its two attentions; its backward pass computes the block again and
differentiates it. Three things make that fit on small devices:

- **Weights** are brought by a `WeightSource` before a block runs, and may leave afterwards: nothing
  between a block's forward and backward pass refers to them.
- **Kept tensors** are on the device or in host memory (`onewan.memory.activations`).
- **Parts**: the feed-forward layer is the last part of a block, so its output is needed by nobody
  in the backward pass. It is computed and differentiated first, in chunks of tokens if wanted, and
  its intermediate tensors are freed before attention is differentiated. With kept attention
  outputs, the hidden states between the parts follow from a projection and a sum, so that
  cross-attention and self-attention are also separate: no attention is computed a second time, and
  nothing a third time.

Several batches may go through a block together; the weights are then brought once for all of them.
Losses and gradients have the same bits as with `torch.utils.checkpoint` over diffusers' blocks,
except that chunks sum gradients of feed-forward weights in another order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor
from torch.autograd.function import once_differentiable

from onewan.memory.activations import KeptActivations
from onewan.memory.block_backward import (
    Attended,
    BlockComputation,
    InputGradients,
    KeptOfBlock,
    RandomStates,
)
from onewan.memory.streaming import Pass
from onewan.model.block_parts import BlockInputs
from onewan.model.precision import autocast_dtype


class WeightSource(Protocol):
    """Brings the weights of single blocks to the device (`onewan.memory.streaming`), or gathers
    them from other processes (`onewan.memory.sharded_blocks`)."""

    def begin(self, first: int) -> None:
        """A pass begins, whose backward pass reaches block `first`; with the number of blocks,
        there is none. Returns when the pass may be computed."""
        ...

    def use(self, index: int) -> None:
        """Bind the weights of block `index` to device memory."""
        ...

    def done(self, index: int, current: Pass) -> None:
        """The block's kernels are queued: its weights may leave behind them."""
        ...


class ResidentWeights:
    """All weights are on the device already."""

    def begin(self, first: int) -> None:
        del first

    def use(self, index: int) -> None:
        del index

    def done(self, index: int, current: Pass) -> None:
        del index, current


@dataclass(kw_only=True)
class CheckpointedBlocks:
    """The `BlockRunner` of one transformer. Its attributes may change between two passes."""

    blocks: Sequence[WanTransformerBlock]
    computation: BlockComputation = field(default_factory=BlockComputation)
    weights: WeightSource = field(default_factory=ResidentWeights)
    store: KeptActivations
    checkpointing: bool = True
    """False: autograd keeps all intermediate tensors, which needs resident weights."""
    offload_inputs: bool = False
    """Whether the inputs of blocks are kept in host memory."""
    offload_attention: bool = False
    """Whether attention outputs that are kept are in host memory."""
    complete: Callable[[int], None] | None = None
    """Called with the index of each block when a backward pass has added what it adds to the
    gradients of the block's parameters; blocks that it does not reach are left out."""

    def run(self, hidden: list[Tensor], inputs: Sequence[BlockInputs]) -> list[Tensor]:
        """The hidden states after the last block, for each batch. Empties `hidden`."""
        if torch.is_grad_enabled() and not self.checkpointing:
            return self._recorded(hidden, inputs)
        current = _ForwardPass(self, list(inputs), hidden)
        self.weights.begin(current.first)
        if current.first < len(self.blocks):
            self.store.clear()  # what a pass has left whose backward pass failed
        states = list(hidden)
        hidden.clear()
        for index in range(len(self.blocks)):
            if index < current.first:
                states = current.forward(index, states, keep=False)
            else:
                states = list(
                    _Block.apply(current, index, len(states), *states, *current.leaves(index))
                )  # pyright: ignore[reportArgumentType]
        return states

    def _recorded(self, hidden: Sequence[Tensor], inputs: Sequence[BlockInputs]) -> list[Tensor]:
        ends = None if self.complete is None else _Ends(self.complete, len(inputs))
        results = list[Tensor]()
        for states, batch in zip(hidden, inputs, strict=True):
            for index, block in enumerate(self.blocks):
                if ends is not None:
                    states = _Begin.apply(ends, index, states)
                states = self.computation.differentiable(block, states, batch)
            results.append(states)
        return results


class _ForwardPass:
    """One pass through all blocks, and what its backward pass needs."""

    def __init__(
        self, runner: CheckpointedBlocks, inputs: list[BlockInputs], hidden: list[Tensor]
    ) -> None:
        self._runner = runner
        self._computation = runner.computation
        self._complete = runner.complete
        self._inputs = inputs
        self._device = hidden[0].device
        self._autocast = autocast_dtype(self._device)
        self._sums = [InputGradients() for _ in inputs]
        self._kept: dict[tuple[int, int], tuple[list[tuple[int, torch.dtype]], RandomStates]] = {}
        self.first = self._first_with_gradient(hidden)
        """The first block that the backward pass reaches."""

    def _first_with_gradient(self, hidden: list[Tensor]) -> int:
        blocks = self._runner.blocks
        if not torch.is_grad_enabled():
            return len(blocks)
        if any(tensor.requires_grad for tensor in (*hidden, *self._differentiated())):
            return 0
        trained = (
            index
            for index, block in enumerate(blocks)
            if any(parameter.requires_grad for parameter in block.parameters())
        )
        return next(trained, len(blocks))

    def _differentiated(self) -> list[Tensor]:
        """The inputs of all blocks that need a gradient: texts, then timesteps."""
        tensors = (*(b.text for b in self._inputs), *(b.time for b in self._inputs))
        return [tensor for tensor in tensors if tensor.requires_grad]

    def leaves(self, index: int) -> list[Tensor]:
        """Further inputs of the autograd function of block `index`."""
        if index > self.first:
            return []
        # Autograd calls the backward pass of a function only if one of its inputs needs a gradient.
        anchor = torch.zeros((), requires_grad=True)
        return [*self._differentiated(), anchor]

    def forward(self, index: int, states: Sequence[Tensor], *, keep: bool) -> list[Tensor]:
        """The hidden states after block `index`; with `keep`, its backward pass will follow."""
        runner = self._runner
        trains = self.first < len(runner.blocks)
        runner.weights.use(index)
        results = []
        with self._context():
            for number, (hidden, inputs) in enumerate(zip(states, self._inputs, strict=True)):
                after, kept, random = self._computation.forward(
                    runner.blocks[index], hidden, inputs
                )
                if keep:
                    tensors = [tensor for attended in kept for tensor in attended.tensors]
                    counts = [(len(attended.saved), attended.dtype) for attended in kept]
                    self._kept[index, number] = (counts, random)
                    leave = [runner.offload_inputs, *[runner.offload_attention] * len(tensors)]
                    runner.store.put((index, number), [hidden, *tensors], leave)
                results.append(after)
        runner.weights.done(index, Pass.TRAIN_FORWARD if trains else Pass.INFERENCE)
        return results

    def backward(self, index: int, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of the hidden states before block `index`."""
        runner = self._runner
        runner.weights.use(index)
        results = []
        for number, gradient in enumerate(gradients):
            hidden, *tensors = runner.store.take((index, number))
            counts, random = self._kept.pop((index, number))
            attended = [
                Attended(tensors.pop(0), tuple(tensors.pop(0) for _ in range(count)), dtype)
                for count, dtype in counts
            ]
            results.append(
                self._computation.backward(
                    runner.blocks[index],
                    KeptOfBlock(hidden, attended, random),
                    gradient,
                    self._inputs[number],
                    self._sums[number],
                    self._context,
                    partial(self._prefetch, index, number),
                )
            )
        runner.weights.done(index, Pass.BACKWARD)
        if self._complete is not None:
            self._complete(index)
        return results

    def input_gradients(self) -> list[Tensor | None]:
        """The gradients of `_differentiated`, when all blocks have added theirs."""
        pairs = [
            *((b.text, s.text) for b, s in zip(self._inputs, self._sums, strict=True)),
            *((b.time, s.time) for b, s in zip(self._inputs, self._sums, strict=True)),
        ]
        return [gradient for tensor, gradient in pairs if tensor.requires_grad]

    def _prefetch(self, index: int, number: int) -> None:
        """Fetch what the backward pass needs after the batch `number` of block `index`."""
        last = number == len(self._inputs) - 1
        self._runner.store.prefetch((index - 1, 0) if last else (index, number + 1))

    def _context(self) -> AbstractContextManager[object]:
        if self._autocast is None:
            return nullcontext()
        # Without the cache of converted weights: each is used once in a block, and the cache would
        # keep them until the end of the forward pass.
        return torch.autocast(self._device.type, dtype=self._autocast, cache_enabled=False)


class _Ends:
    """Counts the batches whose backward pass has left a block."""

    def __init__(self, complete: Callable[[int], None], batches: int) -> None:
        self._complete, self._batches = complete, batches
        self._ended = Counter[int]()

    def left(self, index: int) -> None:
        self._ended[index] += 1
        if self._ended[index] == self._batches:
            self._complete(index)


class _Begin(torch.autograd.Function):
    """The hidden states before a block, without checkpointing.

    Autograd computes what was recorded last first, and accumulates the gradient of a parameter as
    soon as it is complete. All of the block was recorded after this.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, ends: _Ends, index: int, hidden: Tensor
    ) -> Tensor:
        ctx.ends, ctx.index = ends, index
        return hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.ends.left(ctx.index)
        return None, None, gradient


class _Block(torch.autograd.Function):
    """One block for all batches: (hidden states, further inputs) -> hidden states."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, current: _ForwardPass, index: int, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.current, ctx.index, ctx.count = current, index, count
        return tuple(current.forward(index, tensors[:count], keep=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        current: _ForwardPass = ctx.current
        results: list[Tensor | None] = [*current.backward(ctx.index, gradients)]
        if ctx.index == current.first:
            results = [
                gradient if needed else None
                for gradient, needed in zip(results, ctx.needs_input_grad[3:], strict=False)
            ]
            results += [*current.input_gradients(), None]
        return (None, None, None, *results)
