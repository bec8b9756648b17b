"""One block of a transformer: its forward pass, and its recomputation and derivative in parts.

Between the parts only hidden states are alive, so the peak is that of the largest part. The order
of a block's backward pass follows from what each part needs:

1. The hidden states between the parts. With kept attention outputs they follow from the block's
   input by two projections; otherwise both attentions are computed again, with their graphs.
2. The feed-forward layer, the last part, computed and differentiated in chunks of tokens if wanted.
3. Cross-attention, then self-attention.

Gradients of parameters accumulate in their `.grad`, as with `torch.utils.checkpoint`'s reentrant
form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from onewan.devices import generator_state, set_generator_state
from onewan.model.attention_backends import AttentionBackend, attend, default_backend
from onewan.model.block_parts import (
    BlockInputs,
    BlockParts,
    Heads,
    Modulation,
    groups_within,
    of_all_tokens,
    of_own_tokens,
    within_frames,
)


@dataclass(frozen=True, slots=True)
class Attended:
    """An attention's output [B, N, H, D], and what its backward pass needs besides q, k and v."""

    output: Tensor
    saved: tuple[Tensor, ...]
    dtype: torch.dtype
    """In which the output enters the next layer (`Heads.output_dtype`)."""

    @property
    def tensors(self) -> list[Tensor]:
        return [self.output, *self.saved]


Context = Callable[[], AbstractContextManager[object]]


class RandomStates:
    """The states of the random generators before each part of a block, so that a part that is
    computed again draws the same dropout."""

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self._device = device
        self._enabled = enabled
        self._states: dict[str, tuple[Tensor, Tensor | None]] = {}

    def mark(self, part: str) -> None:
        """`part` is computed next."""
        if self._enabled:
            self._states[part] = _generator_states(self._device)

    @contextmanager
    def again(self, part: str) -> Iterator[None]:
        """A context in which `part` draws what it drew before."""
        if not self._enabled:
            yield
            return
        present = _generator_states(self._device)
        _set_generator_states(self._device, self._states[part])
        try:
            yield
        finally:
            _set_generator_states(self._device, present)


