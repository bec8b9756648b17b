"""`GradientSums`: the gradients of a whole step, from those of the processes that share it.

The loss is weighted by clip over the whole step, and a process has the gradients of its own clips
and tokens, so that their sum is what one process computes. Gradients of a block are sent as soon as
the last backward pass of the step has completed them, while it computes those of the blocks before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from onewan.parallel.sums import Sums


class GradientSums:
    """Adds up the gradients of `parameters` over the processes of `sums`, block after block from
    the last to the first one, and then those outside of the blocks. Each process sends in this
    order, whatever the order in which its gradients are complete."""

    def __init__(
        self, sums: Sums, parameters: Sequence[nn.Parameter], blocks: Iterable[nn.Module]
    ) -> None:
        """`parameters`, of which some are in `blocks`, are the same ones on all processes."""
        self._sums = sums
        outside = {id(parameter): parameter for parameter in parameters}
        self._blocks = [
            [outside.pop(id(p)) for p in block.parameters() if id(p) in outside] for block in blocks
        ]
        self._outside = list(outside.values())
        self._next = len(self._blocks) - 1
        """The block whose gradients are sent next."""
        self._complete = set[int]()
        self._sent = list[nn.Parameter]()
        self._missing = list[tuple[int, Tensor]]()
        """(index in `_sent`, zeros) of each parameter without a gradient on this process."""

    def complete(self, index: int) -> None:
        """The gradients of block `index` are complete on this process."""
        self._complete.add(index)
        while self._next in self._complete:
            self._send_next()

    def finish(self) -> None:
        """All gradients are complete: make them those of the whole step."""
        while self._next >= 0:
            self._send_next()
        self._send(self._outside)
        if not self._sent:
            return
        # A parameter without a gradient on any process, such as a placeholder that no caption has,
        # must stay without one: an optimizer treats a gradient of zeros differently.
        missing = {index for index, _ in self._missing}
        counts = torch.tensor([float(index not in missing) for index in range(len(self._sent))])
        counts = counts.to(self._sent[-1].device)
        self._sums.send([counts])
        self._sums.finish()
        if not missing:
            return  # and nothing waits for the device
        elsewhere = counts.tolist()
        for index, gradient in self._missing:
            if elsewhere[index]:
                self._sent[index].grad = gradient

    def _send_next(self) -> None:
        self._send(self._blocks[self._next])
        self._next -= 1

    def _send(self, parameters: Sequence[nn.Parameter]) -> None:
        gradients = list[Tensor]()
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is None:
                gradient = torch.zeros_like(parameter, requires_grad=False)
                self._missing.append((len(self._sent), gradient))
            self._sent.append(parameter)
            gradients.append(gradient)
        self._sums.send(gradients)
