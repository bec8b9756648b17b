"""Checks a parameter's entry in a saved state before any of it is used.

A file that was damaged, or that another program or version wrote, would else end the first step
with an error of the optimizer's library, or change its results silently.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from onewan.devices import is_host

BASE_LR = "base_lr"
"""Entry of a parameter group: its learning rate before the schedule's factor."""
NOT_SAVED = frozenset({"params", "lr", BASE_LR})
"""Entries of a parameter group that follow from the run file and the step."""

_FIELDS = frozenset({"shape", "state", "group", "rest"})
_MAX_DEPTH = 4
"""Of containers within an entry of a state."""
_COUNTERS = frozenset({"step", "k"})
"""What the optimizers call the number of their steps. A negative one makes a step fail, or NaN."""
_MAX_STEPS = 10**12
_MAX_NUMBER = torch.finfo(torch.float32).max


def check_entry(name: str, entry: object, parameter: Tensor, group: Mapping[str, Any]) -> None:
    """ValueError, naming the field, if `entry` is not one of `parameter`, whose group is `group`,
    or has values that are never saved."""
    if not isinstance(entry, dict) or set(cast("dict[Any, Any]", entry)) != _FIELDS:
        raise ValueError(f"{name}: is not an optimizer's entry of a weight")
    fields = cast("dict[str, Any]", entry)
    if fields["shape"] != list(parameter.shape):
        shape = tuple(parameter.shape)
        raise ValueError(f"{name}: the state is of shape {fields['shape']!r:.80}, not {shape}")
    rest = fields["rest"]
    if rest is not None and not _is_alike(rest, parameter.detach()):
        raise ValueError(f"{name}.rest: is {_described(rest)}, not {_described(parameter)}")
    if not _is_sound(rest):
        raise ValueError(f"{name}.rest: has NaN, or a value that is never saved")
    for part in ("state", "group"):
        _check_values(f"{name}.{part}", fields[part], NOT_SAVED if part == "group" else ())
    for key, value in fields["group"].items():
        # Steps add numbers to a group, such as estimates.
        needed = group.get(key, 0.0)
        if not _is_alike(value, needed):
            raise ValueError(
                f"{name}.group.{key}: is {_described(value)}, not {_described(needed)}"
            )


def _check_values(name: str, values: object, excluded: Container[str]) -> None:
    """ValueError if the field `name` is not a mapping of names, none of them `excluded`, to values
    that are saved."""
    if not isinstance(values, dict):
        raise ValueError(f"{name}: is {_described(values)}, not a mapping")
    for key, value in cast("dict[Any, Any]", values).items():
        if not isinstance(key, str) or key in excluded:
            raise ValueError(f"{name}: has the entry {key!r:.80}")
        if not _is_sound(value):
            raise ValueError(f"{name}.{key}: has NaN, or a value that is never saved")
        if key in _COUNTERS and not _is_counter(value):
            raise ValueError(f"{name}.{key}: {value!r:.80} is not a number of steps")


def check_state(name: str, state: Mapping[str, Any], expected: Mapping[str, Sequence[Any]]) -> None:
    """ValueError, naming the field, if `state` lacks what the optimizer expects, or has it in
    another type, shape or dtype than all that `expected` has for it."""
    for key, values in expected.items():
        if key not in state:
            raise ValueError(f"{name}.state.{key}: is missing")
        if not any(_is_alike(state[key], value) for value in values):
            needed = " or ".join(dict.fromkeys(map(_described, values)))
            raise ValueError(f"{name}.state.{key}: is {_described(state[key])}, not {needed}")


def _is_sound(value: Any, depth: int = 0) -> bool:
    """Whether a value is of a type that states contain, has no NaN, and numbers that fit in
    float32."""
    if isinstance(value, Tensor):
        if not is_host(value.device) or value.layout is not torch.strided:  # meta, sparse
            return False
        # Not the values of quantized tensors, which are subclasses or have one byte.
        has_nan = type(value) is Tensor and value.is_floating_point() and value.itemsize > 1
        return not (has_nan and bool(value.isnan().any()))
    if isinstance(value, (bool, int, float)):
        return abs(value) <= _MAX_NUMBER  # false for NaN
    if isinstance(value, (list, tuple, dict)):
        items = cast("dict[Any, Any]", value).values() if isinstance(value, dict) else value
        return depth < _MAX_DEPTH and all(_is_sound(item, depth + 1) for item in items)
    return value is None or isinstance(value, (str, torch.dtype, torch.device))


def _is_counter(value: Any) -> bool:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return isinstance(value, (int, float)) and 0 <= value <= _MAX_STEPS


def _is_alike(value: Any, other: Any) -> bool:
    """Whether two values have the same type, tensors the same shape and dtype, and sequences the
    same length and such items."""
    if isinstance(other, Tensor):
        is_same = type(value) is type(other)  # quantized tensors are subclasses
        return is_same and value.shape == other.shape and value.dtype == other.dtype
    if isinstance(other, (int, float)) and not isinstance(other, bool):
        return isinstance(value, (int, float))  # a counter may begin as an integer
    if isinstance(other, (list, tuple)):
        others = cast("Sequence[Any]", other)
        is_same = type(value) is type(others) and len(value) == len(others)
        return is_same and all(map(_is_alike, value, others))
    # A step may give a number to what had none.
    return type(value) is type(other) or (other is None and isinstance(value, (int, float)))


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    return f"of the type {type(value).__name__}"