def _generator_states(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Of the host's generator, and of the device's own."""
    return torch.get_rng_state(), generator_state(device)


def _set_generator_states(device: torch.device, states: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(states[0])
    set_generator_state(device, states[1])


@dataclass(frozen=True, slots=True)
class KeptOfBlock:
    """What the backward pass of one block and batch gets from the forward pass."""

    hidden: Tensor
    """[B, N, d], the block's input."""
    attended: list[Attended]
    """Of self- and cross-attention; empty if they are computed again."""
    random: RandomStates


@dataclass
class InputGradients:
    """Sums over blocks of the gradients of what all blocks of one batch get.

    Each block continues the sum of the blocks behind it, in autograd's order of summation.
    """

    text: Tensor | None = None
    time: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class BlockComputation:
    """How blocks compute: settings of one bucket."""

    keep_attention: bool = False
    """Whether the forward pass returns attention outputs for the backward pass."""
    chunks: int = 1
    """Number of chunks of the feed-forward layer."""
    frames_apart: bool = False
    """Whether each token attends to its own frame only, in training mode."""
    backend: AttentionBackend | None = None
    """The attention backend; None is PyTorch's choice for the tensors at hand."""
    parts: BlockParts = field(default_factory=BlockParts)
    """The functions that compute the parts, plain or compiled."""
    dropout: bool = False
    """Whether adapters draw dropout, whose random states have to be repeated."""

    @torch.no_grad()
    def forward(
        self, block: WanTransformerBlock, hidden_BNd: Tensor, inputs: BlockInputs
    ) -> tuple[Tensor, list[Attended], RandomStates]:
        """(the next hidden states, the outputs of self- and cross-attention if they are to be kept,
        random states for `backward`)."""
        random = RandomStates(hidden_BNd.device, enabled=self.dropout)
        part = self.parts.modulation(block, inputs.time)
        random.mark("self heads")
        heads = self.parts.self_attention_heads(block, hidden_BNd, part, inputs)
        heads = of_all_tokens(heads, inputs)
        first = self.attended(block, heads, inputs)
        del heads
        random.mark("self branch")
        # Results of the branches belong to nobody else, so the sums overwrite them.
        hidden = _add_into(
            self.parts.self_attention_branch(block, first.output, first.dtype, part, inputs.groups),
            hidden_BNd,
        )
        random.mark("cross heads")
        heads = self.parts.cross_attention_heads(block, hidden, inputs.text)
        second = self.attended(block, heads, None)
        del heads
        random.mark("cross branch")
        hidden += self.parts.cross_attention_branch(block, second.output, second.dtype)
        kept = [first, second] if self.keep_attention else []
        del first, second
        random.mark("feed-forward")
        return self._feed_forward(block, hidden, part, inputs), kept, random

    def differentiable(
        self, block: WanTransformerBlock, hidden_BNd: Tensor, inputs: BlockInputs
    ) -> Tensor:
        """The next hidden states, recorded by autograd: without gradient checkpointing."""
        part = self.parts.modulation(block, inputs.time)
        heads = self.parts.self_attention_heads(block, hidden_BNd, part, inputs)
        output = self._attend(block, of_all_tokens(heads, inputs), inputs)
        hidden = hidden_BNd + self.parts.self_attention_branch(
            block, output, heads.output_dtype, part, inputs.groups
        )
        heads = self.parts.cross_attention_heads(block, hidden, inputs.text)
        output = self._attend(block, heads, None)
        hidden = hidden + self.parts.cross_attention_branch(block, output, heads.output_dtype)
        return hidden + self.parts.feed_forward_branch(block, hidden, part, inputs.groups)

    def backward(
        self,
        block: WanTransformerBlock,
        kept: KeptOfBlock,
        grad_BNd: Tensor,
        inputs: BlockInputs,
        sums: InputGradients,
        context: Context = nullcontext,
        fetch_next: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """The gradient of the block's input. It overwrites `grad_BNd`, that of the block's output.
        Gradients of parameters are accumulated, and those of the text and the timesteps are added
        to `sums`.

        `kept.attended` is emptied. `context` is that of forward passes (autocast). `fetch_next` is
        called when the feed-forward layer is done: what the next block needs may come to the device
        from then on.
        """
        with torch.enable_grad():
            this = _BlockBackward(self, block, inputs, kept.random, sums, context)
            this.run(kept, grad_BNd, fetch_next)
        return grad_BNd

    # ------------------------------------------------------------------------------------ attention

    def attended(
        self, block: WanTransformerBlock, heads: Heads, inputs: BlockInputs | None
    ) -> Attended:
        """Self-attention with `inputs`, cross-attention without; no gradients. `heads` are those
        that `of_all_tokens` returns; the output has this process's own tokens, with all heads."""
        folded = self._folded(block, heads, inputs)
        output, saved = self.chosen(folded).forward(*folded.tensors)
        output = of_own_tokens(output.reshape(heads.q.shape), inputs)
        return Attended(output, saved, heads.output_dtype)

    def _attend(
        self, block: WanTransformerBlock, heads: Heads, inputs: BlockInputs | None
    ) -> Tensor:
        folded = self._folded(block, heads, inputs)
        output = attend(*folded.tensors, self.chosen(folded)).reshape(heads.q.shape)
        return of_own_tokens(output, inputs)

    def attention_backward(
        self,
        block: WanTransformerBlock,
        heads: Heads,
        attended: Attended,
        grad_BNHD: Tensor,
        inputs: BlockInputs | None,
    ) -> list[Tensor]:
        """Gradients of queries, keys and values; `heads` and `attended` as in `attended`."""
        shared, output = None if inputs is None else inputs.shared, attended.output
        if shared is not None:
            grad_BNHD, output = shared.to_heads(grad_BNHD), shared.to_heads(output)
        folded = self._folded(block, heads, inputs)
        shape = folded.q.shape
        gradients = self.chosen(folded).backward(
            grad_BNHD.reshape(shape), *folded.tensors, output.reshape(shape), attended.saved
        )
        pairs = zip(gradients, heads.tensors, strict=True)
        return [of_own_tokens(gradient.reshape(head.shape), inputs) for gradient, head in pairs]

    def chosen(self, heads: Heads) -> AttentionBackend:
        """The attention backend for these heads."""
        return self.backend or _pytorch_choice(heads.q.device, heads.q.dtype, heads.q.shape[-1])

    def _folded(
        self, block: WanTransformerBlock, heads: Heads, inputs: BlockInputs | None
    ) -> Heads:
        if inputs is None or not self.frames_apart or not block.training:
            return heads
        return within_frames(heads, inputs.frames)

    # --------------------------------------------------------------------------- feed-forward layer

    def spans(
        self, tokens: int, groups: tuple[int, ...]
    ) -> Iterator[tuple[slice, tuple[int, ...]]]:
        """(tokens of a chunk, how many of them each group has)."""
        size = -(-tokens // self.chunks)
        for start in range(0, tokens, size):
            span = range(start, min(start + size, tokens))
            yield slice(span.start, span.stop), groups_within(groups, span)

    def _feed_forward(
        self, block: WanTransformerBlock, hidden_BNd: Tensor, part: Modulation, inputs: BlockInputs
    ) -> Tensor:
        # In place: nobody else has these hidden states.
        for span, counts in self.spans(hidden_BNd.shape[1], inputs.groups):
            chunk = hidden_BNd[:, span]
            chunk += self.parts.feed_forward_branch(block, chunk, part, counts)
        return hidden_BNd


@dataclass
class _BlockBackward:
    """The backward pass of one block for one batch."""

    how: BlockComputation
    block: WanTransformerBlock
    inputs: BlockInputs
    random: RandomStates
    sums: InputGradients
    context: Context
    """Of what is computed again, but not of gradients: in autograd's own backward pass, autocast is
    off too."""
    _part: Modulation = field(init=False)

    def run(self, kept: KeptOfBlock, grad_BNd: Tensor, fetch_next: Callable[[], None]) -> None:
        """Turns `grad_BNd`, the gradient of the block's output, into that of its input: in place,
        since autograd holds it until the block's backward pass has ended."""
        time = _leaf(self.inputs.time, self.sums.time)
        with self.context():
            table = self.how.parts.modulation(self.block, time)
        self._part = Modulation(*(_leaf(x) for x in table))
        text = _leaf(self.inputs.text)
        attended = kept.attended
        first = _Attention(self, kept.hidden, None, attended[0] if attended else None)
        middle = first.output()
        second = _Attention(self, middle, text.view_as(text), attended[1] if attended else None)
        attended.clear()  # so that each is freed when it has been used
        last = second.output()
        self._feed_forward(last, grad_BNd)
        del last
        fetch_next()
        second.backward(grad_BNd)
        del second, middle
        first.backward(grad_BNd)
        self.sums.text = text.grad
        self._modulation_backward(table)
        self.sums.time = time.grad

    def _modulation_backward(self, table: Modulation) -> None:
        pairs = [
            (value, leaf.grad)
            for value, leaf in zip(table, self._part, strict=True)
            if value.requires_grad and leaf.grad is not None
        ]
        if pairs:
            torch.autograd.backward([v for v, _ in pairs], [g for _, g in pairs])

    def _feed_forward(self, hidden_BNd: Tensor, grad_BNd: Tensor) -> None:
        """Turns `grad_BNd`, the gradient of the layer's output, into that of `hidden_BNd`, its
        input."""
        how, inputs = self.how, self.inputs
        sums = None
        if how.chunks > 1:
            leaves = (*self._part, *self.block.ffn.parameters())
            sums = _SumsOverChunks([leaf for leaf in leaves if leaf.requires_grad])
        with self.random.again("feed-forward"):
            for span, counts in how.spans(hidden_BNd.shape[1], inputs.groups):
                chunk, grad = hidden_BNd[:, span].detach().requires_grad_(), grad_BNd[:, span]
                with self.context():
                    branch = how.parts.feed_forward_branch(self.block, chunk, self._part, counts)
                edge = get_gradient_edge(branch)
                del branch
                if sums is None:
                    torch.autograd.backward([edge], [grad])
                    assert chunk.grad is not None
                    grad += chunk.grad
                else:
                    grad += sums.add(edge, grad, chunk)
                del chunk  # and its gradient, before those of the next chunk
        if sums is not None:
            sums.accumulate()

    @property
    def part(self) -> Modulation:
        """The modulation, as leaves of which each part has its own graph."""
        return self._part


class _SumsOverChunks:
    """Sums of the gradients of `leaves`, which reach their ``grad`` at once: a fused step updates a
    weight, and drops its gradient, as soon as there is one."""

    def __init__(self, leaves: list[Tensor]) -> None:
        self._leaves = leaves
        self._sums: dict[int, Tensor] = {}

    def add(self, output: GradientEdge, grad: Tensor, chunk: Tensor) -> Tensor:
        """Differentiate `output` by the leaves and by `chunk`; returns the gradient of `chunk`."""
        inputs = [chunk, *self._leaves]
        first, *others = torch.autograd.grad([output], inputs, [grad], allow_unused=True)
        for number, gradient in enumerate(others):
            if gradient is None:  # such as of modulation that other parts use
                continue
            if number in self._sums:
                self._sums[number] += gradient
            else:
                self._sums[number] = gradient
        return first

    def accumulate(self) -> None:
        edges = [get_gradient_edge(self._leaves[number]) for number in self._sums]
        sums = list(self._sums.values())
        self._sums.clear()
        torch.autograd.backward(edges, sums)


class _Attention:
    """Self-attention (`text` is None) or cross-attention, in the backward pass of a block."""

    def __init__(
        self, owner: _BlockBackward, hidden_BNd: Tensor, text: Tensor | None, kept: Attended | None
    ) -> None:
        self._owner = owner
        self._name = "self" if text is None else "cross"
        self._hidden = hidden_BNd.detach().requires_grad_()
        self._text = text
        self._heads: Heads | None = None
        self._edges: list[GradientEdge | None] = []
        if kept is None:
            self._heads = self._compute_heads()
            with torch.no_grad():
                kept = owner.how.attended(owner.block, self._heads, self._inputs())
        self._attended = kept
        self._leaf = kept.output.detach().requires_grad_()

    def output(self) -> Tensor:
        """The hidden states after this attention. Called once, before `backward`."""
        with self._owner.random.again(f"{self._name} branch"), self._owner.context():
            branch = self._compute_branch()
        # The edge keeps the graph, and the result is freed.
        self._edge, self._branch_dtype = get_gradient_edge(branch), branch.dtype
        return self._hidden.detach() + branch.detach()

    def backward(self, grad_BNd: Tensor) -> None:
        """Turns `grad_BNd`, the gradient of the hidden states after this attention, into that of
        those before it."""
        owner = self._owner
        torch.autograd.backward([self._edge], [grad_BNd.to(self._branch_dtype)])
        del self._edge
        grad_attended = self._leaf.grad
        assert grad_attended is not None
        self._leaf.grad = None
        heads = self._heads or self._compute_heads()
        self._heads = None
        with torch.no_grad():
            gradients = owner.how.attention_backward(
                owner.block, heads, self._attended, grad_attended, self._inputs()
            )
        del grad_attended, self._attended, self._leaf, heads
        roots = [g for g, edge in zip(gradients, self._edges, strict=True) if edge is not None]
        edges = [edge for edge in self._edges if edge is not None]
        del gradients, self._edges
        if self._text is not None and owner.sums.text is not None:
            # The sum of the blocks behind this one comes first, as in autograd's sum over blocks.
            edges.append(get_gradient_edge(self._text))
            roots.append(owner.sums.text)
        torch.autograd.backward(edges, roots)
        if self._hidden.grad is not None:
            grad_BNd += self._hidden.grad

    def _compute_heads(self) -> Heads:
        """What attention computes with. The edges keep its graph, and not the tensors."""
        heads = self._recorded_heads()
        # Without trained layers, keys and values of the text have no graph.
        self._edges = [get_gradient_edge(h) if h.requires_grad else None for h in heads.tensors]
        with torch.no_grad():
            return of_all_tokens(_detached(heads), self._inputs())

    def _recorded_heads(self) -> Heads:
        owner, parts = self._owner, self._owner.how.parts
        again = not parts.is_compiled
        with owner.random.again(f"{self._name} heads"), owner.context():
            if self._text is None:
                return parts.self_attention_heads(
                    owner.block, self._hidden, owner.part, owner.inputs, recompute=again
                )
            return parts.cross_attention_heads(
                owner.block, self._hidden, self._text, recompute=again
            )

    def _compute_branch(self) -> Tensor:
        owner, parts = self._owner, self._owner.how.parts
        again, dtype = not parts.is_compiled, self._attended.dtype
        if self._text is None:
            return parts.self_attention_branch(
                owner.block,
                self._leaf,
                dtype,
                owner.part,
                owner.inputs.groups,
                recompute=again,
            )
        return parts.cross_attention_branch(owner.block, self._leaf, dtype, recompute=again)

    def _inputs(self) -> BlockInputs | None:
        return self._owner.inputs if self._text is None else None


def _detached(heads: Heads) -> Heads:
    q, k, v = (head.detach() for head in heads.tensors)
    return Heads(q, k, v, heads.output_dtype)


def _add_into(branch_BNd: Tensor, hidden_BNd: Tensor) -> Tensor:
    """The sum of both, in the memory of `branch_BNd` if it has the type of the sum."""
    if branch_BNd.dtype == hidden_BNd.dtype:
        return branch_BNd.add_(hidden_BNd)
    return hidden_BNd + branch_BNd


@cache
def _pytorch_choice(device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionBackend:
    return default_backend(device, dtype, head_dim)


def _leaf(tensor: Tensor, gradient: Tensor | None = None) -> Tensor:
    """`tensor` as the leaf of a new graph, whose gradient continues `gradient`."""
    leaf = tensor.detach().requires_grad_(tensor.requires_grad)
    if tensor.requires_grad:
        leaf.grad = gradient
    return leaf
