"""`JointOptimizer`: one library optimizer over all weights of a trainable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from onewan.config.optimizer import Optimizer
from onewan.devices import copy_
from onewan.train.optimizers.library import (
    LibraryOptimizer,
    StateAfterAStep,
    library_optimizer,
)
from onewan.train.optimizers.parameters import (
    ManagedParameter,
    ManagedParameters,
    ParameterGroup,
    library_group,
)
from onewan.train.sharding import Sharding


class JointOptimizer:
    """A `TrainableOptimizer` (see there for its methods) that updates all weights in one call.

    Any optimizer and any dtype of weights; weights in bfloat16 are updated in bfloat16.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        choice: Optimizer,
        trainable: str,
        sharding: Sharding | None = None,
    ) -> None:
        library_groups = [library_group(g.parameters, g.lr, trainable) for g in groups]
        self._library = library_optimizer(library_groups, choice)
        parameters = [p for group in groups for p in group.parameters]
        names = [name for group in groups for name in group.names]
        bookkeeping = self._library.bookkeeping(parameters)
        self.parameters = ManagedParameters(
            [
                ManagedParameter(
                    name=name,
                    parameter=parameter,
                    optimized=entry.tensor,
                    library=self._library,
                    holder=entry.holder,
                    group=entry.group,
                )
                for name, parameter, entry in zip(names, parameters, bookkeeping, strict=True)
            ],
            StateAfterAStep(choice, library_group([], groups[0].lr, trainable)),
            sharding,
        )
        self._host_copies_are_stale = True
        """True until the first step after building or loading: between the two, the weights
        themselves may have been read from a file."""

    @property
    def lr(self) -> float:
        return self.parameters.lr

    @property
    def trained_parameters(self) -> list[nn.Parameter]:
        return [managed.parameter for managed in self.parameters]

    def set_full_lr(self, rates: Mapping[str, float]) -> None:
        self.parameters.set_full_lr(rates)

    def begin_step(self, number: int, lr_factor: float) -> _JointStep:
        del number  # nothing here is random
        self.parameters.set_lr_factor(lr_factor)
        if self._host_copies_are_stale:
            self._library.refresh_host_copies()
            self._host_copies_are_stale = False
        return _JointStep(self._library, self.parameters)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        if not self._library.schedule_free:
            yield
            return
        with self.parameters.restored_afterwards():
            # The optimizer's averages replace the weights; `restored_afterwards` restores these.
            tensors = [m.parameter for m in self.parameters]
            with torch.no_grad():
                averages = self._library.averages(tensors, [t.dtype for t in tensors])
                for parameter, average in zip(tensors, averages, strict=True):
                    copy_(parameter, average)
            yield

    def to(self, device: torch.device) -> None:
        self.parameters.to(device)

    def state_dict(self) -> dict[str, Any]:
        return self.parameters.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.parameters.load_state_dict(saved)
        self._host_copies_are_stale = True


class _JointStep:
    """One step, from before the backward pass to the update."""

    def __init__(self, library: LibraryOptimizer, parameters: ManagedParameters) -> None:
        self._library = library
        self._parameters = parameters
        self._is_applied = False

    def clip_grad_norm(self, max_norm: float | None) -> Tensor:
        norm = self._parameters.clip_grad_norm(max_norm)
        if max_norm is not None:
            # torchao's hooks have copied the gradients before they were clipped.
            self._library.clip_on_host()
        return norm

    def apply(self) -> None:
        if self._is_applied:
            raise RuntimeError("this step has been applied; begin_step() gives the next one")
        self._is_applied = True  # before the update: one that failed halfway must not be repeated
        self._library.optimizer.step()
        self._parameters.drop_gradients()
