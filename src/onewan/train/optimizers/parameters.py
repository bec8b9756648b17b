"""The parameters of a trainable, with their optimizer state.

A state has an entry for each parameter's name: the optimizer's state of the parameter, and the
entries of its group that have changed since the group was built. So the settings of a resumed run
are those of its run file, and a state can be loaded with or without the fused step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onewan.devices import is_accelerator, is_host, moved
from onewan.memory.host_copies import HostCopies
from onewan.train.optimizers.library import (
    LibraryOptimizer,
    estimated_lr,
    is_paged,
    on_device,
    set_lr,
    with_tensors,
)
from onewan.train.optimizers.saved_entries import BASE_LR, NOT_SAVED, check_entry, check_state
from onewan.train.sharding import Sharding

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroup:
    """Parameters that share a learning rate."""

    names: tuple[str, ...]
    """One for each parameter, different from all others of the same optimizer. States use them."""
    parameters: tuple[nn.Parameter, ...]
    lr: float
    """The full learning rate; each step multiplies it by the schedule's factor."""


def library_group(parameters: Sequence[nn.Parameter], lr: float, trainable: str) -> dict[str, Any]:
    """A parameter group as torch's optimizers take it, for the trainable of that name."""
    own = {"embeddings": True} if trainable == "embeddings" else {}
    return {"params": list(parameters), "lr": lr, BASE_LR: lr, **own}


@dataclass(slots=True, kw_only=True)
class ManagedParameter:
    """One parameter and the optimizer that updates it."""

    name: str
    parameter: nn.Parameter
    optimized: Tensor
    """The tensor that the optimizer updates: the parameter itself, a copy of it in host memory, or
    a float32 stand-in that has values only during the update."""
    library: LibraryOptimizer
    holder: torch.optim.Optimizer
    """The optimizer whose `state` has an entry for `optimized`."""
    group: dict[str, Any]
    """The parameter group of `optimized`."""
    residual: Tensor | None = None
    """The rounding error of the weight (Kahan summation), in the weight's dtype."""
    is_stand_in: bool = False
    """Whether `optimized` is a float32 stand-in."""
    is_streamed: bool = False
    """Whether the parameter and its state are in host memory, except while it is updated."""

    @property
    def is_on_host(self) -> bool:
        """Whether `optimized` is a copy in host memory."""
        return self.optimized is not self.parameter and not self.is_stand_in

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state of the parameter; empty before the first step."""
        return self.holder.state.get(self.optimized, {})

    def put_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Replace the optimizer's state of the parameter with copies of `state`."""
        if not state:
            self.holder.state.pop(self.optimized, None)
            return
        self.holder.state[self.optimized] = {
            key: self.library.state_entry_on(device, self.group, key, value, copy=True)
            for key, value in state.items()
        }


