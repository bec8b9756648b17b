"""`PerWeightOptimizer`: a library optimizer of its own for each weight.

Two features need it. With rounding, a bfloat16 weight is updated in float32 through a stand-in that
exists only during its own update, so that the whole model never needs float32 memory. With the
fused step, a weight is updated in the backward pass as soon as its gradient is complete, so that
all gradients never exist together. The results are bit-exact the same as with one optimizer
over all weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from onewan.config.optimizer import Optimizer
from onewan.devices import copy_
from onewan.seeds import derive_seed
from onewan.train.optimizers.library import StateAfterAStep, library_optimizer
from onewan.train.optimizers.parameters import (
    ManagedParameter,
    ManagedParameters,
    ParameterGroup,
    library_group,
    norm_of,
)
from onewan.train.rounding import Rounding, is_half, round_with_residual, stochastic_round_
from onewan.train.sharding import Sharding


class PerWeightOptimizer:
    """A `TrainableOptimizer` (see there for its methods and arguments) that updates each weight
    separately. Not for optimizers that need all weights at once."""

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        choice: Optimizer,
        trainable: str,
        *,
        rounding: Rounding,
        fused: bool,
        seed: int,
        sharding: Sharding | None = None,
    ) -> None:
        self._choice, self._trainable = choice, trainable
        self._rounding, self._seed, self._sharding = rounding, seed, sharding
        self.is_fused = fused
        self.parameters = ManagedParameters(
            [
                self._managed(name, parameter, group.lr)
                for group in groups
                for name, parameter in zip(group.names, group.parameters, strict=True)
            ],
            StateAfterAStep(choice, library_group([], groups[0].lr, trainable)),
            sharding,
        )
        self._step: _PerWeightStep | None = None
        """The step that has begun and has not been applied."""
        self._settle: Callable[[], None] = lambda: None
        self._by_name = {managed.name: managed for managed in self.parameters}
        if fused:
            for managed in self.parameters:
                managed.parameter.register_post_accumulate_grad_hook(self._hook(managed))

    @property
    def lr(self) -> float:
        return self.parameters.lr

    def stream(
        self, parameters: Iterable[nn.Parameter], settle: Callable[[], None]
    ) -> list[ManagedParameter]:
        """Leave it to the caller when `parameters` are updated (`update_streamed`), and where they
        and their state are in between: in host memory. For a fused step.

        `settle` is called before they are read there, and returns when their values are present.
        Returns them with their state, in the given order.
        """
        own = {id(managed.parameter): managed for managed in self.parameters}
        self._settle = settle
        chosen = [own[id(p)] for p in parameters]
        for managed in chosen:
            managed.is_streamed = True
        return chosen

    def update_streamed(self, managed: ManagedParameter) -> None:
        """Update a weight of `stream`, whose gradient is complete; weight and state are on the
        device. Nothing happens without a gradient."""
        if managed.parameter.grad is not None:
            self._update_fused(managed)

    @property
    def trained_parameters(self) -> list[nn.Parameter]:
        return [managed.parameter for managed in self.parameters]

    def set_full_lr(self, rates: Mapping[str, float]) -> None:
        self.parameters.set_full_lr(rates)

    def begin_step(self, number: int, lr_factor: float) -> _PerWeightStep:
        self.parameters.set_lr_factor(lr_factor)
        self._step = _PerWeightStep(self, number)
        return self._step

    def end_step(self, step: _PerWeightStep) -> None:
        """Mark `step` as applied; RuntimeError if it is not the one that has begun."""
        if self._step is not step:
            raise RuntimeError("this step has been applied; begin_step() gives the next one")
        self._step = None

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        if not all(m.library.schedule_free for m in self.parameters):
            yield
            return
        self._settle()
        with self.parameters.restored_afterwards():
            self._write_averages()
            yield

    @torch.no_grad()
    def _write_averages(self) -> None:
        for managed in self.parameters:
            with _with_values(managed):
                dtype = managed.parameter.dtype
                (average,) = managed.library.averages([managed.optimized], [dtype])
            # The optimizer has seen the stand-in only, so the weight itself is written here.
            copy_(managed.parameter, average)

    def to(self, device: torch.device) -> None:
        self.parameters.to(device)

    def state_dict(self) -> dict[str, Any]:
        self._settle()
        return self.parameters.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self._settle()
        self.parameters.load_state_dict(saved)

    def _managed(self, name: str, parameter: nn.Parameter, lr: float) -> ManagedParameter:
        """A parameter with an optimizer of its own."""
        rounds = self._rounding != "none" and is_half(parameter)
        optimized = parameter
        if rounds:
            # The library sees a float32 weight, so its moments are float32 too.
            optimized = nn.Parameter(_without_memory(parameter.shape, parameter.device))
        library = library_optimizer([library_group([optimized], lr, self._trainable)], self._choice)
        return ManagedParameter(
            name=name,
            parameter=parameter,
            optimized=optimized,
            library=library,
            holder=library.optimizer,
            group=library.optimizer.param_groups[0],
            residual=torch.zeros_like(parameter) if rounds and self._rounding == "kahan" else None,
            is_stand_in=rounds,
        )

    def _hook(self, managed: ManagedParameter) -> Callable[[Tensor], None]:
        """Called by autograd when the gradient of a fused step's weight is complete."""
        # Weak, since a weight holds its hook where Python's garbage collector does not look: the
        # run's weights would stay in memory after it.
        optimizer, name = weakref.ref(self), managed.name

        def update(parameter: Tensor) -> None:
            del parameter
            own = optimizer()
            if own is not None and not own._by_name[name].is_streamed:
                own._update_fused(own._by_name[name])

        return update

    def _update_fused(self, managed: ManagedParameter) -> None:
        """Update a weight in the backward pass, and drop its gradient."""
        step = self._step
        if step is None:
            raise RuntimeError("begin_step() comes before the backward pass of a fused step")
        if managed.name in step.used_norms:
            raise RuntimeError("a fused step takes one backward pass; this is another")
        assert managed.parameter.grad is not None  # it has just been accumulated
        step.used_norms[managed.name] = norm_of(managed.parameter.grad)
        self.update(managed, step.number)
        managed.parameter.grad = None

    @torch.no_grad()
    def update(self, managed: ManagedParameter, step: int) -> None:
        """One step of one weight, by its gradient."""
        gradient = managed.parameter.grad
        # Without a gradient the optimizer skips the weight but advances its group's counters.
        if not managed.is_stand_in or gradient is None:
            managed.library.optimizer.step()
            return
        with _with_values(managed):
            # Set only now: while the stand-in is without values it may be on another device than
            # the weight, and PyTorch accepts no gradient from another device.
            managed.optimized.grad = gradient.float()
            managed.library.optimizer.step()
            managed.optimized.grad = None  # before rounding, which needs memory of its own
            updated = managed.optimized.detach()
            if managed.residual is not None:
                rounded, residual = round_with_residual(updated, managed.parameter.dtype)
                managed.parameter.copy_(rounded)
                managed.residual.copy_(residual)
            else:
                draws = () if self._sharding is None else self._sharding.draws_of(managed.name)
                key = (self._trainable, managed.name, step, *draws)
                generator = torch.Generator(updated.device).manual_seed(
                    derive_seed(self._seed, "rounding", *key)
                )
                stochastic_round_(managed.parameter.data, updated, generator)


