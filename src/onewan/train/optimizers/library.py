"""`LibraryOptimizer`: what differs between the optimizer libraries, behind one interface.

Only this module uses private attributes and special conventions of PyTorch, bitsandbytes, torchao,
schedulefree and Prodigy; `onewan.train.optimizers.builders` knows the arguments of their classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from onewan.config.optimizer import (
    AdamW8bitOptimizer,
    AdamWLowBitOptimizer,
    AdamWOffloadOptimizer,
    CustomOptimizer,
    Optimizer,
)
from onewan.devices import is_host, moved, synchronize
from onewan.memory.host_copies import HostCopies
from onewan.train.optimizers.builders import Groups, build_optimizer, is_schedule_free


@dataclass(frozen=True, slots=True, kw_only=True)
class Bookkeeping:
    """Where an optimizer keeps what belongs to one parameter."""

    tensor: Tensor
    """The tensor that the optimizer updates: the parameter, or a copy of it in host memory."""
    holder: torch.optim.Optimizer
    """The optimizer whose `state` has an entry for `tensor`."""
    group: dict[str, Any]
    """The parameter group that `tensor` is in."""


class LibraryOptimizer:
    """An optimizer that keeps to PyTorch's conventions; subclasses are for those that do not."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, schedule_free: bool) -> None:
        self.optimizer = optimizer
        self.schedule_free = schedule_free
        """Whether the weights to validate and export are an average, other than those trained."""
        self._averages = HostCopies[int]()

    def bookkeeping(self, parameters: Sequence[nn.Parameter]) -> list[Bookkeeping]:
        """Where the optimizer keeps the state and the group of each of `parameters`."""
        host_copies = self._host_copies()
        found = {
            id(tensor): Bookkeeping(tensor=tensor, holder=holder, group=group)
            for holder in self._holders()
            for group in holder.param_groups
            for tensor in group["params"]
        }
        # By identity, since `==` of tensors compares their elements.
        return [found[id(host_copies.get(p, p))] for p in parameters]

    def state_entry_on(
        self, device: torch.device, group: dict[str, Any], key: str, value: Any, *, copy: bool
    ) -> Any:
        """Entry `key` of a parameter's state on `device`, unless it belongs in host memory.

        With `copy` the result shares no memory with `value`.
        """
        if is_paged(value):
            return value
        if key == "step" and not (group.get("fused") or group.get("capturable")):
            # PyTorch keeps the step count on the CPU then, to read it without waiting for the GPU.
            device = torch.device("cpu")
        return on_device(value, device, copy=copy)

    def refresh_host_copies(self) -> None:
        """Copy the parameters into their copies in host memory; most optimizers have none."""

    def clip_on_host(self) -> None:
        """Copy clipped gradients to host memory, if the optimizer has copied them there
        before they were clipped."""

    def averages(self, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """A schedule-free optimizer's averages of `tensors`, in host memory and in `dtypes`; from a
        device their copies are queued, and the next call reuses their memory.

        `tensors` are left within rounding of their values, not bit-exact: the libraries interpolate
        in place and back. The copies are in host memory because a second set of weights may not
        fit on the device.
        """
        optimizer: Any = self.optimizer  # `eval` and `train` are not in torch's base class
        optimizer.eval()
        rounded = [t.detach().to(dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
        found = self._averages.store(dict(enumerate(rounded)))
        optimizer.train()
        return list(found.values())

    def _holders(self) -> list[torch.optim.Optimizer]:
        """The optimizers that have parameter groups and state."""
        return [self.optimizer]

    def _host_copies(self) -> dict[Tensor, Tensor]:
        """Copies in host memory that the optimizer updates instead of the parameters, by these."""
        return {}


class _PagedOptimizer(LibraryOptimizer):
    """bitsandbytes' optimizers with `is_paged`: the GPU driver moves their state as needed."""

    def state_entry_on(
        self, device: torch.device, group: dict[str, Any], key: str, value: Any, *, copy: bool
    ) -> Any:
        is_loaded_moment = key in {"state1", "state2"} and not is_paged(value)
        if is_host(device) or not is_loaded_moment:
            return super().state_entry_on(device, group, key, value, copy=copy)
        optimizer: Any = self.optimizer
        # The library reads shape and device alone, so the argument needs no memory of that size.
        like = torch.zeros((), device=device).expand(value.shape)
        return optimizer.get_state_buffer(like, dtype=value.dtype).copy_(value)


class _OffloadedOptimizer(LibraryOptimizer):
    """torchao's CPUOffloadOptimizer: an AdamW on the CPU for each large weight, and one on the GPU
    for all small weights. Its hooks copy gradients to host memory in the backward pass."""

    def refresh_host_copies(self) -> None:
        for parameter, host_copy in self._host_copies().items():
            host_copy.data.copy_(parameter.data)

    def clip_on_host(self) -> None:
        copies = {p: c for p, c in self._host_copies().items() if p.grad is not None}
        for device in {parameter.device for parameter in copies}:
            # The hooks' copies may be under way.
            synchronize(device)
        for parameter, host_copy in copies.items():
            assert parameter.grad is not None and host_copy.grad is not None
            host_copy.grad.copy_(parameter.grad)

    def _holders(self) -> list[torch.optim.Optimizer]:
        optimizer: Any = self.optimizer
        found = (*optimizer.optim_dict.values(), optimizer.d_opt)
        return [holder for holder in found if holder is not None]

    def _host_copies(self) -> dict[Tensor, Tensor]:
        optimizer: Any = self.optimizer
        return optimizer.param_d2h_map


def library_optimizer(groups: Groups, choice: Optimizer) -> LibraryOptimizer:
    """What `build_optimizer` returns, behind this module's interface; raises what that raises."""
    wrapper = LibraryOptimizer
    if isinstance(choice, AdamW8bitOptimizer) and choice.paged:
        wrapper = _PagedOptimizer
    elif isinstance(choice, AdamWOffloadOptimizer):
        wrapper = _OffloadedOptimizer
    return wrapper(build_optimizer(groups, choice), schedule_free=is_schedule_free(choice))


class StateAfterAStep:
    """What an optimizer's state of a weight has after a step: keys, types, shapes and dtypes.

    Libraries do not say it, and it changes with their versions and with the weight (large matrices
    are factored or quantized), so an optimizer of the same choice takes a step over a weight of
    the same shape. Weights that are alike share the answer.
    """

    def __init__(self, choice: Optimizer, trainable_group: dict[str, Any]) -> None:
        self._choice = choice
        self._group = trainable_group
        self._known: dict[tuple[Any, ...], dict[str, tuple[Any, Any]]] = {}

    def __call__(self, weight: Tensor) -> Mapping[str, tuple[Any, Any]]:
        """What each entry of the state of `weight` may be, as tensors without memory.

        Two alternatives, since Prodigy has the initial weight, or a single 0 for one of zeros.
        Empty where it is not known: for optimizers that need a backward pass, or are not ours.
        """
        if isinstance(self._choice, (AdamWOffloadOptimizer, CustomOptimizer)):
            return {}
        key = (weight.shape, weight.dtype, weight.device)
        if key not in self._known:
            of_zeros, of_ones = self._state(weight, 0.0), self._state(weight, 1.0)
            self._known[key] = {name: (of_zeros[name], of_ones[name]) for name in of_ones}
        return self._known[key]

    def _state(self, weight: Tensor, value: float) -> dict[str, Any]:
        """The state after a step of a weight whose elements all are `value`."""
        parameter = nn.Parameter(
            torch.full(weight.shape, value, dtype=weight.dtype, device=weight.device)
        )
        parameter.grad = torch.ones_like(parameter)
        library = library_optimizer([{**self._group, "params": [parameter]}], self._choice)
        if isinstance(self._choice, AdamWLowBitOptimizer):
            # It compiles its step, which takes half a minute.
            with torch.compiler.set_stance("force_eager"):
                library.optimizer.step()
        else:
            library.optimizer.step()
        (entry,) = library.bookkeeping([parameter])
        return on_device(entry.holder.state.get(entry.tensor, {}), torch.device("meta"), copy=False)


def is_paged(value: Any) -> bool:
    """Whether a value of a state is one that bitsandbytes moves to and from the GPU itself."""
    return hasattr(value, "is_paged")


def set_lr(group: dict[str, Any], lr: float) -> None:
    """Set the learning rate of a parameter group."""
    if isinstance(group["lr"], Tensor):
        # torchao compiles its step; a rate in a tensor can change without compiling it again.
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def estimated_lr(group: dict[str, Any]) -> float:
    """The learning rate that Prodigy or D-Adaptation has estimated; 1 for other optimizers.

    The optimizer multiplies its own `lr` with it.
    """
    return group.get("d", 1.0)


def on_device(value: Any, device: torch.device | None, *, copy: bool) -> Any:
    """`value` with all tensors in it on `device` (None: where each is), at any depth.

    Dtypes do not change, where PyTorch's `Optimizer.load_state_dict` would cast floating-point
    state to the dtype of the weight, and so round the float32 state of bfloat16 weights. Copies to
    the host are complete when it returns, those to a device are queued there.
    """

    def moved_one(tensor: Tensor) -> Tensor:
        to = tensor.device if device is None else device
        if is_host(to):
            return tensor.detach().to(to, copy=copy)
        return moved(tensor.detach(), to, copy=copy)

    return with_tensors(value, moved_one)


def with_tensors(value: Any, replace: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `replace` of each tensor in it, at any depth."""
    if isinstance(value, Tensor):
        if is_traceable_wrapper_subclass(value):
            # torchao's quantized state can't be cloned as a whole; its inner tensors can.
            inner, context = value.__tensor_flatten__()
            tensors = {name: with_tensors(getattr(value, name), replace) for name in inner}
            return type(value).__tensor_unflatten__(tensors, context, value.size(), value.stride())
        return replace(value)
    if isinstance(value, dict):
        return {key: with_tensors(entry, replace) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(with_tensors(entry, replace) for entry in value)
    return value