class ManagedParameters:
    """All parameters of one trainable: their learning rates, their norm, and their state."""

    def __init__(
        self,
        managed: Sequence[ManagedParameter],
        expected: Callable[[Tensor], Mapping[str, Sequence[Any]]],
        sharding: Sharding | None = None,
    ) -> None:
        """`expected` returns what each entry of the optimizer's state of a tensor may be after a
        step, to check saved states; nothing where that is not known. `sharding` is None if the
        parameters are whole weights."""
        self._managed = list(managed)
        self._expected, self._sharding = expected, sharding
        # By identity: parameters share groups, and dictionaries can't be hashed.
        self._groups = {id(m.group): m.group for m in self._managed}
        self._initial = {key: _hyperparameters(group) for key, group in self._groups.items()}
        """The groups as they were built, to know what has changed since."""
        self._lr_factor = 1.0
        self._copies = HostCopies[tuple[str, int]]()
        """The state while it is not on the device."""
        self._originals = HostCopies[str]()
        """The parameters while others take their place."""

    def __iter__(self) -> Iterator[ManagedParameter]:
        return iter(self._managed)

    @property
    def lr(self) -> float:
        """The first group's learning rate at this step, times an optimizer's own estimate of it."""
        # The first group is that of most weights: LoRA+ puts the others after it.
        group = self._managed[0].group
        return group[BASE_LR] * self._lr_factor * estimated_lr(group)

    def set_full_lr(self, rates: Mapping[str, float]) -> None:
        """Give each parameter's group the full rate in `rates`, by the parameter's name. The next
        step uses it."""
        for managed in self._managed:
            managed.group[BASE_LR] = rates[managed.name]

    def set_lr_factor(self, factor: float) -> None:
        """Set the learning rate of each group to its full rate times `factor`."""
        self._lr_factor = factor
        for group in self._groups.values():
            set_lr(group, group[BASE_LR] * factor)

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float | None) -> Tensor:
        """Scale the gradients so that the norm of all together is at most `max_norm`.

        Returns the norm before, 0-d float32. None for `max_norm` leaves the gradients as they are.
        """
        found = [(m.name, m.parameter.grad) for m in self._managed]
        # The norm of norms equals the norm of all elements, and each can be computed in float32.
        norms = {name: norm_of(gradient) for name, gradient in found if gradient is not None}
        if self._sharding is None:
            norm = nn.utils.get_total_norm(list(norms.values()))
        else:
            norm = self._sharding.total_norm(list(norms), list(norms.values()))
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_([m.parameter for m in self._managed], max_norm, norm)
        return norm

    def drop_gradients(self) -> None:
        for managed in self._managed:
            managed.parameter.grad = None

    @contextmanager
    def restored_afterwards(self) -> Iterator[None]:
        """Restore the parameters, bit-exact, after the block; their copies are in host memory."""
        parameters = {managed.name: managed.parameter for managed in self._managed}
        self._originals.store(parameters)
        try:
            yield
        finally:
            self._originals.load(parameters)

    def to(self, device: torch.device) -> None:
        """Move the optimizer's state and the residuals, not the parameters, to `device`. Copies to
        host memory may still be under way when it returns."""
        copies = self._host_copies() if is_host(device) else {}
        for managed in self._managed:
            if managed.is_on_host or managed.is_streamed:
                continue
            if managed.residual is not None:
                managed.residual = moved(_replaced(managed.residual, copies), device)
            state = managed.state
            for key, value in state.items():
                state[key] = managed.library.state_entry_on(
                    device, managed.group, key, _replaced(value, copies), copy=False
                )

    def _host_copies(self) -> dict[int, tuple[Tensor, Tensor]]:
        """(tensor, its copy in pinned host memory) of every tensor of the state and the residuals
        that is on a device, by the tensor's id. The copies are under way."""
        found: dict[tuple[str, int], Tensor] = {}
        for managed in self._managed:
            tensors: list[Tensor] = []
            kept = [value for value in managed.state.values() if not is_paged(value)]
            with_tensors([*kept, managed.residual], lambda t, seen=tensors: seen.append(t) or t)
            found |= {
                (managed.name, number): tensor
                for number, tensor in enumerate(tensors)
                if is_accelerator(tensor.device)
            }
        copies = self._copies.store(found)
        return {id(tensor): (tensor, copies[key]) for key, tensor in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """Copies in host memory, in plain containers that `torch.load(weights_only=True)` reads.
        What streamed weights have in host memory anyway is not copied, and changes in the next
        step."""
        copies = self._host_copies()
        self._copies.wait()  # once, where each blocking copy would wait
        return {
            managed.name: {
                "shape": list(managed.parameter.shape),
                "state": _to_save(_replaced(managed.state, copies), managed),
                "group": on_device(self._changed_hyperparameters(managed.group), _CPU, copy=True),
                "rest": _to_save(_replaced(managed.residual, copies), managed),
            }
            for managed in self._managed
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from `saved`, bit-exact; call it after the parameters themselves are loaded.

        ValueError, which names the field, if it is the state of other parameters or of another
        optimizer, or no state of an optimizer at all. A residual (Kahan summation) that `saved`
        does not have starts at 0; one that this run has no use for is dropped.
        """
        own = {managed.name: managed for managed in self._managed}
        # All checks come first, so that an error leaves the optimizer as it was.
        _check_fit(saved, own, self._expected)
        # Groups are reset to their initial entries: a saved state has changed entries only, and
        # counters of earlier steps must not remain.
        for key, group in self._groups.items():
            for entry in group.keys() - NOT_SAVED - self._initial[key].keys():
                del group[entry]
            group.update(on_device(self._initial[key], None, copy=True))
        for name, managed in own.items():
            entry = saved[name]
            in_host = managed.is_on_host or managed.is_streamed
            device = _CPU if in_host else managed.parameter.device
            # Parameters of one group save the same entries, so writing them repeatedly is harmless.
            managed.group.update(on_device(entry["group"], device, copy=True))
            managed.put_state(entry["state"], device)
            if managed.residual is not None and entry["rest"] is not None:
                managed.residual.copy_(entry["rest"])

    def _changed_hyperparameters(self, group: dict[str, Any]) -> dict[str, Any]:
        """Entries of `group` that have changed since it was built, such as counters."""
        initial = self._initial[id(group)]
        return {
            key: value
            for key, value in group.items()
            if key not in NOT_SAVED
            # Tensors are always saved: comparing them would wait for the device.
            and (key not in initial or isinstance(value, Tensor) or value != initial[key])
        }


def _to_save(value: Any, managed: ManagedParameter) -> Any:
    """`value` in host memory: copies, or for a streamed weight the tensors that are there."""
    if not managed.is_streamed:
        return on_device(value, _CPU, copy=True)
    return with_tensors(value, _with_own_storage)


def _with_own_storage(tensor: Tensor) -> Tensor:
    """The same memory with a storage of its own, as `torch.save` needs it: it writes the whole
    storage of a tensor, and refuses those that hold several types."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return torch.from_numpy(content.numpy()).view(tensor.dtype).reshape(tensor.shape)


def _replaced(value: Any, copies: Mapping[int, tuple[Tensor, Tensor]]) -> Any:
    """`value` with the copies of those tensors in it that have one."""

    def copy_of(tensor: Tensor) -> Tensor:
        found = copies.get(id(tensor))
        return tensor if found is None else found[1]

    # Entries without tensors, and those that the library moves itself, stay the same objects.
    return with_tensors(value, copy_of) if copies and not is_paged(value) else value


def norm_of(gradient: Tensor) -> Tensor:
    """The 2-norm, 0-d float32; accumulated in float32, since bfloat16 would lose most digits."""
    return torch.linalg.vector_norm(gradient, dtype=torch.float32)


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    saved = {key: value for key, value in group.items() if key not in NOT_SAVED}
    return on_device(saved, None, copy=True)


def _check_fit(
    saved: Mapping[Any, Any],
    own: Mapping[str, ManagedParameter],
    expected: Callable[[Tensor], Mapping[str, Sequence[Any]]],
) -> None:
    """ValueError, which names the field, if `saved` is not a state of the parameters `own`."""
    if saved.keys() != own.keys():
        unmatched = sorted(map(str, saved.keys() ^ own.keys()))
        side = "the state" if unmatched[0] in saved else "this run"
        raise ValueError(f"the state is of other weights: {unmatched[0]} is only in {side}")
    for name, managed in own.items():
        check_entry(name, saved[name], managed.parameter, managed.group)
        if saved[name]["state"]:  # none before the first step, or for a weight without gradients
            check_state(name, saved[name]["state"], expected(managed.optimized))
