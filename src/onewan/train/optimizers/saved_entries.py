"""Checks a parameter's entry in a saved state before any of it is used.

A file that was damaged, or that another program or version wrote, would else end the first step
with an error of the optimizer's library, or change its results silently.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

BASE_LR = "base_lr"
"""Entry of a parameter group: its learning rate before the schedule's factor."""
NOT_SAVED = frozenset({"params", "lr", BASE_LR})
"""Entries of a parameter group that follow from the run file and the step."""

_FIELDS = frozenset({"shape", "state", "group", "rest"})
_MAX_DEPTH = 4
"""Of containers within an entry of a state."""


def check_entry(name: str, entry: object, parameter: Tensor, group: Mapping[str, Any]) -> None:
    """ValueError, naming the field, if `entry` is not one of `parameter`, whose group is `group`,
    or has NaN."""
    if not isinstance(entry, dict) or set(cast("dict[Any, Any]", entry)) != _FIELDS:
        raise ValueError(f"{name}: is not an optimizer's entry of a weight")
    fields = cast("dict[str, Any]", entry)
    if fields["shape"] != list(parameter.shape):
        shape = tuple(parameter.shape)
        raise ValueError(f"{name}: the state is of shape {fields['shape']!r:.80}, not {shape}")
    if fields["rest"] is not None and not _is_alike(fields["rest"], parameter):
        found, needed = _described(fields["rest"]), _described(parameter)
        raise ValueError(f"{name}.rest: is {found}, not {needed}")
    for part in ("state", "group"):
        if not isinstance(fields[part], dict):
            raise ValueError(f"{name}.{part}: is {_described(fields[part])}, not a mapping")
        for key, value in fields[part].items():
            if not isinstance(key, str) or (part == "group" and key in NOT_SAVED):
                raise ValueError(f"{name}.{part}: has the entry {key!r:.80}")
            if not _is_sound(value):
                raise ValueError(f"{name}.{part}.{key}: has NaN, or a value that is never saved")
    for key in group.keys() & fields["group"].keys():
        if not _is_alike(fields["group"][key], group[key]):
            found, needed = _described(fields["group"][key]), _described(group[key])
            raise ValueError(f"{name}.group.{key}: is {found}, not {needed}")


def check_state(name: str, state: Mapping[str, Any], expected: Mapping[str, Any] | None) -> None:
    """ValueError, naming the field, if `state` lacks what the optimizer expects, or has it in
    another type, shape or dtype."""
    for key, value in (expected or {}).items():
        if key not in state:
            raise ValueError(f"{name}.state.{key}: is missing")
        if not _is_alike(state[key], value):
            found, needed = _described(state[key]), _described(value)
            raise ValueError(f"{name}.state.{key}: is {found}, not {needed}")


def _is_sound(value: Any, depth: int = 0) -> bool:
    """Whether a value is of a type that states contain, and has no NaN."""
    if isinstance(value, Tensor):
        # Not the values of quantized tensors, which are subclasses or have one byte.
        has_nan = type(value) is Tensor and value.is_floating_point() and value.itemsize > 1
        return not (has_nan and bool(value.isnan().any()))
    if isinstance(value, float):
        return not math.isnan(value)
    if isinstance(value, (list, tuple, dict)):
        items = cast("dict[Any, Any]", value).values() if isinstance(value, dict) else value
        return depth < _MAX_DEPTH and all(_is_sound(item, depth + 1) for item in items)
    return value is None or isinstance(value, (bool, int, str, torch.dtype, torch.device))


def _is_alike(value: Any, other: Any) -> bool:
    """Whether two values have the same type, and tensors the same shape and dtype."""
    if isinstance(other, Tensor):
        return (
            isinstance(value, Tensor) and value.shape == other.shape and value.dtype == other.dtype
        )
    if isinstance(other, (bool, int, float)):  # a counter may begin as an integer
        return isinstance(value, (bool, int, float))
    return other is None or type(value) is type(other)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    return f"of the type {type(value).__name__}"