class _PerWeightStep:
    """One step, from before the backward pass to the update."""

    def __init__(self, optimizer: PerWeightOptimizer, number: int) -> None:
        self._optimizer = optimizer
        self.number = number
        self.used_norms: dict[str, Tensor] = {}
        """Norms of the gradients that the fused step has used, by the parameter's name."""

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float | None) -> Tensor:
        parameters = self._optimizer.parameters
        if not self._optimizer.is_fused:
            return parameters.clip_grad_norm(max_norm)
        if max_norm is not None:
            raise ValueError("a fused step can't clip the norm of all gradients")
        names = [m.name for m in parameters if m.name in self.used_norms]
        return nn.utils.get_total_norm([self.used_norms[name] for name in names])

    @torch.no_grad()
    def apply(self) -> None:
        self._optimizer.end_step(self)
        for managed in self._optimizer.parameters:
            # Weights without a gradient are included: the counters in their groups (schedule-free
            # optimizers have some) advance with every step.
            if managed.name not in self.used_norms:
                self._optimizer.update(managed, self.number)
        self._optimizer.parameters.drop_gradients()


def _without_memory(shape: torch.Size, device: torch.device) -> Tensor:
    """Float32 zeros of that shape over a single element; not to be written to."""
    return torch.zeros((), device=device).expand(shape)


@contextmanager
def _with_values(managed: ManagedParameter) -> Iterator[None]:
    """Give a stand-in the weight's values, residual included, for the length of the block."""
    if not managed.is_stand_in:
        yield
        return
    values = managed.parameter.detach().float()
    managed.optimized.data = values if managed.residual is None else values + managed.residual
    try:
        yield
    finally:
        managed.optimized.data = _without_memory(managed.parameter.shape, managed.parameter.device)
