"""`BlockUpdates`: full fine-tuning of streamed blocks, each updated behind its backward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from onewan.train.optimizers.parameters import ManagedParameter
from onewan.train.optimizers.per_weight import PerWeightOptimizer


class BlockUpdates:
    """The `BlockTraining` of the blocks of one transformer, by a fused `PerWeightOptimizer`.

    Weights of `blocks` that the optimizer does not have stay as they are.
    """

    def __init__(
        self,
        optimizer: PerWeightOptimizer,
        blocks: Sequence[nn.Module],
        device: torch.device,
        settle: Callable[[], None],
    ) -> None:
        """`device` is where updates are computed; `settle` returns when host memory has the present
        weights and states (`BlockStream.settle`)."""
        trained = {id(managed.parameter) for managed in optimizer.parameters}
        self._optimizer = optimizer
        self._device = device
        self._blocks = [
            optimizer.stream([p for p in block.parameters() if id(p) in trained], settle)
            for block in blocks
        ]

    def state(self, index: int) -> list[Tensor]:
        """Moments, averages and rounding errors of the block's weights, without what weights share
        (tables of quantized states), and without counters, which are where the optimizer wants
        them."""
        tensors = [tensor for m in self._blocks[index] for tensor in _tensors_of(m)]
        uses = Counter(map(id, tensors))
        return [t for t in tensors if t.numel() > 1 and uses[id(t)] == 1]

    def update(self, index: int) -> None:
        for managed in self._blocks[index]:
            self._place_counters(managed)
            self._optimizer.update_streamed(managed)

    def _place_counters(self, managed: ManagedParameter) -> None:
        """Move counters where the optimizer wants them: a loaded state is in host memory."""
        state = managed.state
        for key, value in state.items():
            if isinstance(value, Tensor) and value.numel() == 1:
                state[key] = managed.library.state_entry_on(
                    self._device, managed.group, key, value, copy=False
                )


def _tensors_of(managed: ManagedParameter) -> Iterator[Tensor]:
    if managed.residual is not None:
        yield managed.residual
    for value in managed.state.values():
        yield from _plain_tensors(value)


def _plain_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors that `value` consists of: itself, or the parts of a quantized one. Those that the
    driver moves (`is_paged`) are left to it."""
    if not isinstance(value, Tensor) or hasattr(value, "is_paged"):
        return
    if is_traceable_wrapper_subclass(value):
        names, _ = value.__tensor_flatten__()
        for name in names:
            yield from _plain_tensors(getattr(value, name))
    else:
        yield value
