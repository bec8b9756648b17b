"""Runs the blocks of a transformer through a `BlockStream`, each as one checkpointed function."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onewan.memory.streaming import BlockStream, Pass


def stream_blocks(transformer: Any, stream: BlockStream) -> None:
    """Make the blocks of `transformer` use `stream`: without gradients as one pass of several, with
    gradients as the forward pass of a training step."""
    for index, block in enumerate(transformer.blocks):
        block.forward = _StreamedBlock(stream, index, block)


def assert_missing_call_is_caught(
    monkeypatch: pytest.MonkeyPatch,
    exercise: Callable[[], tuple[list[Tensor], list[str]]],
    owner: Any,
    method: str,
    caller: str,
) -> None:
    """`exercise` returns results and reports of the sanitizer. It has none, and without the calls
    of `owner`'s `method` in `caller` it has some, or other results, or fails."""
    expected, problems = exercise()
    assert problems == []
    skipped = _without(monkeypatch, owner, method, caller)
    try:
        result, problems = exercise()
    except RuntimeError as error:  # NaN may be refused before the end
        result, problems = [], [str(error)]
    assert skipped, f"{caller} never calls {method}"
    assert problems or not all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def _without(monkeypatch: pytest.MonkeyPatch, owner: Any, method: str, caller: str) -> list[int]:
    """Make `method` do nothing where `caller` calls it; the list counts how often."""
    plain: Callable[..., Any] = getattr(owner, method)
    skipped: list[int] = []

    def replaced(self: Any, *given: Any) -> Any:
        if sys._getframe(1).f_code.co_name == caller:
            skipped.append(1)
            return None
        return plain(self, *given)

    monkeypatch.setattr(owner, method, replaced)
    return skipped


class _StreamedBlock:
    def __init__(self, stream: BlockStream, index: int, block: nn.Module) -> None:
        self.stream = stream
        self.index = index
        self.block = block
        self.plain = block.forward

    def __call__(self, *inputs: Any) -> Tensor:
        if torch.is_grad_enabled():
            # A gradient is always asked for, so that the backward pass reaches every block.
            anchor = torch.zeros((), requires_grad=True)
            return _Checkpointed.apply(self, anchor, *inputs)  # pyright: ignore[reportReturnType]
        return self.run(Pass.INFERENCE, *inputs)

    def run(self, current: Pass, *inputs: Any) -> Tensor:
        self.stream.use(self.index)
        result = self.plain(*inputs)
        self.stream.done(self.index, current)
        return result


class _Checkpointed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: _StreamedBlock, anchor: Tensor, *inputs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        del anchor
        ctx.block, ctx.inputs = block, inputs
        device = block.stream.device.type
        ctx.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return block.run(Pass.TRAIN_FORWARD, *inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        block: _StreamedBlock = ctx.block
        wanted = ctx.needs_input_grad[2:]
        inputs = [
            i.detach().requires_grad_(True) if needed else i
            for i, needed in zip(ctx.inputs, wanted, strict=True)
        ]
        block.stream.use(block.index)
        enabled, dtype = ctx.autocast
        # Without a cache of converted weights, which would keep those of other blocks.
        device = block.stream.device.type
        with (
            torch.enable_grad(),
            torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False),
        ):
            result = block.plain(*inputs)
        torch.autograd.backward(result, gradient)
        del result
        block.stream.done(block.index, Pass.BACKWARD)
        grads = [i.grad if needed else None for i, needed in zip(inputs, wanted, strict=True)]
        return (None, None, *grads)
